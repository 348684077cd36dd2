"""Rows for training: what the model reads at once, with what keeps its documents apart.

Two kinds of sources give rows of one length T = seq_len. Text is a stream: row r is its inputs [r*T, (r+1)*T), with the
targets one token further on, so every token is a target once, and nothing is padded or dropped but a tail shorter than
a row; a document that goes on from the row before starts again at position 0. The trap: the target of a document's last
token (the end of text) is the first token of an unrelated document, which nobody can learn; that label is -100: the
loss leaves it out. Conversations are packed: whole ones end to end, labelled where the model must speak, and padding
in what is left of the row. In both, each document counts its positions from 0 and has its own number, padding too.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cheaptrain.data.align import Aligned
from cheaptrain.data.documents import Documents
from cheaptrain.data.packing import Packing
from cheaptrain.data.stream import Int64, TokenStream

IGNORED = -100  # label of a position without a target; PyTorch's own default


@dataclass(frozen=True, eq=False)
class RowBatch:
    """Rows of a fixed length, as CPU tensors [rows, seq]."""

    input_ids: torch.Tensor  # int64
    labels: torch.Tensor  # int64; the target of each input position (already shifted), -100: none
    position_ids: torch.Tensor  # int64; from 0 in each document
    document_ids: torch.Tensor  # int32; from 0 in each row, never falling
    sources: Int64  # [rows]; index of the source each row came from
    supervised: int  # labels that are not -100
    weights: torch.Tensor | None = None  # fp32; of each supervised position in the loss; None: 1
    examples: int | None = None  # with weights: documents that have a supervised position
    numbers: Int64 | None = None  # [rows]; of each row in the run, if a loader read it
    aligned: Aligned | None = None  # the same text in another tokenizer, for a teacher that has one

    @property
    def normaliser(self) -> int:
        """What this batch adds to the divisor of the loss: what its weights add up to over whole rows."""
        return self.supervised if self.examples is None else self.examples

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch with ids, labels and positions on `device`. document_ids stay where they are: which attention
        kernel runs depends on their values, and reading them on a GPU would stop it."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {name: each.to(device, non_blocking=True) for name, each in self._moving().items()}
        return replace(self, **moved, aligned=None if self.aligned is None else self.aligned.to(device))

    def pinned(self) -> "RowBatch":
        """The same batch with what goes to a GPU in page-locked memory: only from there does a copy not hold up the
        thread that asks for it."""
        aligned = None if self.aligned is None else self.aligned.pinned()
        pinned: dict[str, Any] = {name: each.pin_memory() for name, each in self._moving().items()}
        return replace(self, **pinned, aligned=aligned)

    def _moving(self) -> dict[str, torch.Tensor]:
        tensors = {"input_ids": self.input_ids, "labels": self.labels, "position_ids": self.position_ids}
        return tensors if self.weights is None else tensors | {"weights": self.weights}

    def share(self, rank: int, size: int) -> "RowBatch":
        """The tokens that process `rank` of the `size` that share each row has: one stretch of every row. document_ids
        stay whole, because attention looks at whole rows; so do `examples`, which may lie in several stretches."""
        if size == 1:
            return self
        length = self.input_ids.shape[1] // size
        mine = slice(rank * length, (rank + 1) * length)
        labels = self.labels[:, mine].contiguous()
        return replace(
            self,
            input_ids=self.input_ids[:, mine].contiguous(),
            labels=labels,
            position_ids=self.position_ids[:, mine].contiguous(),
            supervised=int((labels != IGNORED).sum()),
            weights=None if self.weights is None else self.weights[:, mine].contiguous(),
        )


class RowSource(Protocol):
    """Rows [0, rows) of one length. Reading is safe from several threads."""

    @property
    def rows(self) -> int: ...

    @property
    def seq_len(self) -> int: ...

    def fill(self, row: int, ids: Int64, labels: Int64, starts: NDArray[np.bool_]) -> None:
        """Write a row into `ids` and `labels` [seq_len] and mark in `starts` [seq_len], which is False throughout,
        where documents begin. A row beyond the last is padding."""


@dataclass(frozen=True, eq=False)
class StreamRows:
    """Rows of a stream, of which the first `inputs` input positions count (fewer than stream.tokens).

    What lies beyond in the last row is padding: its own document, labels -100. The padding token is the stream's last
    one, an id that the model is sure to know; no real position attends to it, as all of it comes after them. Without
    `document_mask` a row is one piece of text: positions run on, every target counts.
    """

    stream: TokenStream
    seq_len: int
    document_mask: bool
    inputs: int

    @classmethod
    def whole(cls, stream: TokenStream, seq_len: int, document_mask: bool) -> "StreamRows":
        """As many rows as the stream fills: without padding."""
        return cls(stream, seq_len, document_mask, max(0, stream.tokens - 1) // seq_len * seq_len)

    @property
    def rows(self) -> int:
        return -(-self.inputs // self.seq_len)

    def fill(self, row: int, ids: Int64, labels: Int64, starts: NDArray[np.bool_]) -> None:
        """See RowSource."""
        first = row * self.seq_len
        count = min(max(self.inputs - first, 0), self.seq_len)
        if count:
            tokens = self.stream.read(first, first + count + 1)
            ids[:count], labels[:count] = tokens[:-1], tokens[1:]
        if count and self.document_mask:
            begin = self.stream.document_starts(first, first + count + 1)
            labels[begin - 1] = IGNORED
            starts[begin[begin < count]] = True
        if count < self.seq_len:
            ids[count:] = self.stream.read(self.stream.tokens - 1, self.stream.tokens)
            labels[count:] = IGNORED
            starts[count] = self.document_mask


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of whole documents. `assistant_only`: only what the mask says is a target; else every token of a document
    but its first is one. Padding is id 0, which every vocabulary has."""

    documents: Documents
    packing: Packing
    assistant_only: bool

    @property
    def rows(self) -> int:
        return self.packing.rows

    @property
    def seq_len(self) -> int:
        return self.packing.seq_len

    def fill(self, row: int, ids: Int64, labels: Int64, starts: NDArray[np.bool_]) -> None:
        """See RowSource."""
        at = 0
        for document in self.packing.of_row(row):
            tokens, mask = self.documents.read(document)
            stop = at + len(tokens) - 1
            ids[at:stop] = tokens[:-1]
            labels[at:stop] = np.where(mask[1:], tokens[1:], IGNORED) if self.assistant_only else tokens[1:]
            starts[at] = True
            at = stop
        ids[at:], labels[at:] = 0, IGNORED
        starts[at : at + 1] = True


