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
    source_rows: tuple[int, ...]  # in the order of the sources


def counts_vector(batches: Sequence[RowBatch], sources: int) -> Tensor:
    """int64 `[1 + sources]` of one process: supervised tokens, then the rows of each source."""
    counts = torch.zeros(1 + sources, dtype=torch.int64)
    for batch in batches:
        counts[0] += batch.supervised
        counts[1:] += torch.bincount(torch.from_numpy(batch.sources), minlength=sources)
    return counts


def counts_from(vector: Tensor, seq_len: int) -> StepCounts:
    """The counts of a vector that was summed over processes."""
    supervised, *source_rows = vector.tolist()
    rows = sum(source_rows)
    return StepCounts(rows, rows * seq_len, supervised, tuple(source_rows))
