"""Rows for training: a stretch of a token stream, with what keeps its documents apart.

Row r of a source is inputs [r*T, (r+1)*T) of its stream, T = seq_len, with the targets one token further on: row r + 1
starts where row r ended, so every token is a target once, and nothing is padded or dropped but a tail shorter than a
row. Documents start anywhere in a row. Inside it each one counts its positions from 0 and has its own number; one
that goes on from the row before starts again at position 0. The trap: the target of a document's last token (the end of
text) is the first token of an unrelated document, which nobody can learn; that label is -100: the loss leaves it out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from cheaptrain.data.stream import TokenStream

Int64 = NDArray[np.int64]

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

    def to(self, device: torch.device) -> "RowBatch":
        """The same batch with ids, labels and positions on `device`. document_ids stay where they are: which attention
        kernel runs depends on their values, and reading them on a GPU would stop it."""
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).to(device, non_blocking=True) for name in ("input_ids", "labels", "position_ids")
        }
        return replace(self, **moved)

    def share(self, rank: int, size: int) -> "RowBatch":
        """The tokens that process `rank` of the `size` that share each row has: one stretch of every row. document_ids
        stay whole, because attention looks at whole rows."""
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
        )


def build_rows(
    streams: Sequence[TokenStream], sources: Int64, rows: Int64, seq_len: int, document_mask: bool
) -> RowBatch:
    """Read row `rows[j]` of stream `sources[j]` for every j. [n], [n] -> n rows of seq_len.

    Without `document_mask` a row is one piece of text: positions run on, document_ids are 0, every target counts.
    """
    tokens = np.empty((len(rows), seq_len + 1), np.int64)
    starts = np.zeros((len(rows), seq_len + 1), bool)
    for j, (source, row) in enumerate(zip(sources.tolist(), rows.tolist(), strict=True)):
        _read_row(streams[source], row * seq_len, tokens[j], starts[j])
    return _assemble(tokens, starts, sources, np.full(len(rows), seq_len), document_mask)


def build_validation_rows(stream: TokenStream, rows: range, seq_len: int, inputs: int, document_mask: bool) -> RowBatch:
    """Rows `rows` of a stream of which only the first `inputs` input positions count (inputs < stream.tokens).

    What lies beyond is padding: its own document, labels -100. The padding token is the stream's last one, an id that
    the model is sure to know; no real position attends to it, as all of it comes after them.
    """
    tokens = np.full((len(rows), seq_len + 1), stream.read(stream.tokens - 1, stream.tokens)[0])
    starts = np.zeros((len(rows), seq_len + 1), bool)
    counted = np.clip(inputs - np.array(rows) * seq_len, 0, seq_len)
    for j, (row, count) in enumerate(zip(rows, counted.tolist(), strict=True)):
        if count:
            _read_row(stream, row * seq_len, tokens[j, : count + 1], starts[j, : count + 1])
    return _assemble(tokens, starts, np.zeros(len(rows), np.int64), counted, document_mask)


def _read_row(stream: TokenStream, start: int, tokens: Int64, starts: NDArray[np.bool_]) -> None:
    """Fill `tokens` [n + 1] from the stream; mark in `starts` [n + 1] where documents begin after the first token."""
    stop = start + len(tokens)
    stream.read(start, stop, out=tokens)
    starts[stream.document_starts(start, stop)] = True


def _assemble(
    tokens: Int64, starts: NDArray[np.bool_], sources: Int64, counted: Int64, document_mask: bool
) -> RowBatch:
    """Tokens and document starts [n, T + 1], counted input positions [n] -> a batch of n rows of T."""
    count, seq_len = tokens.shape[0], tokens.shape[1] - 1
    labels = tokens[:, 1:].copy()
    position = np.arange(seq_len)
    if document_mask:
        labels[starts[:, 1:]] = IGNORED
    (padded,) = np.nonzero(counted < seq_len)
    for j in padded.tolist():
        labels[j, counted[j] :] = IGNORED
        starts[j, counted[j]] = True
    if document_mask:
        inside = starts[:, :-1]
        document_ids = np.cumsum(inside, axis=1, dtype=np.int32)
        document_ids -= document_ids[:, :1]  # a row of padding alone is marked at its first token
        # Each position less the start of its document, which is the last marked position up to it.
        position_ids = position - np.maximum.accumulate(np.where(inside, position, 0), axis=1)
    else:
        document_ids = np.zeros((count, seq_len), np.int32)
        position_ids = np.tile(position, (count, 1))
    return RowBatch(
        input_ids=torch.from_numpy(np.ascontiguousarray(tokens[:, :-1])),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        document_ids=torch.from_numpy(document_ids),
        sources=sources,
        supervised=int(np.count_nonzero(labels != IGNORED)),
    )
