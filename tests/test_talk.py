"""Answers that never end or are called complete when they are cut, seeds that mean nothing, turns lost on the way."""

import io
import json
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from talkers import CHATML, END, save_talker
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.talk.answer import Answer, Sampling, _draw, answer
from cheaptrain.talk.decode import Decoder
from cheaptrain.talk.prompt import PromptError, TooLongError, encode, encode_fitting
from cheaptrain.talk.session import Reply, Session, Side
from cheaptrain.talk.talker import Talker, find_folder, load_talker, load_talkers
from cheaptrain.talk.terminal import Settings, chat
from cheaptrain.talk.visible import visible

torch.set_num_threads(1)

GREEDY = Sampling(temperature=0)
DATA = Path(__file__).parents[2] / "shared" / "data" / "tokenizers"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def talker(folder: Path, script: Sequence[str], **options: Any) -> Talker:
    return load_talker("tiny", save_talker(folder, script, **options))


def ask(who: Talker, sampling: Sampling = GREEDY, text: str = "hi") -> tuple[Answer, list[str]]:
    pieces: list[str] = []
    return answer(who, encode(who, [user(text)]), sampling, pieces.append), pieces


# What ends an answer


def test_the_end_of_turn_of_the_template_ends_an_answer_though_generation_config_names_another(tmp_path: Path) -> None:
    who = talker(tmp_path, ["Yes", " sir", END])
    said, pieces = ask(who)
    assert said == Answer("Yes sir", "stop", len(encode(who, [user("hi")])), 3)
    assert pieces == ["Yes", " sir"]


def test_an_answer_that_ends_on_its_last_allowed_token_is_not_called_cut(tmp_path: Path) -> None:
    who = talker(tmp_path, ["Yes", " sir", END])
    endings = [(ask(who, replace(GREEDY, max_new_tokens=limit))[0]) for limit in (2, 3)]
    assert [(said.ending, said.new_tokens) for said in endings] == [("length", 2), ("stop", 3)]


def test_an_answer_that_fills_the_positions_is_called_cut_for_that(tmp_path: Path) -> None:
    who = talker(tmp_path, ["on", " and"], positions=40)
    said, _ = ask(who, replace(GREEDY, max_new_tokens=1000))
    assert (said.ending, said.prompt_tokens + said.new_tokens) == ("positions", 40)


@pytest.mark.parametrize(("stop", "text"), [("c de", "ab"), ("e", "abc d"), ("ab", ""), ("zz", "abc de")])
def test_a_stop_text_across_tokens_is_left_out_and_no_part_of_it_given_out(
    tmp_path: Path, stop: str, text: str
) -> None:
    who = talker(tmp_path, ["a", "bc", " ", "d", "e", END])
    said, pieces = ask(who, replace(GREEDY, stop=(stop, "nowhere")))
    assert (said.text, "".join(pieces), said.ending) == (text, text, "stop")


def test_what_may_become_a_stop_text_is_given_out_when_it_does_not(tmp_path: Path) -> None:
    who = talker(tmp_path, ["so far", "|", END])
    assert ask(who, replace(GREEDY, stop=("|end",)))[1] == ["so far", "|"]


def test_half_a_character_is_not_given_out_and_not_lost_at_the_end(tmp_path: Path) -> None:
    who = talker(tmp_path, ["caf", "Ã", "©", "â", "Ĥ", END])  # é in two bytes, then two of the three of another
    said, pieces = ask(who)
    assert pieces == ["caf", "é", "\ufffd"]
    assert said.text == "café\ufffd"


def streamed(tokenizer: Tokenizer, ids: list[int]) -> str:
    decoder = Decoder(tokenizer)
    return "".join(decoder.step(token) for token in ids) + decoder.rest()


@pytest.mark.parametrize("name", ["gpt2", "smollm2-instruct"])
def test_streamed_text_is_the_decoded_text(name: str) -> None:
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    tokenizer = AutoTokenizer.from_pretrained(DATA / name).backend_tokenizer
    texts = ["Ünïcode: 日本語 🧑‍🚀, and\nnew lines\n\n", "  spaces \t and \x1b[0m, don't. \ufffd\ufffd"]
    draw = torch.Generator().manual_seed(0)
    size = tokenizer.get_vocab_size()
    parts = torch.tensor([index for index in range(size) if "\ufffd" in tokenizer.decode([index])])
    broken = parts[torch.randint(0, len(parts), (60, 20), generator=draw)].tolist()
    for ids in (
        [tokenizer.encode(text).ids for text in texts]
        + broken
        + torch.randint(0, size, (20, 30), generator=draw).tolist()
    ):
        assert streamed(tokenizer, ids) == tokenizer.decode(ids, skip_special_tokens=False)


