"""The exercises of `arithmetic_probes`: all 81 products of the table, 100 longer products and 100 sums.

They are the same for every model, so that scores compare, and drills can leave the longer ones out (`without_probes`),
so that a model that was drilled must reckon them. The products of the table are there to be known by heart: drills may
contain them. Drawn, like drills, from a SHAKE-128 hash, which is the same on every machine.
"""

import hashlib
from functools import cache

Pair = tuple[int, int]

_BYTES = 8  # of a draw
_PRODUCTS = (((10, 99), (2, 9)), ((10, 99), (10, 99)))
_SUMS = (((10, 99), (10, 99)), ((100, 999), (100, 999)))
_EACH = 50  # of each of the shapes above


@cache
def table() -> tuple[Pair, ...]:
    """The operands of the 81 products of the table, 1 × 1 first."""
    return tuple((a, b) for a in range(1, 10) for b in range(1, 10))


@cache
def products() -> tuple[Pair, ...]:
    """The operands of 100 products: two digits times one, and two digits times two. No pair twice, in either order."""
    return _drawn("product", _PRODUCTS)


@cache
def sums() -> tuple[Pair, ...]:
    """The operands of 100 sums: of two digits each, and of three. No pair twice, in either order."""
    return _drawn("sum", _SUMS)


@cache
def unseen() -> frozenset[tuple[str, int, int]]:
    """(operation, operands) that drills leave out, in both orders."""
    asked = [("*", *pair) for pair in products()] + [("+", *pair) for pair in sums()]
    return frozenset(asked) | {(sign, b, a) for sign, a, b in asked}


def _drawn(what: str, shapes: tuple[tuple[Pair, Pair], ...]) -> tuple[Pair, ...]:
    found: list[Pair] = []
    for number, shape in enumerate(shapes):
        draw, wanted = 0, _EACH * (number + 1)
        while len(found) < wanted:
            random = hashlib.shake_128(f"cheaptrain probe {what} {number} {draw}".encode()).digest(2 * _BYTES)
            pair = _within(shape[0], random[:_BYTES]), _within(shape[1], random[_BYTES:])
            draw += 1
            if pair not in found and pair[::-1] not in found:
                found.append(pair)
    return tuple(found)


def _within(bounds: Pair, random: bytes) -> int:
    low, high = bounds
    return low + int.from_bytes(random, "little") % (high - low + 1)
