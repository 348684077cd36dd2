"""Work that needs whole matrices, over matrices that lie in pieces on many processes.

The processes that hold one copy of a matrix are dealt the matrices in turn, largest first, one each: every round they
send their pieces of as many matrices as they are, each to its owner, the owner works on the whole of one, and the
pieces of the result go back the same way. So no process ever holds more than one whole matrix, and none repeats
another's work. Copies (HSDP, or a matrix that tensor parallelism left whole) work on their own: repeating is cheaper
than sending between nodes.

The trap: a process whose shard is empty, or that owns nothing in the last round, has to take part all the same, and
all processes in the same order. Everything here is decided from shapes and placements, which all of them know.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from cheaptrain.errors import CheaptrainError


def whole_matrices(
    matrices: Sequence[Tensor], piece: Callable[[int], Tensor], work: Callable[[Tensor], Tensor]
) -> Iterator[tuple[int, Tensor]]:
    """Yields `(i, this process's piece of work(whole i))` for every matrix, in an order of its own.

    `matrices` give shapes and placements (plain tensors, or DTensors; their values are not read); `piece(i)`, called
    once for each, is this process's piece of what is to be worked on, laid out like `matrices[i]`. `work` takes a
    whole matrix, which it may overwrite, and returns one of the same shape and dtype. Collective: all processes ask
    for the same matrices and take all results.

    Sent and received per process: its pieces once in each direction, and the matrices it owns. Held at a time: the
    pieces of one round (together about one matrix) and the matrix it owns in that round.
    """
    shared: dict[tuple[int, ...], list[tuple[int, _Copy]]] = {}
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, DTensor):
            yield i, work(piece(i))
            continue
        copy = _copy(matrix.shape, matrix.device_mesh, matrix.placements, dist.get_rank())
        if copy is None:
            yield i, _everywhere(matrix, piece(i), work)
        elif len(copy.ranks) == 1:
            yield i, work(piece(i))
        else:
            shared.setdefault(copy.ranks, []).append((i, copy))
    for ranks, dealt in shared.items():
        dealt.sort(key=lambda entry: -entry[1].cost)  # stable, so the same everywhere
        for start in range(0, len(dealt), len(ranks)):
            turn = dealt[start : start + len(ranks)]
            yield from zip((i for i, _ in turn), _round(turn, piece, work), strict=True)


@dataclass(frozen=True)
class _Copy:
    """One copy of a matrix `[rows, columns]`: the processes that hold it together, in order, and what each of them
    has."""

    shape: tuple[int, int]
    ranks: tuple[int, ...]
    pieces: tuple[tuple[range, range], ...]

    @property
    def cost(self) -> int:
        """Grows like the multiplications of a Newton-Schulz step."""
        return min(self.shape) * self.shape[0] * self.shape[1]

    def piece_shape(self, holder: int) -> tuple[int, int]:
        rows, columns = self.pieces[holder]
        return len(rows), len(columns)

    def size(self, holder: int) -> int:
        return math.prod(self.piece_shape(holder))

    def of(self, whole: Tensor, holder: int) -> Tensor:
        """The piece of `holder` as a view of the whole."""
        rows, columns = self.pieces[holder]
        return whole[rows.start : rows.stop, columns.start : columns.stop]


@lru_cache(maxsize=1024)
def _copy(shape: torch.Size, mesh: DeviceMesh, placements: tuple[Placement, ...], rank: int) -> _Copy | None:
    """The copy that process `rank` (this one) has a piece of; None for a placement that FSDP2 and TP do not make."""
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise CheaptrainError(f"process {rank} holds no piece of a matrix laid out over {mesh}")
    plain = [axis for axis, p in enumerate(placements) if isinstance(p, Shard) and not isinstance(p, _StridedShard)]
    strided = [axis for axis, p in enumerate(placements) if isinstance(p, _StridedShard)]
    dims = {axis: placements[axis].dim for axis in plain + strided}  # type: ignore[attr-defined]
    if any(not isinstance(p, Replicate) for axis, p in enumerate(placements) if axis not in dims):
        return None
    if len({dims[axis] for axis in strided}) != len(strided):
        return None
    for axis in strided:
        # FSDP2 shards what TP has split: "strided" says that the axes to the right were there first.
        before = [mesh.size(other) for other in plain if other > axis and dims[other] == dims[axis]]
        if placements[axis].split_factor != math.prod(before):  # type: ignore[attr-defined]
            return None
    axes = sorted(dims)
    holders = mesh.mesh[tuple(slice(None) if axis in dims else coordinate[axis] for axis in range(mesh.ndim))]
    pieces = []
    for place in product(*(range(mesh.size(axis)) for axis in axes)):
        at = dict(zip(axes, place, strict=True))
        spans = [range(shape[0]), range(shape[1])]
        for axis in plain + strided:
            spans[dims[axis]] = _chunk(spans[dims[axis]], mesh.size(axis), at[axis])
        pieces.append((spans[0], spans[1]))
    in_order = sorted(zip(holders.flatten().tolist(), pieces, strict=True), key=lambda entry: entry[0])
    return _Copy((shape[0], shape[1]), tuple(r for r, _ in in_order), tuple(p for _, p in in_order))


def _chunk(span: range, count: int, i: int) -> range:
    """Chunk i of `count` as torch.chunk cuts: all of the same size but the last, and maybe empty ones behind it."""
    size = -(-len(span) // count)
    return span[min(i * size, len(span)) : min((i + 1) * size, len(span))]


def _round(
    turn: Sequence[tuple[int, _Copy]], piece: Callable[[int], Tensor], work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """`work` on the whole of one matrix by each of the first processes; this one's pieces of all the results."""
    copies = [copy for _, copy in turn]
    ranks = copies[0].ranks
    me = ranks.index(dist.get_rank())
    mine = copies[me] if me < len(copies) else None
    theirs = [copy.size(me) for copy in copies] + [0] * (len(ranks) - len(copies))
    owned = [mine.size(holder) for holder in range(len(ranks))] if mine else [0] * len(ranks)

    # Nothing has a name longer than it is needed: a round holds a few matrices, not many.
    arrived = _exchange(_side_by_side(turn, piece, me), ranks, theirs, owned)
    if mine:
        whole = [_assembled(mine, arrived)]
        del arrived
        result = work(whole.pop())
        arrived = torch.cat([mine.of(result, holder).flatten() for holder in range(len(ranks))])
        del result
    returned = _exchange(arrived, ranks, owned, theirs).split(theirs)
    return [part.view(copy.piece_shape(me)) for copy, part in zip(copies, returned, strict=False)]


