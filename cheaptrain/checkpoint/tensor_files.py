"""safetensors files, written and read a piece at a time.

The format is a JSON table and then bytes, and the library that made it builds a file whole in memory, in one call that
lets no other Python thread run meanwhile. Writing in the background would then stop training for as long as if it
were in the foreground, so here tensors go to the file one by one, from the memory they lie in. What is read back is
compared bit by bit, not number by number: two NaNs are never equal, and 0.0 equals -0.0.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from cheaptrain.checkpoint.blocks import Block, Shape
from cheaptrain.checkpoint.together import as_bytes

SUFFIX = ".safetensors"

_AT_ONCE = 2**26  # bytes written or read in one call
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """A safetensors file, written tensor by tensor in the order of `names`, and on the disk once it is closed."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> None:
        """Open `path` and write its table. Raises OSError; ValueError for a dtype without a name in the format."""
        # Wide elements first, so that each tensor begins at a multiple of its element's size, which readers need.
        self.names = sorted(entries, key=lambda name: (-entries[name].dtype.itemsize, name))
        table: dict[str, object] = {"__metadata__": dict(metadata)}
        end = 0
        for name in self.names:
            entry, start = entries[name], end
            if entry.dtype not in _NAMES:
                raise ValueError(f"{name}: safetensors files hold no {entry.dtype}")
            end += entry.nbytes
            table[name] = {"dtype": _NAMES[entry.dtype], "shape": list(entry.shape), "data_offsets": [start, end]}
        header = json.dumps(table, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self.path = path
        self._entries = dict(entries)
        self._left = iter(self.names)
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            self._write(memoryview(len(header).to_bytes(8, "little") + header))
        except BaseException:
            os.close(self._handle)
            raise

    def write(self, name: str, data: Tensor) -> None:
        """Append the next tensor of `names`: contiguous, on the CPU."""
        expected, entry = next(self._left, None), Entry(data.dtype, tuple(data.shape))
        if name != expected or entry != self._entries[name]:
            raise ValueError(f"{self.path}: {name} {entry} is not what comes next")
        if data.numel():
            self._write(as_bytes(data).numpy().data)

    def close(self) -> None:
        """Put the file on the disk. Raises OSError when it cannot, ValueError when tensors are missing."""
        try:
            if (missing := next(self._left, None)) is not None:
                raise ValueError(f"{self.path}: {missing} was never written")
            os.fsync(self._handle)
        finally:
            os.close(self._handle)

    def abandon(self) -> None:
        """Close the file as it is."""
        os.close(self._handle)

    def _write(self, content: memoryview) -> None:
        while content:
            content = content[os.write(self._handle, content[:_AT_ONCE]) :]


class TensorReader:
    """A safetensors file that is read where one needs it. Close it, or use it in a `with`."""

    def __init__(self, path: Path) -> None:
        """Open `path` and read its table. Raises OSError, or ValueError for a table that is none."""
        self.path = path
        self._handle = os.open(path, os.O_RDONLY)
        try:
            self.entries, self._starts = self._table()
        except BaseException:
            os.close(self._handle)
            raise

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._handle)

    def holds(self, name: str, block: Block, offsets: Sequence[int]) -> bool:
        """Whether the tensor `name` of the file has the bits of `block`, `offsets` into the tensor as it stands here.

        Raises KeyError for a tensor that is not in the file, OSError when it cannot be read.
        """
        entry, data = self.entries[name], block.data
        if entry.dtype != data.dtype or len(entry.shape) != data.dim():
            return False
        shape, sizes, starts = tuple(entry.shape) or (1,), tuple(data.shape) or (1,), tuple(offsets) or (0,)
        if any(start + size > length for start, size, length in zip(starts, sizes, shape, strict=True)):
            return False
        bits = _BITS[entry.dtype.itemsize]
        mine = as_bytes(data).view(bits).view(sizes) if data.numel() else data.new_empty(0)
        row = prod(shape[1:]) * entry.dtype.itemsize  # bytes of one index of the first dimension, which lie together
        step = max(1, _AT_ONCE // max(1, row))
        if not mine.numel():
            return True
        for first in range(0, sizes[0], step):
            rows = min(step, sizes[0] - first)
            raw = self._read(self._starts[name] + (starts[0] + first) * row, rows * row)
            written = raw.view(bits).view(rows, *shape[1:])
            for dim in range(1, len(shape)):
                written = written.narrow(dim, starts[dim], sizes[dim])
            if not torch.equal(written, mine[first : first + rows]):
                return False
        return True

    def _table(self) -> tuple[dict[str, Entry], dict[str, int]]:
        length = int.from_bytes(self._read(0, 8).numpy().tobytes(), "little")
        if length > os.fstat(self._handle).st_size - 8:
            raise ValueError(f"{self.path} is cut short")
        table = json.loads(self._read(8, length).numpy().tobytes())
        table.pop("__metadata__", None)
        entries = {name: Entry(_DTYPES[item["dtype"]], tuple(item["shape"])) for name, item in table.items()}
        return entries, {name: 8 + length + item["data_offsets"][0] for name, item in table.items()}

    def _read(self, offset: int, count: int) -> Tensor:
        """`count` bytes from `offset`."""
        buffer = torch.empty(count, dtype=torch.uint8)
        left = buffer.numpy().data
        while left:
            got = os.preadv(self._handle, [left], offset)
            if got == 0:
                raise OSError(f"{self.path} is cut short")
            left, offset = left[got:], offset + got
        return buffer
