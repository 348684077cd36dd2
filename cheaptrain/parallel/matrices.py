"""Work that needs whole matrices, over matrices that lie in pieces on many processes.

The processes that hold one copy of a matrix are dealt the matrices in turn, largest first: every round they send their
pieces of some matrices for each of them, each matrix to its owner, the owner works on the whole of those, and the
pieces of the results go back the same way. So no process ever holds more than a bounded stack of whole matrices, and
none repeats another's work. Copies (HSDP, or a matrix that tensor parallelism left whole) work on their own: repeating
is cheaper than sending between nodes. Matrices of one shape are worked on as one stack: a small matrix alone leaves a
GPU idle, and a model has a hundred of each shape.

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

STACK_BYTES = 64 * 1024**2  # of whole matrices that a process works on at once; one that is larger goes alone
_ELEMENT_BYTES = 2  # bf16, which is what is sent

Pieces = Callable[[Sequence[int]], list[Tensor]]
Work = Callable[[Tensor], Tensor]


def whole_matrices(
    matrices: Sequence[Tensor], pieces: Pieces, work: Work, *, stack_bytes: int = STACK_BYTES
) -> Iterator[tuple[list[int], list[Tensor]]]:
    """Yields numbers of matrices and this process's pieces of `work` on the whole of each, until all were there.

    `matrices` give shapes and placements (plain tensors, or DTensors; their values are not read); `pieces(numbers)`,
    called once for each number, are this process's pieces of what is to be worked on, laid out like the matrices, of
    at most 2 bytes an element. `work` takes a stack of whole matrices of one shape, `[n, rows, columns]`, which it may
    overwrite, and returns one of the same shape and dtype. Collective: all processes ask for the same matrices and take
    all results.

    Sent and received per process: its pieces once in each direction, and the matrices it owns. Held at a time: the
    pieces of one round and the matrices it owns in that round, each about `stack_bytes`, or one matrix if that is more.
    """
    alone: dict[torch.Size, list[int]] = {}
    shared: dict[tuple[int, ...], list[tuple[int, _Copy]]] = {}
    for i, matrix in enumerate(matrices):
        if not isinstance(matrix, DTensor):
            alone.setdefault(matrix.shape, []).append(i)
            continue
        copy = _copy(matrix.shape, matrix.device_mesh, matrix.placements, dist.get_rank())
        if copy is None:
            yield [i], [_everywhere(matrix, pieces([i])[0], work)]
        elif len(copy.ranks) == 1:
            alone.setdefault(matrix.shape, []).append(i)
        else:
            shared.setdefault(copy.ranks, []).append((i, copy))
    for shape, numbers in alone.items():
        at_once = max(1, stack_bytes // max(1, shape.numel() * _ELEMENT_BYTES))
        for start in range(0, len(numbers), at_once):
            some = numbers[start : start + at_once]
            yield some, list(work(torch.stack(pieces(some))).unbind())
    for ranks, dealt in shared.items():
        dealt.sort(key=lambda entry: (-entry[1].cost, entry[1].shape))  # stable, so the same everywhere
        for turn in _rounds(dealt, len(ranks), stack_bytes):
            yield [i for i, _ in turn], _round(turn, pieces, work)


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


def _rounds(
    dealt: Sequence[tuple[int, _Copy]], processes: int, stack_bytes: int
) -> Iterator[Sequence[tuple[int, _Copy]]]:
    """Cut into rounds in which no process owns more than `stack_bytes`, or one matrix. The j-th of a round is owned by
    process j modulo their number."""
    start = 0
    while start < len(dealt):
        held, stop = 0, start
        while stop < len(dealt):
            largest = max(math.prod(copy.shape) for _, copy in dealt[stop : stop + processes]) * _ELEMENT_BYTES
            if stop > start and held + largest > stack_bytes:
                break
            held, stop = held + largest, stop + processes
        yield dealt[start:stop]
        start = stop


def _round(turn: Sequence[tuple[int, _Copy]], pieces: Pieces, work: Work) -> list[Tensor]:
    """`work` on the whole of each matrix by its owner; this process's pieces of all the results, in order."""
    copies = [copy for _, copy in turn]
    ranks = copies[0].ranks
    me, size = ranks.index(dist.get_rank()), len(ranks)
    # By owner: what a process sends to it, or gets back from it, is one message.
    order = [j for owner in range(size) for j in range(owner, len(turn), size)]
    mine = copies[me::size]
    theirs = [sum(copy.size(me) for copy in copies[owner::size]) for owner in range(size)]
    owned = [sum(copy.size(holder) for copy in mine) for holder in range(size)]

    # Nothing has a name longer than it is needed: whole matrices are large.
    arrived = _exchange(_side_by_side([turn[j] for j in order], pieces, me), ranks, theirs, owned)
    if mine:
        stacks = _stacks(mine, arrived, size)
        del arrived
        results: dict[int, Tensor] = {}
        while stacks:
            numbers, stack = stacks.pop()
            results |= zip(numbers, work(stack).unbind(), strict=True)
            del stack
        arrived = torch.cat([mine[j].of(results[j], at).flatten() for at in range(size) for j in range(len(mine))])
        del results
    returned = _exchange(arrived, ranks, owned, theirs).split([copies[j].size(me) for j in order])
    parts = {j: part.view(copies[j].piece_shape(me)) for j, part in zip(order, returned, strict=True)}
    return [parts[j] for j in range(len(turn))]


def _side_by_side(turn: Sequence[tuple[int, _Copy]], pieces: Pieces, me: int) -> Tensor:
    """The pieces of this process, one after the other in one vector."""
    tensors = pieces([i for i, _ in turn])
    for tensor, (_, copy) in zip(tensors, turn, strict=True):
        if tensor.shape != copy.piece_shape(me):
            raise CheaptrainError(
                f"process {copy.ranks[me]} has {list(tensor.shape)} of a matrix {list(copy.shape)}; its placement "
                f"says {list(copy.piece_shape(me))}"
            )
    return torch.cat([tensor.flatten() for tensor in tensors])


def _stacks(copies: Sequence[_Copy], parts: Tensor, holders: int) -> list[tuple[list[int], Tensor]]:
    """The whole matrices, those of one shape as one stack with their numbers in `copies`, from the pieces of all
    holders: those of the first one, in the order of the matrices, then those of the next."""
    shapes: dict[tuple[int, int], list[int]] = {}
    for j, copy in enumerate(copies):
        shapes.setdefault(copy.shape, []).append(j)
    stacks = [(numbers, parts.new_empty((len(numbers), *shape))) for shape, numbers in shapes.items()]
    whole = {j: matrix for numbers, stack in stacks for j, matrix in zip(numbers, stack, strict=True)}
    places = [(holder, j) for holder in range(holders) for j in range(len(copies))]
    for part, (holder, j) in zip(parts.split([copies[j].size(holder) for holder, j in places]), places, strict=True):
        copies[j].of(whole[j], holder).copy_(part.view(copies[j].piece_shape(holder)))
    return stacks


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


def _everywhere(matrix: DTensor, piece: Tensor, work: Work) -> Tensor:
    """The way for any other placement: each process gathers the whole matrix and keeps its piece of the result."""
    mesh, placements = matrix.device_mesh, matrix.placements
    spread = DTensor.from_local(
        piece, mesh, placements, run_check=False, shape=matrix.shape, stride=(matrix.shape[1], 1)
    )
    result = work(spread.full_tensor().contiguous()[None])[0]
    whole = DTensor.from_local(result.contiguous(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements).to_local()
