"""What one step consisted of, counted from the batches and summed over processes as one short vector."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cheaptrain.data.rows import RowBatch


@dataclass(frozen=True)
class StepCounts:
    """Of the whole global batch."""

    rows: int
    tokens: int
    supervised: int
    normaliser: int  # what the loss is divided by: supervised tokens, or examples where each weighs the same
    source_rows: tuple[int, ...]  # in the order of the sources


def counts_vector(batches: Sequence[RowBatch], sources: int, *, shared: bool = False) -> Tensor:
    """int64 `[2 + sources]` of one process: supervised tokens, normaliser, then the rows of each source.

    `shared`: another process counts these rows, and the examples in them; the tokens are this one's stretch of each.
    """
    counts = torch.zeros(2 + sources, dtype=torch.int64)
    for batch in batches:
        counts[0] += batch.supervised
        if not (shared and batch.examples is not None):
            counts[1] += batch.normaliser
        if not shared:
            counts[2:] += torch.bincount(torch.from_numpy(batch.sources), minlength=sources)
    return counts


def counts_from(vector: Tensor, seq_len: int) -> StepCounts:
    """The counts of a vector that was summed over processes."""
    supervised, normaliser, *source_rows = vector.tolist()
    rows = sum(source_rows)
    return StepCounts(rows, rows * seq_len, supervised, normaliser, tuple(source_rows))