def _side_by_side(turn: Sequence[tuple[int, _Copy]], piece: Callable[[int], Tensor], me: int) -> Tensor:
    """The pieces of this process, one after the other in one vector."""
    pieces = []
    for i, copy in turn:
        tensor = piece(i)
        if tensor.shape != copy.piece_shape(me):
            raise CheaptrainError(
                f"process {copy.ranks[me]} has {list(tensor.shape)} of a matrix {list(copy.shape)}; its placement "
                f"says {list(copy.piece_shape(me))}"
            )
        pieces.append(tensor.flatten())
    return torch.cat(pieces)


def _assembled(copy: _Copy, parts: Tensor) -> Tensor:
    """The whole matrix from the pieces of all holders, one after the other in `parts`."""
    whole = parts.new_empty(copy.shape)
    sizes = [copy.size(holder) for holder in range(len(copy.ranks))]
    for holder, part in enumerate(parts.split(sizes)):
        copy.of(whole, holder).copy_(part.view(copy.piece_shape(holder)))
    return whole


def _exchange(sent: Tensor, ranks: Sequence[int], outgoing: Sequence[int], incoming: Sequence[int]) -> Tensor:
    """Send `outgoing[k]` elements of `sent` to process `ranks[k]`, for every k; what came from each, one after the
    other."""
    counts = [[0] * dist.get_world_size() for _ in range(2)]
    for rank, out, into in zip(ranks, outgoing, incoming, strict=True):
        counts[0][rank], counts[1][rank] = out, into
    # Over the group of all processes, with nothing for the others: it exists in every layout, groups of two axes
    # (FSDP over TP) do not.
    received = sent.new_empty(sum(incoming))
    dist.all_to_all_single(received, sent, output_split_sizes=counts[1], input_split_sizes=counts[0])
    return received


def _everywhere(matrix: DTensor, piece: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """The way for any other placement: each process gathers the whole matrix and keeps its piece of the result."""
    mesh, placements = matrix.device_mesh, matrix.placements
    spread = DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=matrix.shape, stride=(matrix.shape[1], 1)
    )
    result = work(spread.full_tensor().contiguous())
    whole = DTensor.from_local(result.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements).to_local()
