"""The messages of training, timed and checked: all-reduce, all-gather, reduce-scatter, and the clocks of the machines.

FSDP gathers weights and scatters gradients; sums travel by all-reduce. A link can be up and slow, or (the trap) fast
and wrong: broken direct access between GPUs loses writes without any error. So every process sends numbers from which
the right answer is known exactly.

Bandwidths are reckoned as NCCL's own tests do. `algorithm`: size of the whole buffer ÷ time. `bus`: what each process
has to send for it, by the best algorithm: algorithm x 2(n-1)/n for all-reduce, x (n-1)/n for the other two; that one
can be compared with the speed of the wire.
"""

import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from cheaptrain.parallel.processes import Processes

ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER = OPERATIONS = ("all-reduce", "all-gather", "reduce-scatter")
_SIZES = (4_000, 1_000_000, 16_000_000)
_SIZES_ON_GPU = (*_SIZES, 256_000_000)
_SECONDS_EACH = 0.2
_MOST_REPEATS = 20
_CLOCK_ROUNDS = 5


@dataclass(frozen=True)
class Timing:
    """One operation at one size. `bytes`: the whole buffer, fp32; `seconds`: of one, of the slowest process."""

    operation: str
    bytes: int
    seconds: float
    right: bool

    @property
    def algorithm(self) -> float:
        """Bytes a second."""
        return self.bytes / self.seconds

    def bus(self, processes: int) -> float:
        """Bytes a second over the wire."""
        factor = (processes - 1) / processes
        return self.algorithm * factor * (2 if self.operation == ALL_REDUCE else 1)


@dataclass(frozen=True)
class Clocks:
    """Wall clocks against that of process 0, in seconds, by process; each known to `within` seconds."""

    hosts: tuple[str, ...]
    ahead: tuple[float, ...]
    within: float


def measure(processes: Processes, seconds: float, begins: Callable[[str], None]) -> Iterator[Timing]:
    """Time the operations, small sizes first, for about `seconds` at most: larger sizes that would take longer are
    left out. `begins` is told what comes next. All processes must call it, and get the same but for rounding."""
    ends = time.monotonic() + seconds
    for size in _SIZES_ON_GPU if processes.device.type == "cuda" else _SIZES:
        slowest = 0.0
        for operation in OPERATIONS:
            begins(f"{operation} of {size:,} bytes")
            timing = _time(operation, max(1, size // (4 * processes.size)), processes)
            slowest = max(slowest, timing.seconds)
            yield timing
        # The next size has 16 or 250 times the bytes, three operations, each run four times or more.
        left = min(processes.all_of(ends - time.monotonic()))
        if 16 * slowest * len(OPERATIONS) * 4 > left:
            return


def _time(operation: str, share: int, processes: Processes) -> Timing:
    """One operation on a buffer of `share` numbers for each process."""
    run = _OPERATIONS[operation]
    zeros = torch.zeros(share * processes.size, device=processes.device)
    right = _is_right(operation, share, processes)
    once = max(processes.all_of(_seconds(run, zeros, processes, 1)))
    repeats = max(1, min(_MOST_REPEATS, int(_SECONDS_EACH / max(once, 1e-6))))
    seconds = max(processes.all_of(_seconds(run, zeros, processes, repeats)))
    right = _is_right(operation, share, processes) and right
    return Timing(operation, 4 * zeros.numel(), seconds, all(processes.all_of(right)))


def _seconds(run: Callable[[Tensor, int], Tensor], buffer: Tensor, processes: Processes, repeats: int) -> float:
    processes.wait_for_all()
    began = time.perf_counter()
    for _ in range(repeats):
        run(buffer, processes.rank)
    if buffer.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def _is_right(operation: str, share: int, processes: Processes) -> bool:
    buffer = numbers(processes.rank, share * processes.size).to(processes.device)
    if operation == ALL_GATHER:
        buffer = buffer[:share].repeat(processes.size)
    answer = _OPERATIONS[operation](buffer, processes.rank)
    return torch.equal(answer.cpu(), expected(operation, share, processes.size, processes.rank))


def numbers(rank: int, count: int) -> Tensor:
    """What a process sends: whole numbers whose sums over thousands of processes are exact in fp32."""
    return (rank + 1) * (torch.arange(count) % 13 + 1).float()


def expected(operation: str, share: int, size: int, rank: int) -> Tensor:
    """The answer that process `rank` of `size` must get."""
    if operation == ALL_GATHER:
        return torch.cat([numbers(other, share) for other in range(size)])
    total = numbers(0, share * size) * (size * (size + 1) // 2)
    return total if operation == ALL_REDUCE else total[rank * share : (rank + 1) * share]


def _all_reduce(buffer: Tensor, rank: int) -> Tensor:
    dist.all_reduce(buffer)
    return buffer


def _all_gather(buffer: Tensor, rank: int) -> Tensor:
    share = buffer.numel() // dist.get_world_size()
    gathered = torch.empty_like(buffer)
    dist.all_gather_into_tensor(gathered, buffer[:share])
    return gathered


def _reduce_scatter(buffer: Tensor, rank: int) -> Tensor:
    scattered = buffer.new_empty(buffer.numel() // dist.get_world_size())
    dist.reduce_scatter_tensor(scattered, buffer)
    return scattered


_OPERATIONS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    ALL_REDUCE: _all_reduce,
    ALL_GATHER: _all_gather,
    REDUCE_SCATTER: _reduce_scatter,
}


def compare_clocks(processes: Processes) -> Clocks:
    """Compare the wall clocks of all processes. They leave a barrier within the time that it takes."""
    hosts = tuple(processes.all_of(socket.gethostname()))
    best: tuple[float, Sequence[float]] | None = None
    for _ in range(_CLOCK_ROUNDS):
        processes.wait_for_all()
        began = time.perf_counter()
        processes.wait_for_all()
        now, took = time.time(), time.perf_counter() - began
        read = processes.all_of((now, took))
        within = max(took for _, took in read)
        if best is None or within < best[0]:
            best = (within, [now for now, _ in read])
    assert best is not None
    within, wall = best
    return Clocks(hosts, tuple(now - wall[0] for now in wall), within)
