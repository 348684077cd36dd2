"""Generated arithmetic: sums, differences and products in several phrasings, a handful a document.

A document is a pure function of (seed, number): its random choices are the bytes of a SHAKE-128 hash of the two, so
they are the same on every machine and every version of Python, and any worker can write any document. The trap this
avoids: `random.Random` promises the same stream for `random()` only, not for `randrange` or `choice`.
"""

import hashlib
from collections.abc import Iterator

from cheaptrain.data.sources import Plan, Unit, make_unit
from cheaptrain.recipe import schema

_LINES = 8
_DOCUMENT_BYTES = 200  # about

_OPERATIONS = (
    ("+", "plus", "What is {a} plus {b}?", "Adding {b} to {a} gives {c}."),
    ("-", "minus", "What is {a} minus {b}?", "Taking {b} from {a} leaves {c}."),
    ("*", "times", "What is {a} times {b}?", "Multiplying {a} by {b} gives {c}."),
)


def plan(source: schema.Source, unit_bytes: int) -> Plan:
    """Units of consecutive documents."""
    assert source.drills is not None
    each = max(1, unit_bytes // _DOCUMENT_BYTES)
    total = source.drills.documents
    units: list[Unit] = []
    for start in range(0, total, each):
        piece = {"start": start, "stop": min(start + each, total)}
        label = f"documents {piece['start']:,} to {piece['stop'] - 1:,}"
        expected = (piece["stop"] - start) * _DOCUMENT_BYTES
        decides = {"digits": source.drills.digits, "seed": source.drills.seed, "version": 1}
        units.append(make_unit(len(units), label, [], [piece], expected, **decides))
    return Plan(tuple(units))


def documents(source: schema.Source, unit: Unit) -> Iterator[str]:
    """The documents of a unit."""
    assert source.drills is not None
    for piece in unit.pieces:
        for number in range(piece["start"], piece["stop"]):
            yield drill(source.drills.seed, number, source.drills.digits)


def drill(seed: int, number: int, digits: int) -> str:
    """Document `number`: 8 lines of arithmetic on operands of 1 to `digits` digits."""
    words = hashlib.shake_128(f"cheaptrain drill {seed} {number}".encode()).digest(_LINES * 24)
    return "\n".join(_line(words[start : start + 24], digits) for start in range(0, len(words), 24))


def _line(random: bytes, digits: int) -> str:
    """One exercise from 24 random bytes."""
    operation, phrasing, a_digits, b_digits = random[0] % 3, random[1] % 4, random[2] % digits, random[3] % digits
    a = int.from_bytes(random[4:14], "little") % 10 ** (a_digits + 1)
    b = int.from_bytes(random[14:24], "little") % 10 ** (b_digits + 1)
    if operation == 1 and b > a:
        a, b = b, a
    c = (a + b, a - b, a * b)[operation]
    sign, word, question, sentence = _OPERATIONS[operation]
    if phrasing == 0:
        return f"{a} {sign} {b} = {c}"
    if phrasing == 1:
        return f"{a} {word} {b} is {c}."
    return f"{question.format(a=a, b=b)} {c}." if phrasing == 2 else sentence.format(a=a, b=b, c=c)
