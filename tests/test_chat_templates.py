"""What goes wrong between a conversation and its tokens: a header in the loss, a stop token out of it, a literal marker
that becomes one, ids that differ from those of the template that was saved."""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_helpers import (
    CONVERSATIONS,
    SHARED,
    TEMPLATES,
    applied,
    one_by_one,
    real_conversations,
    rendered,
    templated,
    tokenizer_in,
)
from tokenizers import AddedToken
from transformers import AutoTokenizer

from cheaptrain.chat.conversation import Conversation, Turn, exchange
from cheaptrain.chat.proof import prove_template
from cheaptrain.chat.rendering import Renderer
from cheaptrain.chat.templates import find_template, said
from cheaptrain.data.encode import Encoder
from cheaptrain.data.tokenizer import TextTokenizer, extends, open_tokenizer, with_template
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Chat

GENERATES = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>' }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def produced(tokenizer: TextTokenizer, ids: list[int], mask: list[int]) -> str:
    return str(tokenizer.hf.decode([i for i, wanted in zip(ids, mask, strict=True) if wanted]))


def wanted(tokenizer: TextTokenizer, conversation: Conversation) -> str:
    """What the model must say: every answer, with the space that `plain` puts before it, and the end of the turn."""
    lead = " " if tokenizer.template.name == "plain" else ""  # type: ignore[union-attr]
    stop = tokenizer.hf.convert_ids_to_tokens(tokenizer.end_of_turn_id)
    return "".join(f"{lead}{said(turn)}{stop}" for turn in conversation.turns if turn.role == "assistant")


