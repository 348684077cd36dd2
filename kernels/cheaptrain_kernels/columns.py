"""Which columns of the logits a process makes, and what it takes to know a whole row.

The heads' rows may be spread over the processes of a group (`Spread`): what a row of logits needs from all of them is
a handful of numbers, which travel; logits never do. Without a group everything here is the identity.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cheaptrain_kernels.vocab_parallel import vocab_rows


@dataclass(frozen=True)
class Spread:
    """Heads whose rows are spread over a group, as `vocab_rows` says; `rows`: of a whole head, the same of both."""

    group: ProcessGroup
    rows: int


class Columns:
    """The tokens whose logits are made here: all `vocab`, or this process's share of them. `count` of them, from the
    id `first` on; no process has more than `most`."""

    def __init__(self, vocab: int, rows_here: int, spread: Spread | None) -> None:
        self.vocab = vocab
        self.group = spread.group if spread else None
        mine = range(rows_here)
        self.most = vocab
        if spread:
            mine = vocab_rows(spread.rows, spread.group.size(), spread.group.rank())
            self.most = len(vocab_rows(spread.rows, spread.group.size(), 0))
        self.first = mine.start
        self.count = max(0, min(len(mine), vocab - mine.start))

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def largest(self, here: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
        """Of each row's largest logit here and its column, `[chunk]` both: the largest of all, and its id, the lowest
        of several."""
        if self.group is None:
            return here, column
        largest = here.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        ids = (column + self.first).where(here == largest, self.vocab)
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=self.group)
        return largest, ids

    def at(self, target: Tensor, values: Tensor) -> Tensor:
        """The number of `values` `[chunk, columns]` in each target's column, in fp32; 0 where it is not here."""
        if not self.count:
            return torch.zeros_like(target, dtype=torch.float32)
        index, own = self._place(target)
        return values.gather(1, index).float().where(own, 0.0).squeeze(1)

    def less_one_at(self, target: Tensor, probabilities: Tensor) -> None:
        """Take 1 from the target's column of `[chunk, columns]`."""
        if self.count:
            index, own = self._place(target)
            probabilities.scatter_add_(1, index, -own.to(probabilities.dtype))

    def has(self, target: Tensor) -> Tensor:
        """Whether each target's column is here: `[chunk]`."""
        return (target >= self.first) & (target < self.first + self.count)

    def _place(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each target here, and whether it is one; `[chunk, 1]` both."""
        index = (target - self.first).unsqueeze(1)
        own = (index >= 0) & (index < self.count)
        return index.where(own, 0), own
