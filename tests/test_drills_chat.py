"""A model is asked sums it may have read, or learns steps that do not lead to the result."""

import re
from pathlib import Path
from typing import Any

import pytest
from chat_helpers import chat_recipe
from prepare_helpers import quiet

from cheaptrain.data.files import InputHashes
from cheaptrain.data.open import open_documents
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.sources import plan_source, read_documents, source_spec
from cheaptrain.data.sources.drills import drill, held_out_questions, question
from cheaptrain.data.sources.questions import about
from cheaptrain.data.sources.steps import written_out
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.schema import Drills, Source

STEP = re.compile(r"^(\d+) ([+*-]) (\d+)(?: ([+-]) (\d+))? = (\d+)(?:, (?:carry|borrow) (\d+))?: (\d+)$")


def pairs(text: str) -> set[tuple[int, int]]:
    """The operands of every line, the smaller one first."""
    found = set()
    for line in text.splitlines():
        a, b = (int(figure) for figure in re.findall(r"\d+", line)[:2])
        found.add((min(a, b), max(a, b)))
    return found


@pytest.mark.parametrize("digits", [1, 2])
def test_held_out_sums_are_in_the_drills(digits: int) -> None:
    drills = Drills(documents=3000, digits=digits, seed=5, held_out=0.1)
    asked = held_out_questions(drills, 200)
    held = set().union(*(pairs(text) for text, _ in asked))
    text = set().union(*(pairs(drill(drills, number)) for number in range(3000)))
    chats = set().union(*(pairs(question(drills, number).turns[0].content) for number in range(3000)))
    steps = drills.model_copy(update={"steps": True})
    assert {question(steps, n).turns[0].content for n in range(50)} == {
        question(drills, n).turns[0].content for n in range(50)
    }
    assert held and not held & text and not held & chats
    every = {(a, b) for b in range(10**digits) for a in range(b + 1)}
    if digits == 1:  # all that are left are read, and all others can be asked
        assert text == every - held and 2 <= len(held) <= 12
    assert len(asked) == len(set(asked)) == (200 if digits == 2 else len(asked))


@pytest.mark.parametrize(("digits", "operations"), [(2, ["+"]), (2, ["+", "*"]), (2, ["-"]), (3, ["+", "-", "*"])])
def test_held_out_sums_stand_in_the_steps_of_others(digits: int, operations: Any) -> None:
    drills = Drills(documents=1, digits=digits, seed=7, held_out=0.1, steps=True, operations=operations)
    stated = set()
    for number in range(3000):
        for line in question(drills, number).turns[1].content.splitlines():
            if found := re.match(r"(\d+) ([+*-]) (\d+) =", line):
                a, sign, b = found.groups()
                stated.add((sign, int(a), int(b)))
                stated.add((sign, int(b), int(a)))
    asked = held_out_questions(drills, 200)
    signs = {"plus": "+", "minus": "-", "times": "*"}
    for text, _ in asked:
        a, sign, b = re.findall(r"(\d+) (\S+) (\d+)", text)[0]
        assert (signs.get(sign, sign), int(a), int(b)) not in stated
    assert len(asked) == 200


def test_nothing_is_held_out_and_asked_all_the_same() -> None:
    with pytest.raises(RecipeError, match="holds out no pair of operands of 1 digits"):
        held_out_questions(Drills(documents=1, digits=1, held_out=0.001, operations=["+"]), 100)


def test_held_out_answers_are_wrong_or_change_from_call_to_call() -> None:
    drills = Drills(documents=1, digits=3, held_out=0.2, operations=["+", "-"])
    asked = held_out_questions(drills, 100)
    assert asked == held_out_questions(drills, 100) and asked[:7] == held_out_questions(drills, 7)
    for text, answer in asked:
        (a, b), minus = (int(figure) for figure in re.findall(r"\d+", text)), "minus" in text or "-" in text
        assert answer == (a - b if minus else a + b)
    with pytest.raises(RecipeError, match="held_out is 0"):
        held_out_questions(Drills(documents=1), 1)


