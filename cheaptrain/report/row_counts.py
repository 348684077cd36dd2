"""What packing does to each source, counted, not estimated: what fills rows, what is left over, what has no target.

All of it follows from where documents start, which the indexes of the shards know, and from the masks of
conversations; no token is read.
"""

from dataclasses import dataclass

import numpy as np

from cheaptrain.data.manifest import Manifest
from cheaptrain.data.rows import PackedRows, StreamRows

_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class PassCounts:
    """One pass over a source in rows of `seq_len`. Everything exact.

    `left_over`: tokens after the last row and its last target, which are never read. `without_target`: positions whose
    label is -100. `rows_of_several`: rows that hold more than one document. `split_documents`: documents that lie in
    more than one row.
    """

    rows: int
    left_over: int
    without_target: int
    rows_of_several: int
    split_documents: int


@dataclass(frozen=True)
class PackedCounts:
    """One pass over packed conversations. Everything exact.

    `positions`: of whole rows; `padding`: of them, those that no conversation fills. `supervised`: positions with a
    target. `rows_of_several`: rows that hold more than one conversation. `without_target`: conversations that have no
    position with a target.
    """

    rows: int
    positions: int
    padding: int
    supervised: int
    rows_of_several: int
    without_target: int


def count_packed(source: PackedRows) -> PackedCounts:
    """Count one pass over packed rows."""
    held = source.documents.lengths - 1
    supervised = source.documents.supervised() if source.assistant_only else held
    positions = source.rows * source.seq_len
    return PackedCounts(
        rows=source.rows,
        positions=positions,
        padding=positions - int(held.sum()),
        supervised=int(supervised.sum()),
        rows_of_several=int((np.diff(source.packing.starts) > 1).sum()),
        without_target=int((supervised == 0).sum()),
    )


def count_pass(source: StreamRows) -> PassCounts:
    """Count one pass over the whole rows of a stream, at least one."""
    stream, seq_len, rows = source.stream, source.seq_len, source.rows
    starts_inside = np.zeros(rows, bool)  # a document starts in the row, after its first token
    starts_at = np.ones(rows, bool)  # a document starts with the row; the first row always begins one
    boundaries = 0
    for first in range(0, rows, _ROWS_AT_ONCE):
        last = min(first + _ROWS_AT_ONCE, rows)
        # Starts up to and including the first token of the next row: that is the target of this row's last position.
        starts = stream.document_starts(first * seq_len, last * seq_len + 1) + first * seq_len
        boundaries += len(starts)
        row, offset = np.divmod(starts, seq_len)
        starts_inside[row[offset > 0]] = True
        starts_at[first + (first == 0) : last] = False
        starts_at[row[(offset == 0) & (row < last)]] = True
        if first and len(stream.document_starts(first * seq_len - 1, first * seq_len + 1)):
            starts_at[first] = True
    cut = ~starts_at  # a document goes on over the row's left edge
    # Over two edges in a row it is the same document, if it fills the row between them.
    same = cut[:-1] & cut[1:] & ~starts_inside[:-1]
    return PassCounts(
        rows=rows,
        left_over=stream.tokens - 1 - rows * seq_len,
        without_target=boundaries if source.document_mask else 0,
        rows_of_several=int(starts_inside.sum()),
        split_documents=int(cut.sum() - same.sum()),
    )


def limit_reached(manifest: Manifest) -> bool:
    """Whether preparing stopped at the source's max_tokens with text left."""
    return any(unit.get("limit") is not None for unit in manifest.units)
