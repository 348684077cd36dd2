"""Rules that rewrite the wrong text, other matches each time, or nothing at all, and nobody is told."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import chat_recipe
from prepare_helpers import all_bytes, documents_of, prepare, quiet, recipe, said, save_tokenizer, tokenizer_of

from cheaptrain.chat.conversation import Conversation, Turn
from cheaptrain.data.manifest import load_manifest, source_directory
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.data.transform import Rewriter, Rewriting, idle_rules
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.schema import Transform

FACT = {"name": "fact", "pattern": r"(\d) by (\d)", "replace": r"⟦\1×\2⟧"}
ROOT = Path(__file__).parent.parent


def write_facts(folder: Path, count: int = 300) -> dict[str, Any]:
    save_tokenizer(folder / "tokenizer")
    lines = [json.dumps({"text": fact(number)}) for number in range(count)]
    (folder / "facts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"files": str(folder / "facts.jsonl")}


def fact(number: int) -> str:
    return f"document {number}: {number % 10} by {number % 7} and {number % 3} by 4."


def rewritten(rules: list[dict[str, Any]], documents: list[Any], tokens: tuple[str, ...] = ()) -> Any:
    rewriter = Rewriter(Rewriting(tuple(Transform(**rule) for rule in rules), tokens))
    spelled = [document.encode() if isinstance(document, str) else document.canonical() for document in documents]
    return rewriter.rewrite(documents, spelled, [False] * len(documents))


def test_held_out_text_is_rewritten_or_other_documents_are_held_out(tmp_path: Path) -> None:
    source = write_facts(tmp_path)
    plain, _ = prepare(tmp_path, source, validation=0.2)
    ruled, text = prepare(tmp_path, source, validation=0.2, transform=[FACT])
    tokenizer = tokenizer_of(tmp_path)
    assert documents_of(ruled, tokenizer, "val") == documents_of(plain, tokenizer, "val")
    assert "by" in documents_of(ruled, tokenizer, "val")[0]
    before, after = documents_of(plain, tokenizer), documents_of(ruled, tokenizer)
    assert after == [re.sub(FACT["pattern"], FACT["replace"], document) for document in before] != before
    count = len(before)
    assert ruled.transform == {"fact": {"documents": count, "matches": 2 * count, "rewritten": 2 * count, "tokens": 0}}
    assert plain.transform is None and plain.directory != ruled.directory
    assert (ruled.train.bytes, ruled.val.bytes) == (plain.train.bytes, plain.val.bytes), "bytes are those of the text"
    assert f"rewrote {2 * count:,} of {2 * count:,} matches in {count:,} documents" in " ".join(text.split())


def test_other_workers_and_units_rewrite_other_matches(tmp_path: Path) -> None:
    source = write_facts(tmp_path)
    rule = FACT | {"share": 0.4}
    one, _ = prepare(tmp_path, source, dir=str(tmp_path / "one"), transform=[rule], workers=1, unit_bytes=1000)
    two, _ = prepare(tmp_path, source, dir=str(tmp_path / "two"), transform=[rule], workers=2, unit_bytes=1000)
    assert len(one.units) > 3 and all_bytes(one.directory) == all_bytes(two.directory)
    whole, _ = prepare(tmp_path, source, transform=[rule])
    tokenizer = tokenizer_of(tmp_path)
    assert documents_of(whole, tokenizer) == documents_of(one, tokenizer)
    assert whole.transform == one.transform is not None
    counts = whole.transform["fact"]
    assert 0.33 < counts["rewritten"] / counts["matches"] < 0.47 and counts["matches"] == 2 * counts["documents"]


def test_which_matches_are_rewritten_depends_on_the_order_of_documents_or_the_form() -> None:
    documents = [fact(number) for number in range(200)]
    rule = FACT | {"share": 0.5}
    there, back = rewritten([rule], documents), rewritten([rule], documents[::-1])
    assert there.documents == back.documents[::-1]
    other = rewritten([rule | {"replace": "(product)"}], documents)
    plainly = [re.sub("⟦.×.⟧", "(product)", document) for document in there.documents]
    assert other.documents == plainly != documents
    more = rewritten([rule | {"share": 0.7}], documents)
    assert sum(text.count("⟦") for text in more.documents) > sum(text.count("⟦") for text in there.documents)
    for few, many in zip(there.documents, more.documents, strict=True):  # a larger share has the smaller one in it
        assert many.count("⟦") >= few.count("⟦")
    assert rewritten([rule | {"share": 0.0}], documents).documents == documents
    twice = rewritten([rule], [documents[0], documents[0]])
    assert twice.documents[0] == twice.documents[1]


def test_rules_are_not_applied_one_after_the_other() -> None:
    rules = [
        FACT,
        {"name": "first", "pattern": r"(?<=⟧ is )\d", "replace": r"⟦\g<0>⟧"},
        {"name": "second", "pattern": r"(?<=⟧)\d", "replace": r"⟦\g<0>⟧"},
    ]
    found = rewritten(rules, ["7 by 8 is 56.", "nothing"], ("⟦7×8⟧", "⟦5⟧", "⟦6⟧"))
    assert found.documents == ["⟦7×8⟧ is ⟦5⟧⟦6⟧.", "nothing"]
    assert {name: dict(counts) for name, counts in found.matches[0].items()} == {
        name: {"documents": 1, "matches": 1, "rewritten": 1, "tokens": 1} for name in ("fact", "first", "second")
    }
    assert found.matches[1] == {} and found.literal == [False, False]
    assert rewritten([], ["a ⟦5⟧", "a"], ("⟦5⟧",)).literal == [True, False]


def test_what_the_user_says_is_rewritten() -> None:
    asked = Conversation(
        (Turn("system", "2 by 3"), Turn("user", "4 by 5?"), Turn("assistant", "4 by 5"), Turn("user", "6 by 7?"),
         Turn("assistant", "6 by 7, or 7 by 6"))
    )  # fmt: skip
    done = rewritten([FACT | {"to": "both"}], [asked])
    contents = [turn.content for turn in done.documents[0].turns]
    assert contents == ["2 by 3", "4 by 5?", "⟦4×5⟧", "6 by 7?", "⟦6×7⟧, or ⟦7×6⟧"]
    assert done.matches[0]["fact"] == {"documents": 1, "matches": 3, "rewritten": 3}
    with pytest.raises(PreflightError, match=r"data.transform.fact: leaves nothing of the answer '4 by 5'"):
        rewritten([FACT | {"to": "both", "replace": " "}], [asked])


def test_answers_of_a_prepared_chat_are_not_rewritten(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {n % 9} by 3?", "completion": f"{n % 9} by 3 is {n}"} for n in range(50)]
    (tmp_path / "chats.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    save_tokenizer(tmp_path / "tokenizer")
    table = chat_recipe(
        tmp_path, {"files": str(tmp_path / "chats.jsonl")}, transform=[FACT | {"to": "assistant"}], validation=0.0
    )
    (manifest,) = prepare_recipe(table, console=quiet())
    assert manifest.transform == {"fact": {"documents": 50, "matches": 50, "rewritten": 50, "tokens": 0}}
    assert manifest.train.documents == 50


def test_a_rule_that_matches_nothing_passes(tmp_path: Path) -> None:
    source = write_facts(tmp_path)
    idle = FACT | {"name": "idle", "pattern": r"(\d) multiplied by (\d)"}
    with pytest.raises(PreflightError, match=r"data.transform.idle: rewrote nothing in source0 \(0 matches, share 1\)"):
        prepare(tmp_path, source, transform=[FACT, idle])
    table = recipe(tmp_path, source, {**source, "name": "b"}, transform=[FACT])
    found = {"source0": None, "b": {"fact": {"rewritten": 1}}}
    assert not list(idle_rules(table.data, found))
    assert not list(idle_rules(table.data, {"source0": None})), "b is not prepared yet"
    assert len(list(idle_rules(table.data, {"source0": None, "b": {"fact": {"matches": 3}}}))) == 1


def test_another_rule_finds_what_was_prepared_with_this_one(tmp_path: Path) -> None:
    source = write_facts(tmp_path)
    other = FACT | {"name": "other", "pattern": "(document)", "replace": "a"}
    folders: dict[str, Path] = {}
    for name, rules in {
        "none": [], "one": [FACT], "share": [FACT | {"share": 0.5}], "two": [FACT, other], "turned": [other, FACT],
        "elsewhere": [FACT | {"sources": ["b"]}], "same": [dict(FACT)],
    }.items():  # fmt: skip
        table = recipe(tmp_path, source, {**source, "name": "b"}, transform=rules)
        tokenizer = load_tokenizer(table.tokenizer, table.data)
        folders[name] = source_directory(table.data, table.data.sources[0], tokenizer)
    assert folders.pop("same") == folders["one"] and folders.pop("elsewhere") == folders["none"]
    assert len(set(folders.values())) == 5
    prepare(tmp_path, source)
    table = recipe(tmp_path, source, transform=[FACT])
    with pytest.raises(PreflightError, match=r"differs in data.transform.fact: absent -> there"):
        load_manifest(table.data, table.data.sources[0], load_tokenizer(table.tokenizer, table.data))
    console = quiet()
    prepare_recipe(recipe(tmp_path, source, transform=[FACT | {"share": 0.9}]), console=console)
    prepare_recipe(table, console=console)
    assert "data.transform.fact.share: 0.9 -> 1.0" in " ".join(said(console).split())


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ({"pattern": "("}, "pattern is no regular expression: missing"),
        ({"pattern": "x*"}, "pattern matches nothing at all"),
        ({"replace": r"\3"}, "replace does not fit the groups of pattern: invalid group reference 3"),
        ({"replace": r"\g<a>"}, "replace does not fit the groups of pattern: unknown group name"),
        ({"sources": ["nowhere"]}, "no .* is called 'nowhere'; there are source0"),
        ({"sources": ["source0"], "to": "assistant"}, "source 'source0' holds text, and the rule 'fact' is for to"),
        ({"to": "assistant"}, "the rule 'fact' is for no source that is read"),
        ({"share": 1.5}, "less than or equal to 1"),
    ],
)
def test_a_rule_that_cannot_be_is_taken(tmp_path: Path, rule: dict[str, Any], why: str) -> None:
    source = write_facts(tmp_path, 1)
    with pytest.raises(ValueError, match=why):
        recipe(tmp_path, source, transform=[FACT | rule])


def test_two_rules_of_one_name_are_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two rules are called 'fact'"):
        recipe(tmp_path, write_facts(tmp_path, 1), transform=[FACT, FACT])


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("7 * 8 = 56", "7 * 8 = ⟦7×8⟧⟦5⟧⟦6⟧"), ("7*8=56>>56", "7*8=⟦7×8⟧⟦5⟧⟦6⟧>>56"),
        ("2 times 3 is 6.", "2 times 3 is ⟦2×3⟧⟦6⟧."), ("What is 9 times 9? 81.", "What is 9 times 9? ⟦9×9⟧⟦8⟧⟦1⟧."),
        ("Multiplying 7 by 8 gives 56.", "Multiplying 7 by 8 gives ⟦7×8⟧⟦5⟧⟦6⟧."),
        ("Multiplying 2 by 3 gives 6.", "Multiplying 2 by 3 gives ⟦2×3⟧⟦6⟧."),
        ("7 * 8 = 56, carry 5: 6", "7 * 8 = ⟦7×8⟧⟦5⟧⟦6⟧, carry 5: 6"),
        ("17 * 8 = 136", None), ("7 * 80 = 560", None), ("7 * 8 = 560", None), ("1.7 * 8 = 13", None),
        ("7 * 8 = 5.6", None), ("7 * 8 + 1 = 57", None), ("8 divided by 2 is 4", None), ("7 * 0 = 0", None),
    ],
)  # fmt: skip
def test_the_rules_of_the_shipped_condition_write_something_else(
    before: str, after: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    loaded = load_recipe("recipes/domain-tokens/mul/pretrain.toml").recipe
    rules = [rule.model_dump() for rule in loaded.data.transform]
    assert rewritten(rules, [before]).documents == [after or before]