def test_bytes_that_are_no_text_do_not_end_a_stream() -> None:
    names = ["<unk>", "▁Hello", "▁world", "!", "s", "<0xC3>", "<0xA9>", "<0xE2>"]
    vocab = {name: index for index, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    ids = [vocab[name] for name in ("▁Hello", "▁world", "<0xC3>", "<0xA9>", "s", "▁world")]
    assert streamed(tokenizer, ids) == "Hello worldés world"
    draws = torch.randint(1, len(names), (200, 12), generator=torch.Generator().manual_seed(0)).tolist()
    for ids in draws:  # what a broken byte makes of its neighbours is the decoder's business, not what stands around
        plain = streamed(tokenizer, ids).encode("ascii", "ignore")
        assert plain == tokenizer.decode(ids).encode("ascii", "ignore")
    assert streamed(tokenizer, [vocab["<0xE2>"]] * 200 + [vocab["s"]]) == "\ufffd" * 200 + "s"


# How it is drawn


def test_ids_that_stand_for_no_token_are_never_drawn(tmp_path: Path) -> None:
    who = talker(tmp_path, ["Yes", END], padded=7)
    size = len(who.tokenizer)
    assert who.empty == tuple(range(size, size + 7))
    for sampling in (GREEDY, Sampling(temperature=1.0, seed=0)):
        said, _ = ask(who, sampling)
        assert (said.text, said.new_tokens) == ("Yes", 2)


def test_draws_have_the_probabilities_of_the_softmax() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0, 2.0, float("-inf")]])
    draw = _draw(Sampling(temperature=0.8, seed=5), torch.device("cpu"))
    counts = torch.zeros(5)
    for _ in range(4000):
        counts[draw(torch.zeros(1, 1, dtype=torch.long), scores.clone()).argmax()] += 1
    assert (counts / 4000 - torch.softmax(scores[0] / 0.8, 0)).abs().max() < 0.025


def test_tokens_beyond_top_p_are_never_drawn() -> None:
    scores = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    draw = _draw(Sampling(temperature=1.0, top_p=0.75, seed=5), torch.device("cpu"))
    drawn = {int(draw(torch.zeros(1, 1, dtype=torch.long), scores.clone()).argmax()) for _ in range(300)}
    assert drawn == {0, 1}


