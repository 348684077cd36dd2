"""Generated arithmetic: sums, differences and products in several phrasings, a handful a document, or as conversations
of one question and its answer.

A document is a pure function of (seed, number): its random choices are the bytes of a SHAKE-128 hash of the two, so
they are the same on every machine and every version of Python, and any worker can write any document. The trap this
avoids: `random.Random` promises the same stream for `random()` only, not for `randrange` or `choice`.

With `held_out`, a hash of the two operands says of every pair whether documents may contain it; where they would, the
line is drawn again. So a model can be asked sums that it has certainly not read (`held_out_questions`). The same is
done with `without_probes`, where a document or one of its steps would say what the task arithmetic_probes asks. The
products of `kind = "table"` are the other case: to be known by heart.
"""

import hashlib
import re
from collections.abc import Iterator

from cheaptrain.chat.conversation import Conversation, exchange
from cheaptrain.data.sources import Document, Plan, Unit, make_unit
from cheaptrain.data.sources.probes import unseen
from cheaptrain.data.sources.steps import is_a_step, written_out
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe import schema

RESULT = "#### "  # begins the last line of an answer with steps
_LINES = 8
_LINE_BYTES = 24
_DOCUMENT_BYTES, _CONVERSATION_BYTES = 200, 60  # about
_OPERANDS = re.compile(r"(\d+) ([+*-]) (\d+)")
_DRAWS = 1000  # of a line before there can be no pair that is allowed

_OPERATIONS = {
    "+": ("plus", "What is {a} plus {b}?", "Adding {b} to {a} gives {c}."),
    "-": ("minus", "What is {a} minus {b}?", "Taking {b} from {a} leaves {c}."),
    "*": ("times", "What is {a} times {b}?", "Multiplying {a} by {b} gives {c}."),
}
_QUESTIONS = ("What is {a} {word} {b}?", "{a} {sign} {b} = ?", "How much is {a} {word} {b}?", "Compute {a} {sign} {b}.")


