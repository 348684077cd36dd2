"""Drills that lack a fact of the table, or give away what the probes ask."""

import hashlib
import re

import pytest

from cheaptrain.data.files import digest
from cheaptrain.data.sources import plan_source, source_spec
from cheaptrain.data.sources.drills import drill, question
from cheaptrain.data.sources.probes import products, sums, table, unseen
from cheaptrain.recipe.schema import Drills, Source

OPERANDS = re.compile(r"(\d+) (?:([+*])|plus|times) (\d+)|Adding (\d+) to (\d+)|Multiplying (\d+) by (\d+)")
WORDS = {"plus": "+", "times": "*"}


def said(text: str) -> set[tuple[str, int, int]]:
    """(operation, operands) of everything a text says."""
    found = set()
    for match in OPERANDS.finditer(text):
        a, b = (int(group) for group in match.groups() if group and group.isdigit())
        sign = match[2] or ("+" if "plus" in match[0] or "Adding" in match[0] else "*")
        found.add((sign, a, b))
    return found


def test_the_probes_are_others_than_they_were() -> None:
    assert len(table()) == 81 and len(products()) == len(sums()) == 100
    assert len({frozenset(pair) for pair in products()}) == len({frozenset(pair) for pair in sums()}) == 100
    assert all(10 <= a < 100 and 2 <= b < 100 for a, b in products())
    assert all(10 <= a < 1000 and 10 <= b < 1000 for a, b in sums())
    text = repr((table(), products(), sums()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "43c45318cc8546ae"


@pytest.mark.parametrize("chat", [False, True])
def test_the_table_of_the_drills_lacks_a_fact_or_has_another(chat: bool) -> None:
    drills = Drills(kind="table", documents=300, seed=4)
    texts = [question(drills, n).text if chat else drill(drills, n) for n in range(1500 if chat else 300)]
    found = set().union(*(re.findall(r"\d+", line)[0:2] and [tuple(map(int, re.findall(r"\d+", line)[:3]))]
                          for text in texts for line in ([text] if chat else text.splitlines())))  # fmt: skip
    assert {(a, b) for a, b, _ in found if (a, b) != (0, 0)} == {*table()}
    assert all(c in (a * b,) for a, b, c in found)


@pytest.mark.parametrize(("digits", "steps"), [(2, False), (2, True), (3, False)])
def test_drills_say_what_the_probes_ask(digits: int, steps: bool) -> None:
    drills = Drills(documents=1, digits=digits, operations=["+", "*"], steps=steps, seed=9)
    honest = drills.model_copy(update={"without_probes": True})
    number = 1500

    def everything(of: Drills) -> set[tuple[str, int, int]]:
        texts = (question(of, n).text if steps else drill(of, n) for n in range(number))
        return set().union(*map(said, texts))

    asked = {("*", *pair) for pair in products()} | {("+", *pair) for pair in sums()}
    assert asked & everything(drills), "these drills would give some of it away"
    assert not unseen() & everything(honest)
    assert {("*", a, b) for a, b in table()} & everything(honest)
    same = sum(drill(drills, n) == drill(honest, n) for n in range(200))
    assert same > 100, "the other drills stay as they are"


def test_keys_that_came_later_make_drills_of_before_be_prepared_anew() -> None:
    source = Source(name="a", weight=1.0, drills=Drills(documents=50))
    assert digest(source_spec(source)) == digest(
        {"drills": {"kind": "arithmetic", "documents": 50, "digits": 2, "seed": 0}, "on_bad_line": "error"}
    )

    def unit(**keys: object) -> str:
        drills = Drills.model_validate({"documents": 50, **keys})
        return plan_source(source.model_copy(update={"drills": drills}), 10**6, None).units[0].identity  # type: ignore[arg-type]

    assert unit() == "17dd1c5f5f0d2476b73acf1c3ab145ab7c01e0334ccf2afbbb3af4bd1003f4e0"
    assert len({unit(), unit(kind="table"), unit(without_probes=True)}) == 3


@pytest.mark.parametrize("keys", [{"digits": 3}, {"held_out": 0.1}, {"operations": ["*"]}, {"without_probes": True}])
def test_a_key_without_a_meaning_for_the_table_is_taken(keys: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f'{next(iter(keys))} goes with kind = "arithmetic", not with "table"'):
        Drills.model_validate({"kind": "table", "documents": 5, **keys})