@pytest.mark.parametrize("operation", ["+", "-", "*"])
def test_steps_do_not_lead_to_the_result(operation: str) -> None:
    for a in [*range(130), 999, 1000, 98765]:
        for b in (0, 1, 7, 9, 10, 64, 99, 100, 907):
            if operation == "-" and b > a:
                continue
            lines = written_out(operation, a, b)
            result = {"+": a + b, "-": a - b, "*": a * b}[operation]
            assert int(re.findall(r"\d+", lines[-1])[-1]) == result, lines
            for line in lines:
                if found := STEP.match(line):
                    x, sign, y, more, z, value, over, so_far = found.groups()
                    worked = {"+": int(x) + int(y), "-": int(x) - int(y), "*": int(x) * int(y)}[sign]
                    worked += {None: 0, "+": int(z or 0), "-": -int(z or 0)}[more]
                    assert worked == int(value) and so_far[0] == value[-1]
                    assert sign == "-" or int(over or 0) == worked // 10


def test_chat_drills_do_not_end_in_the_answer(tmp_path: Path) -> None:
    drills = {"documents": 40, "digits": 2, "seed": 3, "steps": True, "held_out": 0.1, "operations": ["+"]}
    recipe = chat_recipe(tmp_path, {"drills": drills}, validation=0.0, unit_bytes=1000)
    (manifest,) = prepare_recipe(recipe, console=quiet())
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    documents = open_documents(manifest, "train")
    assert len(manifest.units) == 3 and len(documents.lengths) == 40
    for number in range(40):
        ids, mask = documents.read(number)
        asked = tokenizer.hf.decode(ids[mask == 0])
        a, b = (int(figure) for figure in re.findall(r"\d+", asked))
        assert tokenizer.hf.decode(ids[mask == 1]).endswith(f"\n#### {a + b}<|im_end|>")


def test_other_drills_have_the_same_identity() -> None:
    def identity(kind: str = "text", **drills: object) -> str:
        source = Source.model_validate(
            {"name": "d", "weight": 1.0, "drills": {"documents": 9} | drills, "format": kind}
        )
        return plan_source(source, 10_000, InputHashes(Path("/nonexistent"))).units[0].identity

    old = "7925c46bd4718cdc"  # of units prepared before there were conversations: they are still right
    kinds = [identity(), identity(held_out=0.1), identity(operations=["+"]), identity("chat")]
    assert len(set(kinds)) == 4 and kinds[0].startswith(old)
    plain = Source.model_validate({"name": "d", "weight": 1.0, "drills": {"documents": 9}})
    assert set(source_spec(plain)["drills"]) == {"kind", "documents", "digits", "seed"}


def test_no_pair_is_left_and_drawing_never_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    from cheaptrain.data.sources import drills as module

    monkeypatch.setattr(module, "_is_held_out", lambda drills, a, b: True)
    with pytest.raises(PreflightError, match="leaves no pair of operands of 1 digits"):
        drill(Drills(documents=1, digits=1, held_out=0.5), 0)


def test_questions_from_docstrings_change_or_ask_for_what_is_not_answered(tmp_path: Path) -> None:
    docstring = "Return the\nshortest path.\n\nMore about it."
    first, second = about("graphs.path(graph, *, weight)", docstring)
    assert "graphs.path" in first.turns[0].content and first.turns[1].content == "Return the shortest path."
    assert "graphs.path" in second.turns[0].content and second.turns[1].content == "graphs.path(graph, *, weight)"
    assert [conversation.turns[1].content for conversation in about("graphs.now()", "The time.")] == ["The time."]
    assert next(about("class graphs.Graph", "A graph.")).turns[1].content == "A graph."
    assert "module graphs" in next(about("module graphs", "All graphs.")).turns[0].content
    source = Source.model_validate({"name": "p", "weight": 1.0, "packages": ["argparse", "json"], "format": "chat"})
    plan = plan_source(source, 1_000_000, InputHashes(tmp_path))
    read = [document for unit in plan.units for document in read_documents(source, unit)]
    assert len(read) > 50 and read == [document for unit in plan.units for document in read_documents(source, unit)]
    wordings = {re.sub(r"[\w.]+\.\w+", "X", c.turns[0].content) for c in read}  # type: ignore[union-attr]
    assert len(wordings) > 6
