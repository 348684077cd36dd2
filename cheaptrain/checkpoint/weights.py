"""The weights of a checkpoint as transformers reads them: whole tensors, in one file or in several with an index.

No process holds the whole model, so each file has one process that writes it, and the others send it their blocks of
the tensors in it, one tensor at a time. The largest thing in memory is one whole tensor, nothing is written twice, and
two processes never write into one file, which network file systems do not take well. Whoever writes and meets a full
disk listens to the end all the same: see together.py.
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from cheaptrain.checkpoint.blocks import Block, Piece, Place
from cheaptrain.checkpoint.tensor_files import Entry, TensorFile, TensorReader
from cheaptrain.checkpoint.together import ProofFailed, receive, send
from cheaptrain.durable import write_json
from cheaptrain.parallel.processes import Processes

INDEX = "model.safetensors.index.json"

_BYTES_PER_FILE = 4 * 2**30
_METADATA = {"format": "pt"}  # transformers asks for it


def files_of_weights(places: Mapping[str, Place]) -> dict[str, list[str]]:
    """Which tensors go into which file, by the file's name: in the order given, each file up to its limit."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, place in places.items():
        if groups[-1] and filled + place.whole_nbytes > _BYTES_PER_FILE:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += place.whole_nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{len(groups):05d}.safetensors": group for n, group in enumerate(groups, 1)}


def owners_of(files: Mapping[str, Sequence[str]], processes: int) -> dict[str, int]:
    """The process that writes each file."""
    return {file: number % processes for number, file in enumerate(files)}


def write_weights(
    folder: Path,
    files: Mapping[str, Sequence[str]],
    pieces: Mapping[str, Sequence[Piece]],
    blocks: Mapping[str, Block],
    processes: Processes,
) -> list[Path]:
    """Write the weights into `folder`, all processes together; returns the files that this one wrote.

    `pieces` and `files` are the same everywhere, `blocks` are this process's. Raises OSError when the disk
    cannot, after having heard the others out. Collective.
    """
    owners = owners_of(files, processes.size)
    trouble: Exception | None = None
    open_files: dict[str, TensorFile] = {}
    order: dict[str, Sequence[str]] = {}
    for file, names in files.items():
        entries = {name: Entry(pieces[name][0].place.dtype, pieces[name][0].place.shape) for name in names}
        order[file] = sorted(names, key=lambda name: (-entries[name].dtype.itemsize, name))
        if owners[file] == processes.rank and trouble is None:
            try:
                open_files[file] = TensorFile(folder / file, entries, _METADATA)
            except Exception as error:
                trouble = error
    # A tensor of each file in turn, so that all who write have something to do; the same order everywhere.
    for turn in zip_longest(*([(file, name) for name in names] for file, names in order.items())):
        for file, name in filter(None, turn):
            if owners[file] != processes.rank:
                _give(name, pieces[name], blocks, owners[file], processes)
                continue
            whole = _collect(name, pieces[name], blocks, processes)
            if trouble is None:
                try:
                    open_files[file].write(name, whole)
                except Exception as error:
                    trouble = error
    for written in open_files.values():
        try:
            written.close() if trouble is None else written.abandon()
        except Exception as error:
            trouble = error
    if trouble is not None:
        raise trouble
    return [written.path for written in open_files.values()]


def write_index(folder: Path, files: Mapping[str, Sequence[str]], places: Mapping[str, Place]) -> None:
    """Say which tensor is in which file, where there are several."""
    if len(files) > 1:
        total = sum(place.whole_nbytes for place in places.values())
        table = {name: file for file, names in files.items() for name in names}
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": table})


def compare_weights(folder: Path, files: Mapping[str, Sequence[str]], blocks: Mapping[str, Block]) -> None:
    """Read this process's slices of the weights again. Raises ProofFailed naming the first that has other bits."""
    for file, names in files.items():
        with TensorReader(folder / file) as reader:
            if set(reader.entries) != set(names):
                raise ProofFailed(f"{folder / file} does not hold the tensors it was given")
            for name in names:
                if name in blocks and not reader.holds(name, blocks[name], blocks[name].place.offsets):
                    raise ProofFailed(f"{folder / file}: {name} was not written as it is in the live model")


def _collect(name: str, pieces: Sequence[Piece], blocks: Mapping[str, Block], processes: Processes) -> Tensor:
    """The whole tensor, from everybody's pieces."""
    if len(pieces) == 1 and pieces[0].rank == processes.rank:
        return blocks[name].data
    whole = torch.empty(pieces[0].place.shape, dtype=pieces[0].place.dtype)
    for piece in pieces:
        part = whole
        for dim, (offset, size) in enumerate(zip(piece.place.offsets, piece.place.sizes, strict=True)):
            part = part.narrow(dim, offset, size)
        if piece.rank == processes.rank:
            part.copy_(blocks[name].data)
        elif part.is_contiguous():
            receive(part, piece.rank, processes)
        else:
            sent = torch.empty(piece.place.sizes, dtype=piece.place.dtype)
            receive(sent, piece.rank, processes)
            part.copy_(sent)
    return whole


def _give(name: str, pieces: Sequence[Piece], blocks: Mapping[str, Block], owner: int, processes: Processes) -> None:
    for piece in pieces:
        if piece.rank == processes.rank:
            send(blocks[name].data, owner, processes)