def plan(source: schema.Source, unit_bytes: int) -> Plan:
    """Units of consecutive documents."""
    assert source.drills is not None
    drills = source.drills
    document_bytes = _DOCUMENT_BYTES if source.format == "text" else _CONVERSATION_BYTES
    each = max(1, unit_bytes // document_bytes)
    total = drills.documents
    units: list[Unit] = []
    # Keys that came later decide only where they are set: what was prepared before them is still right.
    later: dict[str, object] = {"held_out": drills.held_out} if drills.held_out else {}
    if drills.operations != list(_OPERATIONS):
        later["operations"] = drills.operations
    if drills.kind != "arithmetic":
        later["kind"] = drills.kind
    if drills.without_probes:
        later["without_probes"] = True
    if source.format == "chat":
        later |= {"format": "chat", "steps": drills.steps}
    for start in range(0, total, each):
        piece = {"start": start, "stop": min(start + each, total)}
        label = f"documents {piece['start']:,} to {piece['stop'] - 1:,}"
        expected = (piece["stop"] - start) * document_bytes
        decides = {"digits": drills.digits, "seed": drills.seed, "version": 1} | later
        units.append(make_unit(len(units), label, [], [piece], expected, **decides))
    return Plan(tuple(units))


def documents(source: schema.Source, unit: Unit) -> Iterator[Document]:
    """The documents of a unit. Raises PreflightError when `held_out` leaves no pair of operands."""
    assert source.drills is not None
    for piece in unit.pieces:
        for number in range(piece["start"], piece["stop"]):
            yield question(source.drills, number) if source.format == "chat" else drill(source.drills, number)


def drill(drills: schema.Drills, number: int) -> str:
    """Document `number`: 8 lines of arithmetic on operands of 1 to `digits` digits."""
    words = _random(f"cheaptrain drill {drills.seed} {number}", _LINES)
    lines = (words[start : start + _LINE_BYTES] for start in range(0, len(words), _LINE_BYTES))
    return "\n".join(_line(*_allowed(line, drills, f"{number} line {n}")) for n, line in enumerate(lines))


def question(drills: schema.Drills, number: int) -> Conversation:
    """Conversation `number`: a question, and the answer or, with `steps`, the steps to it and a last line `#### 42`."""
    first = _random(f"cheaptrain question {drills.seed} {number}", 1)
    random, (sign, a, b, c) = _allowed(first, drills, f"question {number}")
    answer = "\n".join([*written_out(sign, a, b), f"{RESULT}{c}"]) if drills.steps else str(c)
    return exchange(_asked(random, sign, a, b), answer)


def held_out_questions(drills: schema.Drills, count: int) -> list[tuple[str, int]]:
    """At most `count` different questions on pairs of operands that no drill contains, not even as one of its steps,
    each with its answer.

    The same for the same drills; fewer where there are not so many pairs. Raises RecipeError without `held_out`, and
    when there is no such pair.
    """
    if not drills.held_out:
        raise RecipeError("drills.held_out is 0: there are no sums that the drills surely do not contain")
    found: dict[tuple[str, int, int], tuple[str, int]] = {}
    number = last = 0
    while len(found) < count and number - last < _DRAWS / drills.held_out:
        number += 1
        random = _random(f"cheaptrain held out {drills.seed} {number}", 1)
        sign, a, b, c = _exercise(random, drills)
        written = drills.steps and is_a_step(sign, a, b, digits=drills.digits, operations=drills.operations)
        if _is_held_out(drills, a, b) and not written and (sign, a, b) not in found:
            found[sign, a, b], last = (_asked(random, sign, a, b), c), number
    if not found:
        raise RecipeError(
            f"drills.held_out = {drills.held_out} holds out no pair of operands of {drills.digits} digits that could "
            "be asked; raise it, or drills.digits"
        )
    return list(found.values())


def _allowed(random: bytes, drills: schema.Drills, what: str) -> tuple[bytes, tuple[str, int, int, int]]:
    """The random bytes of an exercise that documents may contain, and the exercise: these, or the next that do."""
    for draw in range(1, _DRAWS):
        exercise = _exercise(random, drills)
        if not _is_held_out(drills, exercise[1], exercise[2]) and not _says_a_probe(drills, *exercise[:3]):
            return random, exercise
        random = _random(f"cheaptrain drill {drills.seed} {what} again {draw}", 1)
    raise PreflightError(
        f"drills.held_out = {drills.held_out} leaves no pair of operands of {drills.digits} digits; lower it, or raise "
        "drills.digits"
    )


def _says_a_probe(drills: schema.Drills, sign: str, a: int, b: int) -> bool:
    """Whether the exercise, or a line of its steps, is one that `without_probes` leaves out."""
    if not drills.without_probes:
        return False
    said = [(sign, a, b)]
    for line in written_out(sign, a, b) if drills.steps else ():
        said += [(operation, int(x), int(y)) for x, operation, y in _OPERANDS.findall(line)]
    return not unseen().isdisjoint(said)


def _is_held_out(drills: schema.Drills, a: int, b: int) -> bool:
    if not drills.held_out:
        return False
    pair = f"cheaptrain pair {drills.seed} {min(a, b)} {max(a, b)}"
    digest = hashlib.blake2b(pair.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < int(drills.held_out * 2**64)


def _exercise(random: bytes, drills: schema.Drills) -> tuple[str, int, int, int]:
    """(operation, operands, result) from 24 random bytes."""
    if drills.kind == "table":
        a, b = (1 + int.from_bytes(part, "little") % 9 for part in (random[4:14], random[14:24]))
        return "*", a, b, a * b
    sign = drills.operations[random[0] % len(drills.operations)]
    a = int.from_bytes(random[4:14], "little") % 10 ** (random[2] % drills.digits + 1)
    b = int.from_bytes(random[14:24], "little") % 10 ** (random[3] % drills.digits + 1)
    if sign == "-" and b > a:
        a, b = b, a
    return sign, a, b, {"+": a + b, "-": a - b, "*": a * b}[sign]


def _line(random: bytes, exercise: tuple[str, int, int, int]) -> str:
    """An exercise as a line of text."""
    sign, a, b, c = exercise
    word, asked, sentence = _OPERATIONS[sign]
    phrasing = random[1] % 4
    if phrasing == 0:
        return f"{a} {sign} {b} = {c}"
    if phrasing == 1:
        return f"{a} {word} {b} is {c}."
    return f"{asked.format(a=a, b=b)} {c}." if phrasing == 2 else sentence.format(a=a, b=b, c=c)


def _asked(random: bytes, sign: str, a: int, b: int) -> str:
    return _QUESTIONS[random[1] % 4].format(a=a, b=b, sign=sign, word=_OPERATIONS[sign][0])


def _random(of: str, lines: int) -> bytes:
    return hashlib.shake_128(of.encode()).digest(lines * _LINE_BYTES)
