"""Which documents share a row: best fit, the longest first.

A conversation must not be cut, so rows are filled with whole ones, and what stays free at the end of a row is padding
that costs as much as tokens. Taking documents longest first and putting each into the fullest row that still has room
leaves little of it: most conversations are far shorter than a row, and the short ones fill what the long ones left.

Documents of one length are all alike to this, so it goes length by length and moves whole groups of rows at once: a
million conversations take about a second, not hours. Which document of a length goes where is decided by a hash of
the seed and of its number. The trap: numpy's and Python's own shuffles may give another order in their next version,
and every row of a run that goes on would then be another.
"""

from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from cheaptrain.data.order import key_of, mixed
from cheaptrain.data.stream import Int64
from cheaptrain.errors import PreflightError

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, eq=False)
class Packing:
    """`documents` int64 [documents]: all of them, row after row. `starts` int64 [rows + 1]: where the documents of each
    row begin in it. `seq_len`: positions of a row."""

    documents: Int64
    starts: Int64
    seq_len: int

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def of_row(self, row: int) -> list[int]:
        """The documents of a row, in their order; none of a row beyond the last."""
        if not 0 <= row < self.rows:
            return []
        return self.documents[self.starts[row] : self.starts[row + 1]].tolist()  # type: ignore[no-any-return]


def pack(lengths: Int64, seq_len: int, seed: int = 0) -> Packing:
    """Put documents of these lengths [documents], in tokens, into rows of `seq_len` positions.

    A document of L tokens takes L - 1 positions: its last token is a target only. The number of rows depends on the
    lengths alone, the seed deals out documents of one length. Raises PreflightError for a document that has no
    position or does not fit a row.
    """
    positions = np.asarray(lengths, np.int64) - 1
    _refuse(positions, seq_len)
    number = np.arange(len(positions), dtype=np.uint64)
    dealt = mixed(number * _GOLDEN + np.uint64(key_of(seed, "packing", "documents")))
    order = np.lexsort((dealt, -positions))  # the longest first
    row_of = _best_fit(positions[order], seq_len)
    by_row = np.argsort(row_of, kind="stable")
    held = np.bincount(row_of) if len(row_of) else np.empty(0, np.int64)
    return Packing(order[by_row], np.concatenate(([0], np.cumsum(held, dtype=np.int64))), seq_len)


def _best_fit(sizes: Int64, seq_len: int) -> Int64:
    """The row of each item, int64 [items]; `sizes` [items] fall, are at least 1 and at most `seq_len`.

    Best fit takes the row with the least room that is enough. For equal items that is the same row again until it has
    no room for another: before that, it has less than it had, and so less than any other row with enough. So rows of
    equal room take as many items each as go in, and end with equal room again.
    """
    row_of = np.empty(len(sizes), np.int64)
    groups, rows = _Groups(), 0
    edges = [0, *(np.flatnonzero(np.diff(sizes)) + 1).tolist(), len(sizes)]
    for start, stop in pairwise(edges):
        while start < stop:
            size = int(sizes[start])
            room = groups.least_room(size)
            each = (room or seq_len) // size
            wanted = -(-(stop - start) // each)
            if room is None:
                room, filled = seq_len, np.arange(rows, rows + wanted)
                rows += wanted
            else:
                filled = groups.take(room, wanted)
            count = min(stop - start, each * len(filled))
            row_of[start : start + count] = np.repeat(filled, each)[:count]
            start += count
            last = each * len(filled) - count  # items that the last row could still have taken
            groups.add(room - each * size, filled[:-1] if last else filled)
            if last:
                groups.add(room - (each - last) * size, filled[-1:])
    return row_of


class _Groups:
    """Rows with room left, those of equal room together."""

    def __init__(self) -> None:
        self._rooms: list[int] = []  # that some row has, ascending
        self._rows: dict[int, list[Int64]] = {}

    def least_room(self, size: int) -> int | None:
        """The least room of a row that is at least `size`."""
        at = bisect_left(self._rooms, size)
        return self._rooms[at] if at < len(self._rooms) else None

    def add(self, room: int, rows: Int64) -> None:
        """Rows [n] that have `room` now; full ones are done with."""
        if room == 0 or len(rows) == 0:
            return
        if room not in self._rows:
            insort(self._rooms, room)
            self._rows[room] = []
        self._rows[room].append(rows)

    def take(self, room: int, most: int) -> Int64:
        """Up to `most` of the rows that have `room`, int64 [n]; the last ones added first."""
        held, taken = self._rows[room], list[Int64]()
        while held and most > 0:
            rows = held.pop()
            if len(rows) > most:
                held.append(rows[:-most])
                rows = rows[-most:]
            taken.append(rows)
            most -= len(rows)
        if not held:
            del self._rows[room]
            del self._rooms[bisect_left(self._rooms, room)]
        return np.concatenate(taken)


def _refuse(positions: Int64, seq_len: int) -> None:
    if (bad := np.flatnonzero(positions < 1)).size:
        raise PreflightError(
            f"document {bad[0]:,} has {positions[bad[0]] + 1} token and nothing to learn: run `cheaptrain prepare`"
        )
    if (bad := np.flatnonzero(positions > seq_len)).size:
        raise PreflightError(
            f"{len(bad):,} documents do not fit a row of data.seq_len = {seq_len:,} positions, document {bad[0]:,} of "
            f"{positions[bad[0]] + 1:,} tokens for one; run `cheaptrain prepare` again with this data.seq_len"
        )