def build_rows(sources: Sequence[RowSource], indices: Int64, rows: Int64, by_example: bool = False) -> RowBatch:
    """Read row `rows[j]` of source `indices[j]` for every j. [n], [n] -> n rows.

    `by_example`: each document weighs the same in the loss, however many of its positions are supervised.
    """
    shape = (len(rows), sources[0].seq_len)
    ids, labels, starts = np.empty(shape, np.int64), np.empty(shape, np.int64), np.zeros(shape, bool)
    for j, (source, row) in enumerate(zip(indices.tolist(), rows.tolist(), strict=True)):
        sources[source].fill(row, ids[j], labels[j], starts[j])
    starts[:, 0] = True
    document_ids = np.cumsum(starts, axis=1, dtype=np.int32) - 1
    # Each position less the start of its document, which is the last marked position up to it.
    position = np.arange(shape[1])
    position_ids = position - np.maximum.accumulate(np.where(starts, position, 0), axis=1)
    supervised = labels != IGNORED
    weights, examples = _by_example(starts, supervised) if by_example else (None, None)
    return RowBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        sources=indices,
        supervised=int(np.count_nonzero(supervised)),
        weights=weights,
        examples=examples,
    )


def _by_example(starts: NDArray[np.bool_], supervised: NDArray[np.bool_]) -> tuple[torch.Tensor, int]:
    """One over the supervised positions of each one's document, [n, T], and how many documents have any."""
    document = np.cumsum(starts.reshape(-1)).reshape(starts.shape) - 1
    held = np.bincount(document[supervised], minlength=1)
    weights = np.zeros(starts.shape, np.float32)
    weights[supervised] = 1 / held[document[supervised]]
    return torch.from_numpy(weights), int(np.count_nonzero(held))
