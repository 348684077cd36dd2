"""Which block of which tensor lies on which process, and who of them writes it.

A sharded parameter is one block on each process; a replicated one is the same block on several; an uneven one leaves
some with nothing. Everything here goes by where a block begins and how large it is, never by how it was laid out, so
any layout can be written, and read by any other. The trap is a layout that is described wrongly: blocks that overlap or
leave a gap would be saved without a word. So all processes tell each other what they hold, and the blocks of each
tensor must tile it exactly.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from zlib import crc32

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

Shape = tuple[int, ...]

_SMALL_BYTES = 2**16  # replicated blocks up to this size are not worth spreading over processes and files


@dataclass(frozen=True)
class Place:
    """Where a block lies in its tensor."""

    dtype: torch.dtype
    shape: Shape  # of the whole tensor
    offsets: Shape
    sizes: Shape

    @property
    def nbytes(self) -> int:
        """Bytes of the block."""
        return prod(self.sizes) * self.dtype.itemsize

    @property
    def whole_nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Block:
    """A process's part of a tensor: row-major, on the CPU, of the size that its place says."""

    place: Place
    data: Tensor


@dataclass(frozen=True)
class Piece:
    """A block that exists, and the process that writes it."""

    rank: int
    place: Place


def local_block(tensor: Tensor) -> tuple[Place, Tensor]:
    """Place and live data of this process's part of `tensor` (all of it, unless it is a DTensor).

    Raises ValueError for a tensor whose parts would have to be added up first.
    """
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return Place(tensor.dtype, tuple(tensor.shape), (0,) * tensor.dim(), tuple(tensor.shape)), tensor
    if any(isinstance(placement, Partial) for placement in tensor.placements):
        raise ValueError(f"a tensor of shape {list(tensor.shape)} is a sum that was not made yet: {tensor.placements}")
    sizes, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    local = tensor.to_local()
    if tuple(local.shape) != tuple(sizes):
        raise ValueError(f"a block of {tensor.placements} has shape {list(local.shape)} instead of {list(sizes)}")
    return Place(tensor.dtype, tuple(tensor.shape), tuple(offsets), tuple(sizes)), local


def places_of(blocks: Mapping[str, Block]) -> dict[str, Place]:
    """What this process tells the others: the places of its blocks, without the empty ones."""
    return {name: block.place for name, block in blocks.items() if 0 not in block.place.sizes or 0 in block.place.shape}


def deal(
    held: Sequence[Mapping[str, Place]], preferred: Callable[[str], int] | None = None
) -> dict[str, tuple[Piece, ...]]:
    """From what each process holds (by rank): the pieces of each tensor, every block written by one process.

    Of several holders the `preferred` one writes, else they take turns by name. Raises ValueError when the blocks of
    a tensor do not tile it.
    """
    holders: dict[str, dict[Place, list[int]]] = {}
    for rank, places in enumerate(held):
        for name, place in places.items():
            holders.setdefault(name, {}).setdefault(place, []).append(rank)
    pieces = {}
    for name in sorted(holders):
        _check_tiles(name, list(holders[name]))
        wanted = preferred(name) if preferred else -1
        pieces[name] = tuple(
            Piece(_writer(name, place, ranks, wanted), place)
            for place, ranks in sorted(holders[name].items(), key=lambda item: item[0].offsets)
        )
    return pieces


def _writer(name: str, place: Place, ranks: Sequence[int], wanted: int) -> int:
    if wanted in ranks:
        return wanted
    if place.nbytes <= _SMALL_BYTES:
        return ranks[0]
    return ranks[crc32(f"{name}{place.offsets}".encode()) % len(ranks)]


def _check_tiles(name: str, places: Sequence[Place]) -> None:
    """A grid: along each dimension the blocks begin at the same cuts, each ends where the next begins, none is missing
    and none stands twice."""
    kinds = {(place.dtype, place.shape) for place in places}
    if len(kinds) > 1:
        raise ValueError(f"{name} is not the same tensor on every process: {sorted(map(str, kinds))}")
    shape = places[0].shape
    cuts = [sorted({place.offsets[dim] for place in places} | {size}) for dim, size in enumerate(shape)]
    ends = [dict(pairwise(c)) for c in cuts]
    tiled = len(places) == prod(max(1, len(c) - 1) for c in cuts) and len({p.offsets for p in places}) == len(places)
    for place in places:
        for dim, (offset, size) in enumerate(zip(place.offsets, place.sizes, strict=True)):
            tiled = tiled and offset + size == ends[dim].get(offset, offset)
    if not tiled or any(c[0] != 0 for c in cuts):
        lie = ", ".join(f"{list(place.sizes)} at {list(place.offsets)}" for place in places)
        raise ValueError(f"the blocks of {name} {list(shape)} leave a gap or overlap: {lie}")