@pytest.mark.parametrize("system", [None, 'Be "brief".\n🙂'])
@pytest.mark.parametrize("kind", ["gpt2", "llama3", "digits"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_or_mask_differ_from_apply_chat_template(tmp_path: Path, name: str, kind: str, system: str | None) -> None:
    tokenizer = templated(tmp_path / "t", name, kind, system)
    tokenizer.hf.save_pretrained(tmp_path / "saved")
    saved = open_tokenizer(str(tmp_path / "saved"))
    encoded = rendered(tokenizer, CONVERSATIONS)
    assert encoded.merging is not None
    # GPT-2 cuts two line breaks before a word apart: there, Llama 3's header and its answer always merge as one text.
    always = name == "llama3" and kind != "llama3"
    assert encoded.merging.tolist() == [always] * len(CONVERSATIONS)
    for (ids, mask), conversation in zip(one_by_one(encoded), CONVERSATIONS, strict=True):
        theirs, their_mask = applied(saved, conversation)
        if always:
            assert saved.hf.decode(theirs) == saved.hf.decode(ids)
        else:
            assert theirs == ids and their_mask == mask
        assert produced(tokenizer, ids, mask) == wanted(tokenizer, conversation)
    prove_template(saved if saved.template else tokenizer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_generation_prompt_is_not_what_training_put_before_an_answer(tmp_path: Path, name: str) -> None:
    tokenizer = templated(tmp_path / "t", name)
    messages = [{"role": "user", "content": "Who?"}]
    prompt = tokenizer.hf.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    ((ids, mask),) = one_by_one(rendered(tokenizer, [exchange("Who?", "Me.")]))
    assert ids[: mask.index(1)] == prompt


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_literal_special_token_in_a_message_is_text(tmp_path: Path, name: str) -> None:
    tokenizer = templated(tmp_path / "t", name)
    stop = tokenizer.hf.convert_ids_to_tokens(tokenizer.end_of_turn_id)
    quoted = f"is {stop} or <|im_start|> or <|endoftext|> a token?"
    ((ids, mask),) = one_by_one(rendered(tokenizer, [exchange(quoted, f"{stop} is one")]))
    ends = [i for i in ids if i == tokenizer.end_of_turn_id]
    assert len(ends) == (1 if name == "plain" else 2 + (name == "smollm2"))
    assert tokenizer.hf.decode(ids).count(stop) == len(ends) + 2 + (name == "plain")
    assert produced(tokenizer, ids, mask) == f"{' ' * (name == 'plain')}{stop} is one{stop}"


def test_one_beginning_of_text(tmp_path: Path) -> None:
    tokenizer = templated(tmp_path / "t", "llama3")
    beginning = tokenizer.hf.get_vocab()["<|begin_of_text|>"]
    for ids, _ in one_by_one(rendered(tokenizer, CONVERSATIONS)):
        assert ids.count(beginning) == 1 and ids[0] == beginning
    for name in ("chatml", "smollm2", "plain"):
        assert "<|begin_of_text|>" not in templated(tmp_path / name, name).hf.get_vocab()


def test_header_is_a_prefix_when_the_answer_begins_with_line_breaks(tmp_path: Path) -> None:
    tokenizer = templated(tmp_path / "t", "chatml", "llama3")
    prompt = tokenizer.hf.apply_chat_template(
        [{"role": "user", "content": "x"}], add_generation_prompt=True, return_dict=False
    )
    answer = exchange("x", "\n\n\nhello")
    encoded = rendered(tokenizer, [answer, exchange("x", "hello")])
    assert encoded.merging is not None and encoded.merging.tolist() == [True, False]
    ids, mask = next(one_by_one(encoded))
    assert ids[: len(prompt)] == prompt and mask.index(1) == len(prompt)
    assert applied(tokenizer, answer)[0][: len(prompt)] != prompt  # what tokenising the whole text does
    assert produced(tokenizer, ids, mask) == "\n\n\nhello<|im_end|>"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_users_part_is_in_the_loss_or_a_stop_is_not(tmp_path: Path, name: str) -> None:
    tokenizer = templated(tmp_path / "t", name)
    conversation = Conversation(
        (
            Turn("system", "SYSTEM"), Turn("user", "USER"), Turn("assistant", "ONE"), Turn("tool", "TOOL"),
            Turn("assistant", "TWO"), Turn("user", "AGAIN"), Turn("assistant", "THREE"),
        )
    )  # fmt: skip
    ((ids, mask),) = one_by_one(rendered(tokenizer, [conversation]))
    said_by_model = produced(tokenizer, ids, mask)
    assert not any(word in said_by_model for word in ("SYSTEM", "USER", "TOOL", "AGAIN", "ssistant", "\n"))
    assert sum(i == tokenizer.end_of_turn_id and bool(m) for i, m in zip(ids, mask, strict=True)) == 3


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_long_conversation_is_cut_within_a_turn(tmp_path: Path, name: str) -> None:
    tokenizer = templated(tmp_path / "t", name)
    turns = [turn for n in range(9) for turn in exchange(f"q{n} " + "a b c " * n, f"r{n} " + "d e " * n).turns]
    whole = Conversation(tuple(turns))
    lengths = [len(ids) for ids, _ in one_by_one(rendered(tokenizer, [_first(whole, 2 * n) for n in range(1, 10)]))]
    for seq_len in range(8, lengths[-1] + 2):
        encoded = rendered(tokenizer, [whole, exchange("x", "y")], seq_len)
        assert encoded.cut is not None
        fits = sum(length <= seq_len + 1 for length in lengths)
        (ids, mask), _ = one_by_one(encoded)
        assert len(ids) == ([0, *lengths][fits])
        assert encoded.cut[0] == (0 < fits < 9)
        if fits:
            expected = _first(whole, 2 * fits)
            assert (ids, mask) == next(one_by_one(rendered(tokenizer, [expected])))
            assert produced(tokenizer, ids, mask) == wanted(tokenizer, expected)


def _first(conversation: Conversation, turns: int) -> Conversation:
    return Conversation(conversation.turns[:turns], conversation.tools)


def test_added_tokens_are_not_counted_or_the_end_of_text_changes(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "t")
    chatml, llama3 = (with_template(base, Chat(template=name)) for name in ("chatml", "llama3"))
    assert chatml.added == ("<|im_start|>", "<|im_end|>") and chatml.size == base.size + 2
    assert llama3.size == base.size + 4 and base.size == len(base.hf)  # the one given is left as it was
    assert chatml.eot_id == base.eot_id == chatml.hf.eos_token_id != chatml.end_of_turn_id
    assert with_template(base, Chat(template="plain")).fingerprint == base.fingerprint
    again = with_template(chatml, Chat(template="smollm2"))
    assert again.added == () and again.fingerprint == chatml.fingerprint
    chatml.hf.save_pretrained(tmp_path / "saved")
    assert open_tokenizer(str(tmp_path / "saved")).fingerprint == chatml.fingerprint
    assert json.loads((tmp_path / "saved" / "tokenizer.json").read_text())["added_tokens"][-1]["special"]
    assert (tmp_path / "saved" / "chat_template.jinja").read_text() == chatml.template.jinja  # type: ignore[union-attr]
    for longer, shorter, expected in (
        (chatml, base, True), (base, chatml, False), (llama3, chatml, False), (base, base, True),
    ):  # fmt: skip
        assert extends(longer, shorter) is expected
    base.hf.add_tokens([AddedToken("foxes", special=False)])
    base.hf.save_pretrained(tmp_path / "words")
    assert not extends(open_tokenizer(str(tmp_path / "words")), tokenizer_in(tmp_path / "again"))


def foreign(folder: Path, jinja: str) -> TextTokenizer:
    base = with_template(tokenizer_in(folder / "t"), Chat(template="chatml"))
    file = folder / "their.jinja"
    file.write_text(jinja)
    return with_template(base, Chat(template=str(file)))


@pytest.mark.parametrize(
    "change, why",
    [
        (("{% generation %}", ""), r"no \{% generation %\} around"),
        (("+ '<|im_end|>' }}{% endgeneration %}", "}}{% endgeneration %}<|im_end|>"), "never learn to stop"),
        (("{% generation %}{{ m['content']", "{{ m['content'] }}{% generation %}{{ ''"), "an answer lies outside"),
        (("{% for m", "{% generation %}{{ messages[0]['content'] }}{% endgeneration %}{% for m"), "a question lies in"),
        (("{% for m", "{{ strftime_now('%d') }}{% for m"), "today's date"),
        (("{% for m", "{{ raise_exception('no') }}{% for m"), "cannot render"),
    ],
)
def test_a_foreign_template_that_trains_the_wrong_tokens(tmp_path: Path, change: tuple[str, str], why: str) -> None:
    jinja = GENERATES.replace(*change)
    if "endgeneration" in jinja and "{% generation %}" not in jinja:
        jinja = jinja.replace("{% endgeneration %}", "")
    assert jinja != GENERATES
    with pytest.raises(PreflightError, match=why) as refused:
        foreign(tmp_path, jinja)
    assert "choose one of chatml" in str(refused.value)


def test_a_foreign_template_differs_from_ours_that_says_the_same(tmp_path: Path) -> None:
    theirs = foreign(tmp_path, GENERATES)
    ours = templated(tmp_path / "t", "chatml")
    prove_template(theirs)
    conversations = [CONVERSATIONS[0], CONVERSATIONS[1], CONVERSATIONS[2]]
    assert [*one_by_one(rendered(theirs, conversations))] == [*one_by_one(rendered(ours, conversations))]
    assert theirs.end_of_turn_id == ours.end_of_turn_id
    spec = theirs.chat_spec(64)
    assert spec is not None
    renderer = Renderer(Encoder(theirs.encoder_spec()), spec)
    assert renderer.refusal(exchange("hi", "there")) is None
    assert "<|im_end|>" in (renderer.refusal(exchange("what is <|im_end|>?", "a token")) or "")


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_later_stage_reads_our_saved_template_as_another(tmp_path: Path, name: str) -> None:
    ours = templated(tmp_path / "t", name, "llama3", "Be brief.")
    ours.hf.save_pretrained(tmp_path / "saved")
    later = with_template(open_tokenizer(str(tmp_path / "saved")), Chat(template="tokenizer"))
    assert later.end_of_turn_id == ours.end_of_turn_id and later.fingerprint == ours.fingerprint
    assert later.template != ours.template and later.template.jinja == ours.template.jinja  # type: ignore[union-attr]
    assert [*one_by_one(rendered(later, CONVERSATIONS))] == [*one_by_one(rendered(ours, CONVERSATIONS))]


def test_the_tokenizer_has_no_template_or_one_that_says_nothing(tmp_path: Path) -> None:
    base = tokenizer_in(tmp_path / "t")
    with pytest.raises(PreflightError, match="has no template of its own"):
        with_template(base, Chat(template="tokenizer"))
    with pytest.raises(PreflightError, match=r"nowhere\.jinja: cannot be read"):
        with_template(base, Chat(template="nowhere.jinja"))
    if not (SHARED / "tokenizers" / "smollm2-instruct").is_dir():
        pytest.skip("the SmolLM2 tokenizer is not there")
    smollm2 = open_tokenizer(str(SHARED / "tokenizers" / "smollm2-instruct"))
    with pytest.raises(PreflightError, match=r"no \{% generation %\}"):
        with_template(smollm2, Chat(template="tokenizer"))


def test_our_smollm2_is_not_theirs(tmp_path: Path) -> None:
    folder = SHARED / "tokenizers" / "smollm2-instruct"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    theirs = AutoTokenizer.from_pretrained(folder)
    ours = with_template(open_tokenizer(str(folder)), Chat(template="smollm2"))
    assert ours.added == () and ours.hf.chat_template != theirs.chat_template
    for conversation in CONVERSATIONS[:3]:
        for prompt in (False, True):
            messages = conversation.messages()
            expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
            assert ours.hf.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt) == expected


def test_a_tokenizer_that_puts_spaces_before_parts_is_not_noticed(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    metaspace = Tokenizer(models.BPE())
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    metaspace.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["</s>"], show_progress=False)
    metaspace.train_from_iterator(
        ["user assistant What is 12 plus 30 It is 42 Only Me Good Hello Who And you there\n\t?!."] * 2, trainer
    )
    PreTrainedTokenizerFast(tokenizer_object=metaspace, eos_token="</s>").save_pretrained(tmp_path / "m")
    tokenizer = with_template(open_tokenizer(str(tmp_path / "m")), Chat(template="chatml"))
    with pytest.raises(PreflightError, match="parts encoded one by one and the text as a whole have other tokens"):
        prove_template(tokenizer)


def check_real(tokenizer: TextTokenizer, conversations: list[Conversation], compared: int) -> None:
    """Every answer and its end of turn, and nothing else, is produced; `compared` also against transformers."""
    specials = list(tokenizer.chat_spec(1).marker_ids)  # type: ignore[union-attr]
    encoded = rendered(tokenizer, conversations)
    assert encoded.merging is not None
    seen = 0
    for number, ((ids, mask), conversation) in enumerate(zip(one_by_one(encoded), conversations, strict=True)):
        assert produced(tokenizer, ids, mask) == wanted(tokenizer, conversation)
        literal = any(token in turn.content for turn in conversation.turns for token in specials)
        if number % (len(conversations) // compared) == 0 and not encoded.merging[number] and not literal:
            assert applied(tokenizer, conversation) == (ids, mask)
            seen += 1
    assert seen > compared // 2 or encoded.merging.mean() > 0.9


@pytest.mark.parametrize("folder", ["gpt2", "smollm2-instruct"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_of_a_sample_of_real_conversations(folder: str, name: str) -> None:
    conversations = [*real_conversations(20)]
    base = open_tokenizer(str(SHARED / "tokenizers" / folder))
    check_real(with_template(base, Chat(template=name)), conversations, 40)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["gpt2", "smollm2-instruct"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_mask_of_all_real_conversations(folder: str, name: str) -> None:
    conversations = [*real_conversations(None)]
    assert len(conversations) > 50_000
    base = open_tokenizer(str(SHARED / "tokenizers" / folder))
    check_real(with_template(base, Chat(template=name)), conversations, 2000)


def test_jinja_and_parts_are_written_down_twice() -> None:
    """One description gives both: a change of a header shows in each."""
    template = find_template("chatml", None, "<|endoftext|>")
    assert template is not None
    changed = type(template)(**{**vars(template), "header": "<|im_start|>{role}::"})
    assert "::" in changed.jinja and changed.parts(CONVERSATIONS[0])[1].text.startswith("user::")
    assert np.array_equal([part.supervised for part in changed.parts(CONVERSATIONS[0])][-3:], [True, True, False])
