"""281 exercises: the 81 products of the table, 100 longer products, 100 sums; as text to complete and as questions.

A model answers with a number, however its tokens spell it: what it wrote is first read as plain text, so `56` and the
domain tokens `⟦7×8⟧⟦5⟧⟦6⟧` are the same answer, and models with and without them are asked the same question. The trap
is giving credit for what was not said: in a completion the first number counts, since what follows it may be the next
exercise; in a chat the one after `####`, or the last, which the steps before it lead to.
"""

import re
from typing import Any

from datasets import Dataset

from cheaptrain.data.domain import plainly
from cheaptrain.data.sources import probes

_WORDS = {"*": "times", "+": "plus"}
_NUMBER = re.compile(r"-?\d[\d,]*")


def table(**_: Any) -> dict[str, Dataset]:
    """The 81 products of the table of 1 to 9."""
    return _exercises("*", probes.table())


def products(**_: Any) -> dict[str, Dataset]:
    """100 products of two digits times one and two."""
    return _exercises("*", probes.products())


def sums(**_: Any) -> dict[str, Dataset]:
    """100 sums of two and of three digits."""
    return _exercises("+", probes.sums())


def marked(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether a completion begins with the result."""
    found = _NUMBER.search(plainly(results[0]))
    return {"exact_match": float(found is not None and _value(found[0]) == doc["result"])}


def marked_chat(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether an answer ends with the result, or says it after `####`."""
    text = plainly(results[0])
    after = text.rpartition("####")[2] if "####" in text else None
    found = _NUMBER.findall(text if after is None else after)
    said = found[-1 if after is None else 0] if found else None
    return {"exact_match": float(said is not None and _value(said) == doc["result"])}


def _exercises(sign: str, pairs: tuple[probes.Pair, ...]) -> dict[str, Dataset]:
    rows = [
        {
            "text": f"{a} {sign} {b} =",
            "question": f"What is {a} {_WORDS[sign]} {b}?",
            "result": a * b if sign == "*" else a + b,
        }
        for a, b in pairs
    ]
    return {"test": Dataset.from_list(rows)}


def _value(number: str) -> int:
    return int(number.replace(",", ""))
