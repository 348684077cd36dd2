"""The `state/` folder of a checkpoint: what a resumed run needs besides the weights.

Numbers go into trainer.json. Tensors go into safetensors files that each process writes by itself, its own blocks, with
a note of where each block begins: the format of torch.distributed.checkpoint's HuggingFaceStorageWriter, read by its
HuggingFaceStorageReader into whatever layout the processes have by then. It is not written by that library, because it
builds each file whole in memory and meanwhile stops the other threads (see tensor_files.py). Two traps of its reader:
a stretch that no file holds is left as it was, without a word; and its errors arrive wrapped in an exception that is
no Exception.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader

from cheaptrain.checkpoint.blocks import Block, Piece, Shape
from cheaptrain.checkpoint.tensor_files import SUFFIX, Entry, TensorFile, TensorReader
from cheaptrain.checkpoint.together import ProofFailed
from cheaptrain.errors import PreflightError

TRAINER = "trainer.json"

_BYTES_PER_FILE = 2**30  # files are hashed side by side, so a few are faster than one


def write_state(
    folder: Path, pieces: Mapping[str, Sequence[Piece]], blocks: Mapping[str, Block], rank: int
) -> list[Path]:
    """Write the blocks that `pieces` gives to process `rank` into `folder`, which must be there, and compare what was
    written with them, bit for bit; returns the files.

    Raises OSError when the disk cannot, ProofFailed when what it gives back is something else.
    """
    mine = {name: blocks[name] for name, parts in pieces.items() if any(part.rank == rank for part in parts)}
    groups: list[dict[str, Block]] = []
    filled = 0
    for name, block in mine.items():
        if not groups or filled + block.data.nbytes > _BYTES_PER_FILE:
            groups.append({})
            filled = 0
        groups[-1][name] = block
        filled += block.data.nbytes
    return [_write(folder / f"process-{rank:05d}-{n:05d}{SUFFIX}", group) for n, group in enumerate(groups)]


def read_scalars(folder: Path) -> dict[str, Any]:
    """What was given as scalars."""
    scalars: dict[str, Any] = json.loads((folder / TRAINER).read_text(encoding="utf-8"))
    return scalars


def stored_tensors(folder: Path) -> dict[str, Entry]:
    """Dtype and shape of every tensor in the safetensors files of `folder`, wherever its pieces are.

    Raises PreflightError when the pieces of one do not make a whole, or stand twice.
    """
    found = {}
    for name, stored in _read_metadata(folder).items():
        shape: Shape = tuple(stored.size)
        there = sum(prod(chunk.sizes) for chunk in stored.chunks)
        if there != prod(shape):
            raise PreflightError(
                f"{folder}: {name} has {there:,} numbers in its files and {prod(shape):,} by its shape {list(shape)}: "
                "a file is missing, or one is there that does not belong"
            )
        found[name] = Entry(stored.properties.dtype, shape)
    return found


def read_tensors(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fill `targets` (DTensors or not, on any device) from the safetensors files of `folder`: each process reads what
    it holds of them, whatever layout wrote them. Each must be there, in that shape: see `stored_tensors`.

    Raises PreflightError when a file cannot be read.
    """
    if not targets:
        return
    try:
        with torch.no_grad(), _by_itself():
            dcp.load(dict(targets), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    except (OSError, SafetensorError) as error:
        raise PreflightError(f"{folder} cannot be read: {error}") from error


def _write(path: Path, blocks: Mapping[str, Block]) -> Path:
    entries = {name: Entry(block.data.dtype, tuple(block.data.shape)) for name, block in blocks.items()}
    begins = {name: {"saved_offsets": list(block.place.offsets)} for name, block in blocks.items()}
    file = TensorFile(path, entries, {"DCP_SHARDING_INFO": json.dumps(begins), "DCP_VERSION": "1.0", "format": "pt"})
    try:
        for name in file.names:
            file.write(name, blocks[name].data)
    except BaseException:
        file.abandon()
        raise
    file.close()
    with TensorReader(path) as reader:
        for name, block in blocks.items():
            if not reader.holds(name, block, (0,) * block.data.dim()):
                raise ProofFailed(f"{path}: {name} was not written as it is in training")
    return path


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        with _by_itself():
            return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise PreflightError(f"{folder} cannot be read: {error}") from error


@contextmanager
def _by_itself() -> Iterator[None]:
    """Silence the library's remark that processes are not asked, and unwrap the error it wraps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as wrapped:
            error = next(iter(wrapped.failures.values()))[0]
            raise error from None
