"""Documents end to end: one long run of tokens over many shard files.

A source is read as if all its documents stood in one array, each document followed at once by the next. The files
stay where they are: opening looks only at sizes and at the document ends, reading maps a file when it is first needed.
The trap: a mapped file costs a file descriptor for as long as it is mapped, and a corpus has thousands of shards, so
maps live in one cache of bounded size that all streams share. A shard may also select some of the documents of its file
(that is how a token file made by somebody else is split into training and validation): the stream then holds those and
no others.
"""

import os
import resource
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike, NDArray

from cheaptrain.errors import PreflightError

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shard:
    """One token file and where its documents end.

    `document_ends` int64 [documents of the file]: cumulative token counts; the last one is the tokens of the file.
    `offset_bytes`: bytes of header before the first token. `extents` int64 [selected documents, 2]: (first token,
    tokens) of the documents to read, in the order to read them; None: the whole file.
    """

    bin: Path
    dtype: DTypeLike
    document_ends: Int64
    offset_bytes: int = 0
    extents: Int64 | None = None

    def select(self, documents: Int64) -> "Shard":
        """The same file, reading only the documents with these indices [n], in this order."""
        ends = np.asarray(self.document_ends, np.int64)[documents]
        starts = np.concatenate(([0], self.document_ends))[documents].astype(np.int64)
        return replace(self, extents=np.stack([starts, ends - starts], axis=1))

    @cached_property
    def ends(self) -> Int64:
        """Where each document that is read ends, counted in the tokens that are read: int64 [documents]."""
        return self.document_ends if self.extents is None else np.cumsum(self.extents[:, 1], dtype=np.int64)

    @property
    def documents(self) -> int:
        return len(self.ends)

    @property
    def tokens(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0


class TokenStream:
    """The documents of some shards as one run of tokens. Reading is safe from several threads."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Raises PreflightError naming the file when a shard is missing, has another size than its index says, or holds
        an empty document."""
        stamps = [_check(shard) for shard in shards]
        kept = [(shard, stamp) for shard, stamp in zip(shards, stamps, strict=True) if shard.tokens]
        self._shards = [shard for shard, _ in kept]
        self._stamps = [stamp for _, stamp in kept]
        self._first_token = [0]
        for shard in self._shards:
            self._first_token.append(self._first_token[-1] + shard.tokens)
        self.tokens: int = self._first_token[-1]
        self.documents: int = sum(shard.documents for shard in self._shards)

    def read(self, start: int, stop: int, out: Int64 | None = None) -> Int64:
        """Tokens [start, stop) as int64, in `out` [stop - start] if given. Raises IndexError outside the stream."""
        if out is None:
            out = np.empty(max(0, stop - start), np.int64)
        for index, first, last in self._overlapped(start, stop):
            shard_start = self._first_token[index]
            self._copy(index, first - shard_start, out[first - start : last - start])
        return out

    def document_lengths(self) -> Int64:
        """Tokens of each document: int64 [documents]."""
        return np.concatenate([np.empty(0, np.int64), *(np.diff(shard.ends, prepend=0) for shard in self._shards)])

    def document_starts(self, start: int, stop: int) -> Int64:
        """Where documents start strictly inside (start, stop), relative to `start`: int64, ascending."""
        found = []
        for index, first, last in self._overlapped(start, stop):
            shard_start = self._first_token[index]
            ends = self._shards[index].ends
            # A document starts where the one before it ends: the end of a shard is the start of the next one's first.
            low, high = np.searchsorted(ends, (first - shard_start, last - shard_start), side="right")
            if high > low:
                found.append(ends[low:high] + (shard_start - start))
        starts = np.concatenate(found) if found else np.empty(0, np.int64)
        return starts[:-1] if len(starts) and starts[-1] == stop - start else starts  # `stop` itself is not inside

    def _overlapped(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """(shard, first token, token after the last) of every shard that [start, stop) touches, in stream offsets."""
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens [{start}, {stop}) of a stream of {self.tokens:,} tokens")
        pieces = []
        index = bisect_right(self._first_token, start) - 1
        while start < stop:
            last = min(stop, self._first_token[index + 1])
            pieces.append((index, start, last))
            start, index = last, index + 1
        return pieces

    def _copy(self, index: int, start: int, out: Int64) -> None:
        """Tokens [start, start + len(out)) of one shard's selection into `out`."""
        shard = self._shards[index]
        tokens = _mapped(str(shard.bin), np.dtype(shard.dtype), shard.offset_bytes, self._stamps[index])
        stop = start + len(out)
        if shard.extents is None:
            out[:] = tokens[start:stop]
            return
        # Consecutive documents of the selection lie apart in the file: shift each token by its document's distance.
        first = int(np.searchsorted(shard.ends, start, side="right"))
        last = int(np.searchsorted(shard.ends, stop, side="left")) + 1
        ends, extents = shard.ends[first:last], shard.extents[first:last]
        held = np.diff(np.minimum(ends, stop), prepend=start)
        out[:] = tokens[np.arange(start, stop) + np.repeat(extents[:, 0] + extents[:, 1] - ends, held)]


def _check(shard: Shard) -> tuple[int, int]:
    """Refuse a shard that is not what its index says. Returns what tells this file from a later one of that name."""
    try:
        stat = shard.bin.stat()
    except OSError as error:
        raise PreflightError(
            f"{shard.bin}: cannot open token shard ({error.strerror}); restore it or run `cheaptrain prepare` again"
        ) from error
    itemsize = np.dtype(shard.dtype).itemsize
    indexed = int(shard.document_ends[-1]) if len(shard.document_ends) else 0
    if stat.st_size != shard.offset_bytes + indexed * itemsize:
        raise PreflightError(
            f"{shard.bin}: {stat.st_size:,} bytes, but {shard.offset_bytes:,} of header and the {indexed:,} tokens of "
            f"{itemsize} bytes that its index counts make {shard.offset_bytes + indexed * itemsize:,}; the file was "
            "cut or replaced: restore it or run `cheaptrain prepare` again"
        )
    ends = shard.document_ends
    if len(ends) and (ends[0] <= 0 or bool((ends[1:] <= ends[:-1]).any())):
        empty = 0 if ends[0] <= 0 else int(np.flatnonzero(ends[1:] <= ends[:-1])[0]) + 1
        raise PreflightError(
            f"{shard.bin}: document {empty} of its index holds no token; run `cheaptrain prepare` again"
        )
    if shard.extents is not None and len(shard.extents):
        starts, lengths = shard.extents[:, 0], shard.extents[:, 1]
        if lengths.min() <= 0 or starts.min() < 0 or int((starts + lengths).max()) > indexed:
            raise PreflightError(
                f"{shard.bin}: a selected document is empty or lies outside the file's {indexed:,} tokens"
            )
    return _stamp(stat)


# Half the descriptors the system allows (usually 1,024), the rest left to everything else in the process.
_MAPS = max(64, min(4096, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2))


@lru_cache(maxsize=_MAPS)
def _mapped(path: str, dtype: "np.dtype[np.generic]", offset_bytes: int, stamp: tuple[int, int]) -> NDArray[np.generic]:
    """The file's tokens, mapped read-only. `stamp` keeps a replaced file from being read through an old map.

    Raises PreflightError when the file is not the one that was checked: mapping is late, on the first row from it, and
    data prepared again meanwhile has other documents in the same place.
    """
    try:
        # A plain array over the map: slicing np.memmap itself costs several times more.
        tokens = np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset_bytes))
        same = _stamp(os.stat(path)) == stamp
    except (OSError, ValueError):  # gone, or empty
        same = False
    if not same:
        raise PreflightError(f"{path}: changed or gone since it was opened; start again with the same command")
    return tokens


def _stamp(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_ino, stat.st_mtime_ns
