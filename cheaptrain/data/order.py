"""Which row comes when: a pure function of the seed, the mixture and the position.

Nothing is shuffled in memory and nothing is remembered: the row at any position is computed from the position, so a
run resumes anywhere, on any number of processes, and reads exactly what was left. Two functions do it. A tree of splits
sends each position to a source, sharing every prefix of the run out by the weights to within ceil(log2(sources)) rows.
A keyed permutation of the source's rows, another one every epoch, says which of them it is. The trap: floating point.
One rounding that falls differently on another machine moves every later row, so all of it is integer arithmetic. The
idea and the proof of the bound: docs/data-order.md.
"""

import hashlib
import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from cheaptrain.errors import PreflightError

Int64 = NDArray[np.int64]
UInt64 = NDArray[np.uint64]

MAX_POSITION = 2**43  # rows; the arithmetic below stays inside 64 bits up to here

_SHARE_BITS = 40
_SHARE_ONE = 1 << _SHARE_BITS
_PHASE_EDGE = 1 << 25
_FEISTEL_ROUNDS = 6


class MixtureOrder:
    """The order of the rows of several sources.

    `weights`: source name -> share of the rows (any scale, 0: never drawn). `rows`: source name -> rows it has. The
    sequence of rows within a source depends on the seed, its name and its number of rows alone, not on the mixture it
    is in, and the order in which the sources are listed changes nothing but their indices. Raises PreflightError when a
    source with a weight has no row.
    """

    def __init__(self, seed: int, weights: Mapping[str, float], rows: Mapping[str, int]) -> None:
        self.names = tuple(weights)
        _check(weights, rows)
        self.rows = tuple(int(rows[name]) for name in self.names)
        # The tree is a heap, node n having the children 2n and 2n + 1; the leaves, its last level, are sorted by name.
        drawn = sorted(name for name in self.names if weights[name] > 0)
        self._depth = (len(drawn) - 1).bit_length()
        size = 1 << self._depth
        self._share = [0] * size
        self._phase = [0] * size
        self._source_of_leaf = [-1] * size
        self._plant(1, drawn, {name: Fraction(weights[name]) for name in drawn}, seed)

        self._shares = np.array(self._share, np.uint64)
        self._phases = np.array(self._phase, np.uint64)
        self._sources = np.array(self._source_of_leaf, np.int64)
        self._size = np.array(self.rows, np.uint64)  # [sources]
        # Rows as a grid of width x height >= rows cells, as square as can be: the two halves of the Feistel network.
        widths = [math.isqrt(max(count - 1, 0)) + 1 for count in self.rows]
        heights = [-(-count // width) for count, width in zip(self.rows, widths, strict=True)]
        self._width = np.array(widths, np.uint64)
        self._height = np.array(heights, np.uint64)
        self._key = np.array([key_of(seed, "rows", name) for name in self.names], np.uint64)

    def _plant(self, node: int, names: list[str], weights: Mapping[str, Fraction], seed: int) -> None:
        """Fill the subtree under `node` with the leaves `names`. A half left empty has share 0."""
        if node >= len(self._share):
            self._source_of_leaf[node - len(self._share)] = self.names.index(names[0])
            return
        left, right = names[: len(names) // 2], names[len(names) // 2 :]
        if left:
            total = sum(weights[name] for name in names)
            share = round(sum(weights[name] for name in left) * _SHARE_ONE / total)
            self._share[node] = min(max(share, 1), _SHARE_ONE - 1)
            phase = key_of(seed, "split", str(node)) >> (64 - _SHARE_BITS)
            # Away from both ends: shares that are counts out of n then give exactly those counts after n positions,
            # and after 2n, as long as the rounding of a share adds up to less than the distance, which is 2^26 rows.
            self._phase[node] = min(max(phase, _PHASE_EDGE), _SHARE_ONE - _PHASE_EDGE)
            self._plant(2 * node, left, weights, seed)
        self._plant(2 * node + 1, right, weights, seed)

    def locate(self, positions: Int64) -> tuple[Int64, Int64, Int64]:
        """Positions int64 [n] -> (source index, row of that source, epoch of that source), each int64 [n]."""
        if len(positions) and (positions.min() < 0 or positions.max() >= MAX_POSITION):
            raise ValueError(f"positions lie in [0, 2^43); got [{positions.min()}, {positions.max()}]")
        sources, draws = self._split(positions)
        size = self._size[sources]
        epoch = draws // size
        row = self._permute(sources, draws - epoch * size, epoch)
        return sources, row.astype(np.int64), epoch.astype(np.int64)

    def counts(self, position: int) -> Int64:
        """Rows of each source among the first `position` rows, exactly: int64 [sources]."""
        reached = [0] * (2 * len(self._share))
        reached[1] = position
        for node in range(1, len(self._share)):
            left = (self._share[node] * reached[node] + self._phase[node]) >> _SHARE_BITS
            reached[2 * node], reached[2 * node + 1] = left, reached[node] - left
        counts = np.zeros(len(self.names), np.int64)
        for leaf, source in enumerate(self._source_of_leaf):
            if source >= 0:
                counts[source] = reached[len(self._share) + leaf]
        return counts

    def _split(self, positions: Int64) -> tuple[Int64, UInt64]:
        """Positions [n] -> (source index, how often that source was drawn before), each [n].

        Of the first i positions to reach a node, floor((share * i + phase) / 2^40) go left. Element i itself goes left
        when that number grows from i to i + 1, which is when the remainder of the division and the share reach 2^40.
        """
        index = positions.astype(np.uint64)
        node = np.ones(len(positions), np.int64)
        low_bits = np.uint64((1 << 20) - 1)
        remainder_bits = np.uint64(_SHARE_ONE - 1)
        for _ in range(self._depth):
            share = self._shares[node]
            # share * i needs 83 bits: multiply the upper bits (share < 2^40, i >> 20 < 2^23) and the lower 20 apart.
            upper = share * (index >> np.uint64(20))
            rest = ((upper & low_bits) << np.uint64(20)) + share * (index & low_bits) + self._phases[node]
            to_left = (upper >> np.uint64(20)) + (rest >> np.uint64(_SHARE_BITS))
            goes_left = ((rest & remainder_bits) + share) >> np.uint64(_SHARE_BITS)  # 0 or 1
            index = np.where(goes_left, to_left, index - to_left)
            node = 2 * node + 1 - goes_left.astype(np.int64)
        return self._sources[node - (1 << self._depth)], index

    def _permute(self, sources: Int64, index: UInt64, epoch: UInt64) -> UInt64:
        """Index [n] within an epoch -> row [n]: a bijection of [0, rows) for each source and epoch.

        A Feistel network over a grid just larger than the rows: each round shifts one coordinate, modulo its side, by a
        hash of the other, which can be undone. A cell beyond the rows is sent through again until it lands inside: the
        rows then still map one to one, because every cell lies on a cycle and outside cells are only skipped on it.
        """
        key = mixed(self._key[sources] + epoch * np.uint64(0x9E3779B97F4A7C15))
        size, width, height = self._size[sources], self._width[sources], self._height[sources]
        row = _shuffle_cells(index, width, height, key)
        (outside,) = np.nonzero(row >= size)
        while len(outside):
            again = _shuffle_cells(row[outside], width[outside], height[outside], key[outside])
            row[outside] = again
            outside = outside[again >= size[outside]]
        return row


def _shuffle_cells(cell: UInt64, width: UInt64, height: UInt64, key: UInt64) -> UInt64:
    """A keyed bijection of the cells [0, width * height) of a grid; all arguments [n]."""
    y = cell // width
    x = cell - y * width
    for turn in range(_FEISTEL_ROUNDS):
        x = _shifted(x, y, width, key + np.uint64(turn))
        x, y, width, height = y, x, height, width
    # An even number of turns: x and y are back in their places.
    return y * width + x


def _shifted(x: UInt64, y: UInt64, side: UInt64, key: UInt64) -> UInt64:
    """x moved along its side by a hash of y and the key, modulo the side; all arguments [n], side < 2^32."""
    half = np.uint64(32)
    shift = ((mixed(key ^ (y << half)) >> half) * side) >> half  # in [0, side), without a division
    moved = x + shift
    return np.where(moved >= side, moved - side, moved)


def mixed(value: UInt64) -> UInt64:
    """The finaliser of splitmix64: every bit of the input reaches every bit of the output. [n] -> [n]"""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def key_of(seed: int, purpose: str, name: str) -> int:
    """64 bits that depend on all three and on nothing else (Python's own hash differs between processes)."""
    digest = hashlib.blake2b(f"cheaptrain order 1\0{seed}\0{purpose}\0{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _check(weights: Mapping[str, float], rows: Mapping[str, int]) -> None:
    """Refuse weights that are no shares, and sources that cannot give what their weight asks."""
    for name, weight in weights.items():
        if not 0 <= weight < float("inf"):
            raise ValueError(f"source {name!r}: a weight is a number of at least 0, not {weight}")
    if not any(weights.values()):
        raise ValueError("no source has a weight above 0")
    if set(weights) != set(rows):
        raise ValueError(f"weights are given for {sorted(weights)}, rows for {sorted(rows)}")
    for name, weight in weights.items():
        if weight > 0 and rows[name] < 1:
            raise PreflightError(
                f"source {name!r} has weight {weight:g} but its training tokens do not fill one row; "
                "give it more text, shorten data.seq_len, or set its weight to 0"
            )
        if not 0 <= rows[name] < MAX_POSITION:
            raise ValueError(f"source {name!r}: rows lie in [0, 2^43); got {rows[name]}")
