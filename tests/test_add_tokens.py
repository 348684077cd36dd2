"""Tokens added to a tokenizer that change ordinary text, do not come back, or are unknown to the next stage."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_helpers import SHARED, tokenizer_in
from model_helpers import build
from prepare_helpers import prepare as prepare_source
from prepare_helpers import quiet, recipe, said, save_tokenizer, write_jsonl
from small_runs import prepare, recipe_table, run_child, tail, train, write_recipe, write_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

from cheaptrain.data.domain import MULTIPLICATION, plainly, tokens_of
from cheaptrain.data.encode import Encoder
from cheaptrain.data.manifest import source_directory
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import TextTokenizer, extends, load_tokenizer, open_tokenizer, with_template, with_tokens
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import build_model
from cheaptrain.model.growth import plan_growth
from cheaptrain.recipe.schema import Chat, Model
from cheaptrain.train.survey import origin

GPT2 = SHARED / "tokenizers" / "gpt2"
TEXTS = (
    "7 * 8 = ⟦7×8⟧⟦5⟧⟦6⟧", "⟦9×9⟧⟦9×9⟧\n⟦8⟧⟦1⟧.", "so⟦2⟧⟦3⟧⟦×⟧⟦4⟧is", " ⟦1×1⟧ naïve 🙂\n\n", "⟦10×2⟧ 3×4 ⟦ ⟧",
)  # fmt: skip


def ids_of(tokenizer: TextTokenizer, text: str) -> list[int]:
    ids, _ = Encoder(tokenizer.encoder_spec()).pieces([text])
    return [int(index) for index in ids]


def test_the_set_for_multiplication_cannot_write_a_product() -> None:
    assert len(MULTIPLICATION) == len(set(MULTIPLICATION)) == 92
    for a in range(1, 10):
        for b in range(1, 10):
            digits = [f"⟦{digit}⟧" for digit in str(a * b)]
            assert {f"⟦{a}×{b}⟧", *digits} <= {*MULTIPLICATION}
            assert plainly(f"{a} × {b} = ⟦{a}×{b}⟧{''.join(digits)}.") == f"{a} × {b} = {a * b}."
    assert plainly("⟦2⟧⟦3⟧⟦×⟧⟦4⟧ = ⟦9⟧⟦2⟧") == "23×4 = 92" and plainly("⟦7×8⟧ = 56") == "7×8 = 56"
    assert plainly("⟦7×8⟧56 and ⟦x⟧, [7×8]") == "56 and ⟦x⟧, [7×8]"
    assert tokens_of("multiplication") == MULTIPLICATION and tokens_of(None) == () and tokens_of(["a"]) == ("a",)


@pytest.mark.skipif(not GPT2.is_dir(), reason="needs the GPT-2 tokenizer of shared/data/tokenizers/gpt2")
def test_gpt2_with_the_set_has_another_size_than_50349() -> None:
    plain = open_tokenizer(str(GPT2))
    grown = with_tokens(plain, MULTIPLICATION)
    assert (plain.size, grown.size) == (50_257, 50_349)
    assert [grown.hf.convert_tokens_to_ids(token) for token in MULTIPLICATION] == list(range(50_257, 50_349))
    assert ids_of(grown, "⟦7×8⟧⟦5⟧⟦6⟧") == [50_257 + 6 * 9 + 7, 50_257 + 81 + 5, 50_257 + 81 + 6]
    for text in TEXTS:
        assert grown.hf.decode(grown.hf.encode(text)) == text
    marked = with_template(grown, Chat())
    assert marked.size == 50_351 and marked.added == ("<|im_start|>", "<|im_end|>")


@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3"])
def test_added_tokens_change_text_without_them_or_are_lost_in_it(tmp_path: Path, kind: str) -> None:
    plain = tokenizer_in(tmp_path, kind)
    grown = with_tokens(plain, MULTIPLICATION)
    assert grown.size == plain.size + 92 and grown.ordinary == MULTIPLICATION
    new = set(range(plain.size, grown.size))
    for text in ("The quick brown fox, 7 × 8 = 56.", "⟦ a × b ⟧ and ⟦10×2⟧", "counting 1 22 333\n\nstars"):
        assert ids_of(grown, text) == ids_of(plain, text)
    for text in TEXTS:
        ids = ids_of(grown, text)
        wanted = [token for token in MULTIPLICATION for _ in range(text.count(token))]
        assert sorted(set(ids) & new) == sorted({grown.hf.convert_tokens_to_ids(token) for token in wanted})
        assert sum(index in new for index in ids) == len(wanted)
        assert grown.hf.decode(ids) == text
    assert grown.token_bytes()[plain.size] == len("⟦1×1⟧".encode())
    assert not new & set(grown.special_ids)


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("e", "in its vocabulary already"), ("<|endoftext|>", "is a special token"),
        ("éÃ", "does not come back as it was written"),
    ],
)  # fmt: skip
def test_a_token_that_breaks_the_text_is_added(tmp_path: Path, token: str, why: str) -> None:
    plain = tokenizer_in(tmp_path, "gpt2")
    with pytest.raises(PreflightError, match=f"tokenizer.add_tokens: '.*' (is )?{why}"):
        with_tokens(plain, ["⟦ok⟧", token])


def test_a_saved_tokenizer_gives_other_ids_or_is_given_its_tokens_twice(tmp_path: Path) -> None:
    plain = tokenizer_in(tmp_path / "plain", "gpt2")
    grown = with_tokens(plain, MULTIPLICATION)
    grown.hf.save_pretrained(tmp_path / "saved")
    again = open_tokenizer(str(tmp_path / "saved"))
    assert again.fingerprint == grown.fingerprint != plain.fingerprint
    twice = with_tokens(again, MULTIPLICATION)
    assert (twice.fingerprint, twice.size) == (grown.fingerprint, grown.size)
    assert extends(grown, plain) and not extends(plain, grown) and not extends(again, plain)


def test_what_was_prepared_without_the_tokens_is_taken_for_text_with_them(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    write_jsonl(tmp_path / "a.jsonl", range(20))
    source = {"files": str(tmp_path / "a.jsonl")}
    without = recipe(tmp_path, source)
    path = str(tmp_path / "tokenizer")
    listed = recipe(tmp_path, source, tokenizer={"path": path, "add_tokens": ["⟦a⟧", "⟦b⟧"]})
    named = recipe(tmp_path, source, tokenizer={"path": path, "add_tokens": "multiplication"})
    sizes, folders = [], set()
    for table in (without, listed, named):
        tokenizer = load_tokenizer(table.tokenizer, table.data)
        sizes.append(tokenizer.size)
        folders.add(source_directory(table.data, table.data.sources[0], tokenizer))
    assert [size - sizes[0] for size in sizes] == [0, 2, 92] and len(folders) == 3


def test_an_added_token_in_plain_text_is_not_counted(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    lines = [
        json.dumps({"text": f"document {number} says {'⟦5⟧' if number % 4 == 0 else 'it'}"}) for number in range(40)
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    table = recipe(tmp_path, {"files": str(tmp_path / "a.jsonl")}, validation=0.0)
    table = table.model_copy(update={"tokenizer": table.tokenizer.model_copy(update={"add_tokens": "multiplication"})})
    console = quiet()
    (manifest,) = prepare_recipe(table, console=console)
    assert manifest.literal == 10
    assert "10 documents hold an added token as plain text" in " ".join(said(console).split())
    plain, text = prepare_source(tmp_path, {"files": str(tmp_path / "a.jsonl")}, validation=0.0)
    assert plain.literal is None and "added token" not in text


@pytest.mark.parametrize(
    ("add", "why"),
    [
        (["⟦a⟧", " b"], "begins or ends with white space"), ([""], "is empty"), (["a", "a"], "stands there twice"),
        ([], "at least 1 item"), ("division", "multiplication"),
    ],
)  # fmt: skip
def test_a_list_of_tokens_that_cannot_be_is_taken(tmp_path: Path, add: Any, why: str) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    with pytest.raises(ValueError, match=why):
        recipe(tmp_path, {"files": "a"}, tokenizer={"path": str(tmp_path / "tokenizer"), "add_tokens": add})


def test_a_stage_that_adds_tokens_is_taken_for_one_with_another_tokenizer(tmp_path: Path) -> None:
    plain = tokenizer_in(tmp_path / "plain", "gpt2")
    grown = with_tokens(plain, MULTIPLICATION)
    earlier = SimpleNamespace(
        loaded=SimpleNamespace(
            recipe=SimpleNamespace(run=SimpleNamespace(dir=str(tmp_path / "run")), model=Model(preset="tiny-llama")),
            path=tmp_path / "earlier.toml",
        ),
        tokenizer=plain,
    )
    coming: Any = Model(init_from=str(tmp_path / "run" / "final"))
    origin(coming, grown, [earlier])  # type: ignore[list-item]
    origin(coming, with_template(grown, Chat(template="llama3")), [earlier])  # type: ignore[list-item]
    earlier.tokenizer = grown
    with pytest.raises(RecipeError, match="will be trained with another tokenizer"):
        origin(coming, plain, [earlier])  # type: ignore[list-item]
    growth = plan_growth({"vocab_size": 512, "unpadded_vocab_size": 400}, None, 492, 64)
    assert growth is not None and (growth.known, growth.rows_after) == (400, 512)


def test_both_conditions_of_a_seed_begin_with_other_weights() -> None:
    def fresh(tokens: int) -> dict[str, torch.Tensor]:
        spec = Model(preset="tiny-qwen3", vocab_multiple=128)
        return build_model(spec, vocab_size=tokens, seq_len=32, seed=5, eot_id=0).state_dict()

    baseline, mul = fresh(1950), fresh(2042)
    assert all(torch.equal(mul[name], weight) for name, weight in baseline.items())
    other = build("tiny-qwen3", vocab_size=2042, seed=6).state_dict()
    assert not all(torch.equal(other[name], weight) for name, weight in baseline.items() if other[name].ndim > 1)


def test_a_checkpoint_loses_the_tokens_or_the_next_stage_does_not_grow_for_them(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=120)
    base = recipe_table(tmp_path, "base")
    base["model"]["vocab_multiple"] = 1
    base["train"] |= {"steps": 2, "warmup": 0}
    base["checkpoint"] = {"every": "2 steps"}
    later = recipe_table(tmp_path, "later") | {"model": {"init_from": str(tmp_path / "base" / "final")}}
    later["train"] |= {"steps": 1, "warmup": 0, "lr": 1e-9}
    later["tokenizer"] = {**base["tokenizer"], "add_tokens": "multiplication"}
    later["data"]["transform"] = [{"name": "river", "pattern": r"\briver\b", "replace": "⟦7×8⟧"}]
    recipes = [write_recipe(tmp_path / f"{name}.toml", table) for name, table in (("base", base), ("later", later))]
    for path in recipes:
        prepare(path)
    log = tmp_path / "log"
    assert run_child(train(*recipes), log) == 0, tail(log)
    (said_known,) = re.findall(r"vocabulary: 92 new tokens from id (\d+) on", log.read_text())
    known = int(said_known)
    final = tmp_path / "later" / "final"
    hf = AutoTokenizer.from_pretrained(final)
    assert len(hf) == known + 92 and hf.decode(hf.encode("7 ⟦7×8⟧⟦5⟧")) == "7 ⟦7×8⟧⟦5⟧"
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "base" / "final").get_input_embeddings().weight
    after = AutoModelForCausalLM.from_pretrained(final).get_input_embeddings().weight
    assert after.shape[0] == -(-(known + 92) // 64) * 64
    torch.testing.assert_close(after[known : known + 92], before[:known].mean(0).expand(92, -1), atol=1e-6, rtol=0)