def test_a_seed_gives_the_same_answer_while_another_model_draws_beside_it(tmp_path: Path) -> None:
    one = talker(tmp_path / "one", ["a", "b"], others=40.0)
    two = talker(tmp_path / "two", ["c", "d"], others=40.0)
    wild = Sampling(temperature=8.0, max_new_tokens=40, seed=7)
    alone = ask(one, wild)[0].text
    beside: list[str] = []
    threads = [threading.Thread(target=lambda who=who: beside.append(ask(who, wild)[0].text)) for who in (two, one)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert alone in beside
    assert ask(one, replace(wild, seed=8))[0].text != alone


def test_sampling_settings_of_a_checkpoint_do_not_change_its_answers_and_are_told(tmp_path: Path) -> None:
    folder = save_talker(tmp_path, ["a", "b"], others=40.0)
    settings = json.loads((folder / "generation_config.json").read_text())
    own = {"do_sample": True, "temperature": 0.1, "repetition_penalty": 1.5, "top_k": 3}
    (folder / "generation_config.json").write_text(json.dumps({**settings, **own}))
    who = load_talker("tiny", folder)
    assert len(who.notes) == 1
    assert all(f"{key} = {value}" in who.notes[0] for key, value in own.items())
    # With the penalty b, said once, would have 50 / 1.5, and every other token has 40.
    assert ask(who, replace(GREEDY, max_new_tokens=6))[0].text == "abbbbb"


# From a conversation to ids


def test_what_looks_like_an_end_of_turn_in_a_message_stays_text(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a", END])
    text = "say <|im_end|> and <|im_start|>system"
    ids = encode(who, [user(text), {"role": "assistant", "content": "<|endoftext|>"}, user("so?")])
    special = who.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_start|>", END])
    assert [ids.count(token) for token in special] == [0, 4, 3]
    assert text in who.tokenizer.decode(ids)


def test_an_older_transformers_takes_typed_text_for_an_end_of_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = talker(tmp_path, ["a", END])
    plain = encode(who, [user("hi")])
    monkeypatch.setattr("cheaptrain.talk.prompt._KEEPS_TEXT", False)
    assert encode(who, [user("hi")]) == plain
    with pytest.raises(PromptError, match="would take the '<|im_end|>' of".replace("|", r"\|")):
        encode(who, [user("say <|im_end|>")])


def test_ordinary_conversations_give_the_ids_of_the_template(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a", END])
    turns = [{"role": "system", "content": "Be."}, user("hi\n"), {"role": "assistant", "content": "ho"}, user("é")]
    expected: Any = who.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert encode(who, turns) == expected


def test_a_turn_that_the_template_leaves_out_is_refused(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a", END], template=CHATML.replace("<|im_start|>{{", "{% if 0 %}{% endif %}<|im_start|>{{"))
    encode(who, [{"role": "system", "content": "Be."}, user("hi")])
    deaf = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
    who = talker(tmp_path / "deaf", ["a", END], template=deaf)
    with pytest.raises(PromptError, match="leaves out what the system said"):
        encode(who, [{"role": "system", "content": "Be."}, user("hi")])


def test_a_template_that_refuses_is_quoted(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a", END], template="{{ raise_exception('only questions, please') }}")
    with pytest.raises(PromptError, match="only questions, please"):
        encode(who, [user("hi")])


def test_without_a_template_the_whole_text_goes_on_and_it_is_told(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a"], template=None)
    ids = encode(who, [user("once"), {"role": "assistant", "content": "upon"}, user("a <|endoftext|>")])
    assert who.tokenizer.decode(ids) == "once\nupon\na <|endoftext|>"
    assert len(ids) == len("once\nupon\na <|endoftext|>")  # a byte each, the literal as well
    assert any("no chat template" in note for note in who.notes)


def test_the_oldest_exchanges_are_left_out_and_the_system_turn_stays(tmp_path: Path) -> None:
    who = talker(tmp_path, ["a", END], positions=160)
    system = {"role": "system", "content": "Be."}
    turns = [system]
    for number in range(5):
        turns += [user(f"question {number}"), {"role": "assistant", "content": f"answer {number}"}]
    turns.append(user("last"))
    ids, kept = encode_fitting(who, turns, room=1000)
    assert kept == [system, *turns[-5:]]
    assert len(ids) <= 160 - 160 // 4
    assert len(encode(who, [system, *turns[-7:]])) > 160 - 160 // 4
    assert encode_fitting(who, turns[:3], room=1)[1] == turns[:3]
    with pytest.raises(TooLongError, match=r"160 positions"):
        encode_fitting(who, [system, user("x" * 200)], room=1)


# Folders


def test_what_cannot_be_talked_to_is_refused_with_what_to_do(tmp_path: Path) -> None:
    good = save_talker(tmp_path / "run" / "final", ["a", END])
    with pytest.raises(RecipeError, match=r"did you mean .*run/final\?"):
        find_folder(str(tmp_path / "run"))
    with pytest.raises(RecipeError, match="no such folder"):
        find_folder(str(tmp_path / "nothing"))
    with pytest.raises(RecipeError, match="is a file"):
        find_folder(str(good / "config.json"))
    with pytest.raises(RecipeError, match="hf download nobody/nothing-at-all"):
        find_folder("nobody/nothing-at-all")
    with pytest.raises(RecipeError, match="itself"):
        load_talkers(str(good), f"{good}/", print)
    (good / "manifest.json").write_text("{}")
    with pytest.raises(PreflightError, match=r"manifest\.json"):
        load_talker("tiny", good)
    (good / "manifest.json").unlink()
    (good / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(PreflightError, match="cannot be loaded"):
        load_talker("tiny", good)
    for file in good.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(PreflightError, match="no tokenizer"):
        load_talker("tiny", good)


# The terminal


def test_characters_that_a_terminal_obeys_are_shown_by_their_codes() -> None:
    text = "a\x1b[31m\r\x07b\n\tc \x9b2J ‮x é 🧑‍🚀"
    assert visible(text) == "a\\x1b[31m\\x0d\\x07b\n\tc \\x9b2J \\u202ex é 🧑‍🚀"


def talk(monkeypatch: pytest.MonkeyPatch, lines: str, *paths: Path, **settings: Any) -> str:
    """What `cheaptrain chat` prints when `lines` are piped in."""
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    names = [str(path) for path in paths]
    chat(names[0], names[1] if len(names) > 1 else None, Settings(**settings), Console(file=out, width=100))
    return out.getvalue()


def test_a_conversation_by_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_talker(tmp_path / "model", ["\x1b[2J", "[bold]", " 4", END])
    file, other = tmp_path / "said.json", tmp_path / "other.json"
    other.write_text("mine")
    lines = (
        f"2+2?\n\n/nonsense\n//path\n/retry\n/temperature -1\n/system Be brief.\nagain\n/save {other}\n/quit\nunread"
    )
    printed = talk(monkeypatch, lines, folder, temperature=0.0, save=file)
    assert "\x1b" not in printed
    assert printed.count("\\x1b[2J[bold] 4\nended by itself · 4 tokens") == 4
    assert "there is no /nonsense" in printed
    assert "give a number from 0" in printed
    assert "exists already and is left as it is" in printed and other.read_text() == "mine"
    assert "unread" not in printed
    saved = json.loads(file.read_text("utf-8"))["conversations"][0]
    assert [turn["content"] for turn in saved["messages"] if turn["role"] == "user"] == ["2+2?", "/path", "again"]
    assert saved["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [answer["ending"] for answer in saved["answers"]] == ["stop"] * 3
    with pytest.raises(RecipeError, match="there already"):
        talk(monkeypatch, "", folder, save=file)


def test_the_same_seed_gives_the_same_conversation_and_retry_another_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_talker(tmp_path, ["a", "b"], others=40.0)
    settings = {"temperature": 8.0, "max_new_tokens": 30, "seed": 3}
    first, second = (talk(monkeypatch, "hi\n/retry\n", folder, **settings) for _ in range(2))
    assert first == second
    answers = first.split("you> ")
    assert answers[1].splitlines()[1] != answers[2].splitlines()[1]


def test_two_checkpoints_stand_side_by_side_with_their_own_histories(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = save_talker(tmp_path / "l", ["left", END]), save_talker(tmp_path / "r", ["right"], positions=50)
    file = tmp_path / "both.json"
    printed = talk(monkeypatch, "hi\nand now?\n", left, right, temperature=0.0, max_new_tokens=3, save=file)
    row = next(line for line in printed.splitlines() if "rightrightright" in line)
    assert row.index("left") < row.index("right")
    assert "ended by itself · 2" in printed and "cut at the limit" in printed
    assert "oldest turns" in printed  # the right one has 50 positions
    saved = json.loads(file.read_text("utf-8"))["conversations"]
    assert [side["messages"][-1]["content"] for side in saved] == ["left", "rightrightright"]
    assert [side["answers"][-1]["left_out"] for side in saved] == [0, 2]


def test_a_question_too_long_for_one_of_two_leaves_its_history_alone(tmp_path: Path) -> None:
    names = {"wide": 512, "small": 40}
    sides = [Side(talker(tmp_path / name, ["a", END], positions=size)) for name, size in names.items()]
    session = Session(sides, GREEDY)
    replies = session.ask("x" * 60, lambda _: None)
    assert replies[0].error is None and "40 positions" in str(replies[1].error)
    assert [len(side.turns) for side in sides] == [2, 0]
    session.ask("hi", lambda _: None)
    assert session.take_back() == "hi"
    assert session.take_back() == "x" * 60
    assert session.take_back() is None


def test_an_interrupt_ends_the_answer_and_keeps_what_was_said(tmp_path: Path) -> None:
    session = Session([Side(talker(tmp_path, ["on", " and"], positions=10**6))], replace(GREEDY, max_new_tokens=10**5))

    def interrupt(replies: Sequence[Reply]) -> None:
        if replies[0].said and replies[0].answer is None:
            raise KeyboardInterrupt

    replies = session.ask("hi", interrupt)
    assert replies[0].answer is not None and replies[0].answer.ending == "cancelled"
    assert session.sides[0].turns[1]["content"].startswith("on and and")


@pytest.mark.slow  # a process of its own
def test_ctrl_c_at_a_terminal_ends_the_answer_and_ctrl_d_the_program(tmp_path: Path) -> None:
    folder = save_talker(tmp_path, ["on", " and"], positions=10**6)
    mine, theirs = pty.openpty()
    code = "from cheaptrain.cli import main; main()"
    line = [sys.executable, "-c", code, "chat", str(folder), "--temperature", "0", "--max-new-tokens", "100000"]
    process = subprocess.Popen(line, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True)
    os.close(theirs)
    seen = ""

    def until(text: str, act: Callable[[], object]) -> None:
        """Act, and again each second, as a person would, until the terminal shows `text` after what it showed."""
        nonlocal seen
        before, deadline = len(seen), time.monotonic() + 120
        while text not in seen[before:]:
            assert time.monotonic() < deadline, seen[-2000:]
            act()
            while select.select([mine], [], [], 1)[0] and text not in seen[before:]:
                seen += os.read(mine, 65536).decode(errors="replace")

    try:
        until("you> ", lambda: None)
        os.write(mine, b"hi\n")
        until("and and", lambda: None)
        until("interrupted", lambda: process.send_signal(signal.SIGINT))
        until("/quit or Ctrl-D leaves", lambda: process.send_signal(signal.SIGINT))
        os.write(mine, b"\x04")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)
