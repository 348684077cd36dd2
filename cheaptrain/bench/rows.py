"""The rows of a work: random tokens, the same for every variant.

Each row's last position has no target, because transformers' own loss shifts the labels inside the row and so has none
there; with packed documents no document's last position has one. So all variants learn the very same positions, and
their losses can be held against each other. Lengths of packed documents vary from a fifth of the mean to twice it.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cheaptrain.bench.works import Work
from cheaptrain.data.rows import IGNORED, RowBatch

DISTINCT = 4  # batches that the steps go through in turn


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one micro-batch as CPU tensors `[rows, seq]`. `lengths`: of the documents of each row."""

    input_ids: Tensor
    labels: Tensor  # already shifted, IGNORED where there is none
    position_ids: Tensor
    document_ids: Tensor  # int32
    lengths: list[list[int]]
    supervised: int  # positions with a target; counted once, because counting on a GPU stops it

    def batch(self) -> RowBatch:
        """The same rows for cheaptrain."""
        return RowBatch(
            input_ids=self.input_ids,
            labels=self.labels,
            position_ids=self.position_ids,
            document_ids=self.document_ids,
            sources=np.zeros(len(self.input_ids), np.int64),
            supervised=self.supervised,
        )


def step_rows(work: Work, number: int, micro_rows: int) -> list[Rows]:
    """The micro-batches of one step of `work`: the same rows however many are taken at once."""
    return [_rows(work, number, first, min(micro_rows, work.rows - first)) for first in range(0, work.rows, micro_rows)]


def attended(work: Work) -> float:
    """How long the document of a token is in the mean: the T of the attention term of MFU."""
    if work.documents is None:
        return float(work.seq_len)
    lengths = [n for row in range(work.rows) for n in _lengths(work, 0, row)]
    return sum(n * n for n in lengths) / sum(lengths)


def _rows(work: Work, number: int, first: int, count: int) -> Rows:
    lengths = [_lengths(work, number, row) for row in range(first, first + count)]
    ids = torch.stack([_tokens(work, number, row) for row in range(first, first + count)])
    labels = torch.full_like(ids, IGNORED)
    labels[:, :-1] = ids[:, 1:]
    positions, documents = torch.empty_like(ids), torch.empty(ids.shape, dtype=torch.int32)
    for row, of_row in enumerate(lengths):
        at = 0
        for document, length in enumerate(of_row):
            positions[row, at : at + length] = torch.arange(length)
            documents[row, at : at + length] = document
            at += length
            labels[row, at - 1] = IGNORED
    return Rows(ids, labels, positions, documents, lengths, int((labels != IGNORED).sum()))


def _tokens(work: Work, number: int, row: int) -> Tensor:
    random = np.random.default_rng([number % DISTINCT if not work.loss_steps else number, row])
    if not work.loss_steps:
        return torch.from_numpy(random.integers(0, work.vocab, work.seq_len))
    # Something to learn: three times in four the next token follows from this one, among a thousand that are frequent.
    tokens = random.integers(0, min(1000, work.vocab), work.seq_len)
    follows = random.random(work.seq_len) < 0.75
    for at in range(1, work.seq_len):
        if follows[at]:
            tokens[at] = (tokens[at - 1] * 31 + 7) % min(1000, work.vocab)
    return torch.from_numpy(tokens)


def _lengths(work: Work, number: int, row: int) -> list[int]:
    if work.documents is None:
        return [work.seq_len]
    random = np.random.default_rng([1, number % DISTINCT, row])
    lengths: list[int] = []
    while (left := work.seq_len - sum(lengths)) > 0:
        drawn = int(random.integers(work.documents // 5, 2 * work.documents - work.documents // 5))
        # A rest too short for a document of its own goes to this one.
        lengths.append(left if left - drawn < work.documents // 5 else drawn)
    return lengths
