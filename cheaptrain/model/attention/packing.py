"""Where the documents of a batch of rows begin, worked out once, on the CPU, ahead of everything else.

Which attention kernel runs depends on the values of document ids: on whether any row has two documents. Asked on a GPU,
that would stop it, so it is asked here, in whatever thread there is time, and the answer travels with all that a kernel
needs (`Packing`, which may be pinned).

The trap it avoids: batches have different numbers of documents, and every new length of the boundaries is a new shape,
for which torch.compile builds each layer again. Empty documents pad them to a power of two, and `Padded` remembers the
longest of a run, so that its length only ever grows, at most a few times.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

_FEWEST = 16


@dataclass(frozen=True, eq=False)
class Packing:
    """The documents of rows `[rows, seq]`."""

    rows: int
    seq: int
    # Where documents start in the rows laid end to end, and the end: int32 [a power of two + 1], padded with the end.
    # None where every row is one document: plain causal attention.
    boundaries: Tensor | None = None

    def pinned(self) -> "Packing":
        """The same in page-locked memory, from which a copy to a GPU does not hold up the thread that asks for it."""
        if self.boundaries is None or self.boundaries.device.type != "cpu" or self.boundaries.is_pinned():
            return self
        return replace(self, boundaries=self.boundaries.pin_memory())


class Padded:
    """How many documents the boundaries of a run have had room for so far. Any thread may look and raise it: it only
    grows, and a number that is forgotten costs one recompilation."""

    def __init__(self) -> None:
        self.documents = _FEWEST


def packing_of(document_ids: Tensor, document_mask: bool, padded: Padded | None = None) -> Packing:
    """The packing of `document_ids` `[rows, seq]`, where a new document starts wherever the id changes; without
    `document_mask` every row is one document. `padded`: of the run, to give boundaries the length they had before."""
    rows, seq = document_ids.shape
    changes = document_ids[:, 1:] != document_ids[:, :-1]  # [rows, seq - 1]
    if not document_mask or not bool(changes.any()):
        return Packing(rows, seq)
    boundaries = boundaries_of(changes, _FEWEST if padded is None else padded.documents)
    if padded is not None:
        padded.documents = max(padded.documents, len(boundaries) - 1)
    return Packing(rows, seq, boundaries)


def boundaries_of(changes: Tensor, at_least: int = _FEWEST) -> Tensor:
    """Where documents start in rows laid end to end, given where ids change `[rows, seq - 1]`: int32, padded with the
    end to a power of two, no less than `at_least`, + 1. Padding with empty documents keeps the shape the same."""
    starts = F.pad(changes, (1, 0), value=True).flatten().nonzero().flatten()  # [documents]
    total = changes.shape[0] * (changes.shape[1] + 1)
    padded = max(at_least, 1 << (len(starts) - 1).bit_length())
    ends = starts.new_full((padded + 1 - len(starts),), total)
    return torch.cat([starts, ends]).to(torch.int32)


def segments_of(boundaries: Tensor, rows: int, seq: int) -> Tensor:
    """The number of each token's document `[rows, seq]`, int32, on the device of `boundaries`."""
    tokens = torch.arange(rows * seq, device=boundaries.device, dtype=boundaries.dtype)
    return torch.searchsorted(boundaries, tokens, right=True, out_int32=True).view(rows, seq)
