"""Token shards on disk: a headerless `.bin` of little-endian ids and an `.idx` saying where each document ends.

The index is Megatron's MMIDIDX format, so Megatron reads these shards and this reads Megatron's. Shards of
conversations have a `.mask` besides, one byte a token: 1 where the model must produce the token. Files are hashed while
they are written and renamed only when they are whole on the disk. The trap: Megatron has no code for uint32; ids above
65,535 are declared int32, which for ids below 2**31 is the same bytes.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from cheaptrain.data.files import cannot_read, temporary_path
from cheaptrain.durable import sync
from cheaptrain.errors import PreflightError

_MAGIC = b"MMIDIDX\x00\x00"
_VERSION = 1
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats
_CODES = {"<u2": 8, "<u4": 4}


@dataclass(frozen=True)
class Index:
    """`dtype` of the tokens and `document_ends` int64 [documents]: tokens up to the end of each document."""

    dtype: "np.dtype[np.integer]"
    document_ends: NDArray[np.int64]


class ShardWriter:
    """Writes `<name>.bin` and `<name>.idx`, and `<name>.mask` if `masked`, under temporary names; `finish` makes them
    real."""

    def __init__(
        self, directory: Path, name: str, dtype: "np.dtype[np.unsignedinteger]", owner: str, masked: bool = False
    ) -> None:
        self._index = _Part(directory / f"{name}.idx", owner)
        self._ids = _Part(directory / f"{name}.bin", owner)
        self._mask = _Part(directory / f"{name}.mask", owner) if masked else None
        self._parts = [part for part in (self._ids, self._index, self._mask) if part]
        self._dtype = dtype
        self._lengths: list[NDArray[np.int64]] = []
        self.tokens = 0
        self.documents = 0
        self.supervised = 0

    def add(
        self, ids: NDArray[np.unsignedinteger], lengths: NDArray[np.int64], mask: NDArray[np.uint8] | None = None
    ) -> None:
        """Append documents: their ids end to end [tokens], the tokens of each [documents], and the mask [tokens]."""
        self._ids.write(np.ascontiguousarray(ids, self._dtype).data)
        if self._mask is not None:
            assert mask is not None and len(mask) == len(ids)
            self._mask.write(np.ascontiguousarray(mask, np.uint8).data)
            self.supervised += int(np.count_nonzero(mask))
        self._lengths.append(lengths)
        self.tokens += len(ids)
        self.documents += len(lengths)

    def finish(self) -> dict[str, dict[str, Any]]:
        """Flush to the disk and rename. Returns {file name: {"bytes", "sha256"}}."""
        lengths = np.concatenate(self._lengths) if self._lengths else np.empty(0, np.int64)
        self._index.write(index_bytes(lengths, self._dtype))
        for part in self._parts:
            _sync(part.file)
        for part in self._parts:
            os.replace(part.temporary, part.path)
        sync(self._ids.path.parent)
        return {part.path.name: {"bytes": part.size, "sha256": part.hash.hexdigest()} for part in self._parts}

    def discard(self) -> None:
        """Remove what was written so far; nothing once finished."""
        for part in self._parts:
            part.file.close()
            part.temporary.unlink(missing_ok=True)


class _Part:
    """One file of a shard while it is written."""

    def __init__(self, path: Path, owner: str) -> None:
        self.path = path
        self.temporary = temporary_path(path, owner)
        self.file: BinaryIO = open(self.temporary, "wb")  # noqa: SIM115 (closed by finish or discard)
        self.hash = hashlib.sha256()
        self.size = 0

    def write(self, raw: "bytes | memoryview") -> None:
        self.file.write(raw)
        self.hash.update(raw)
        self.size += raw.nbytes if isinstance(raw, memoryview) else len(raw)


def index_bytes(lengths: NDArray[np.int64], dtype: "np.dtype[np.unsignedinteger]") -> bytes:
    """An MMIDIDX index of documents of one sequence each."""
    count = len(lengths)
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    header = _MAGIC + struct.pack("<QBQQ", _VERSION, _CODES[dtype.str], count, count + 1)
    sizes = lengths.astype("<i4").tobytes()
    return header + sizes + pointers.astype("<i8").tobytes() + np.arange(count + 1, dtype="<i8").tobytes()


def read_index(path: Path) -> Index:
    """Read an MMIDIDX index, ours or Megatron's. Raises PreflightError when it is something else or damaged."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error
    start = len(_MAGIC) + struct.calcsize("<QBQQ")
    if len(raw) < start or not raw.startswith(_MAGIC):
        raise PreflightError(f"{path}: not an MMIDIDX index (Megatron's .idx of version 1)")
    version, code, sequences, boundaries = struct.unpack("<QBQQ", raw[len(_MAGIC) : start])
    if version != _VERSION or code not in _DTYPES:
        raise PreflightError(f"{path}: MMIDIDX version {version} with dtype code {code} does not hold token ids")
    if len(raw) < start + sequences * 12 + boundaries * 8:
        raise PreflightError(f"{path}: the index is cut short; write it again")
    dtype = np.dtype(_DTYPES[code])
    sizes = np.frombuffer(raw, "<i4", sequences, start).astype(np.int64)
    pointers = np.frombuffer(raw, "<i8", sequences, start + 4 * sequences)
    documents = np.frombuffer(raw, "<i8", boundaries, start + 12 * sequences)
    ends = np.concatenate(([0], np.cumsum(sizes)))
    if not np.array_equal(pointers, ends[:-1] * dtype.itemsize):
        raise PreflightError(f"{path}: its sequences do not lie end to end in the .bin, which is not supported")
    if boundaries == 0 or documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise PreflightError(f"{path}: its documents do not cover its {sequences:,} sequences; write it again")
    return Index(dtype, ends[documents[1:]])


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    file.close()
