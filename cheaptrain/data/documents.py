"""Conversations of a prepared source, each read by its number.

Text is read as one long run of tokens; a conversation is read whole, with the mask that says which of its tokens the
model must produce. Both lie in shard files of the same document ends, so both are token streams: the bounded cache of
maps, and the checks that a file is what its index says, are those of `stream.py`. The trap: a mask that lies one token
beside its conversation trains the model to speak the user's part, and nothing fails; so a mask file must hold exactly
as many bytes as its shard holds tokens.
"""

import numpy as np
from numpy.typing import NDArray

from cheaptrain.data.stream import Int64, TokenStream
from cheaptrain.errors import PreflightError

_TOKENS_AT_ONCE = 1 << 24


class Documents:
    """Random access to documents and their masks. `lengths` int64 [documents]: tokens of each."""

    def __init__(self, ids: TokenStream, masks: TokenStream) -> None:
        """Raises PreflightError when the masks are not those of the documents."""
        self.lengths = ids.document_lengths()
        if not np.array_equal(self.lengths, masks.document_lengths()):
            raise PreflightError(
                f"{ids.tokens:,} tokens with {masks.tokens:,} bytes of mask: they do not belong together; "
                "run `cheaptrain prepare` again"
            )
        self._ids, self._masks = ids, masks
        self._ends = np.cumsum(self.lengths)

    def read(self, index: int) -> tuple[Int64, NDArray[np.uint8]]:
        """Document `index`: its ids int64 [length], and 1 where the model must produce the token, uint8 [length].

        Raises IndexError outside the documents.
        """
        if not 0 <= index < len(self._ends):
            raise IndexError(f"document {index} of {len(self._ends):,}")
        stop = int(self._ends[index])
        start = stop - int(self.lengths[index])
        return self._ids.read(start, stop), self._masks.read(start, stop).astype(np.uint8)

    def supervised(self) -> Int64:
        """Of each document, how many of its tokens the model must produce, the first one aside: int64 [documents]."""
        counts = np.empty(len(self._ends), np.int64)
        first = 0
        while first < len(counts):
            start = int(self._ends[first] - self.lengths[first])
            last = max(first + 1, int(np.searchsorted(self._ends, start + _TOKENS_AT_ONCE, side="right")))
            mask = self._masks.read(start, int(self._ends[last - 1]))
            begins = self._ends[first:last] - self.lengths[first:last] - start
            counts[first:last] = np.add.reduceat(mask, begins) - mask[begins]
            first = last
        return counts
