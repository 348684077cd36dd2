"""The processes of a run: who is here, and how they agree.

Accelerate starts them and makes the process group; this is what the rest of cheaptrain knows of it. There is always a
group, of one process too, so no code asks whether it is distributed. Two further groups carry what is not training:
`control` for small agreements over the CPU (a signal, an error, who found which checkpoint), and `saving` for the
threads that write checkpoints, whose messages must never get between those of training.

The trap: one process that fails alone leaves the others waiting in the next collective. What only the main process
does (read, write, refuse) therefore goes through `on_main`, which tells all of them how it ended.
"""

import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor
from torch.distributed import HashStore, ProcessGroup

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.parallel.mesh import make_mesh

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """This process among all. `control` and `saving` are gloo groups of all of them."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    control: ProcessGroup
    saving: ProcessGroup

    @property
    def is_main(self) -> bool:
        """Whether this is the process that prints, writes records and commits checkpoints."""
        return self.rank == 0

    def on_main(self, work: Callable[[], T]) -> T:
        """What `work` returns on the main process, on every process; what it raises, everywhere as well.

        The result must be picklable and small. An error that cannot be sent arrives as a CheaptrainError of its text.
        """
        if self.size == 1:
            return work()
        outcome: list[Any] = [None]
        failure: BaseException | None = None
        if self.is_main:
            try:
                outcome = [("result", work())]
            except Exception as error:
                failure = error
                outcome = [("error", _portable(error))]
        dist.broadcast_object_list(outcome, src=0, group=self.control)
        kind, value = outcome[0]
        if failure is not None:
            raise failure
        if kind == "error":
            raise value
        return value

    def all_of(self, value: T) -> list[T]:
        """`value` of every process, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def any_of(self, flag: bool) -> bool:
        """Whether `flag` holds on any process. All of them must ask."""
        if self.size == 1:
            return flag
        asked = torch.tensor([int(flag)])
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=self.control)
        return bool(asked.item())

    def sum(self, values: Tensor) -> Tensor:
        """CPU `values` summed over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def wait_for_all(self) -> None:
        """Return when every process has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)


def join(timeout_seconds: float) -> Processes:
    """Become one of the processes that the launcher started. Call once, before anything else is distributed.

    A message that nobody answers for `timeout_seconds` fails. Call again: the same processes.
    """
    global _joined
    if _joined is not None:
        return _joined
    on_gpu = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() not in ("1", "true")
    patience = timedelta(seconds=timeout_seconds)
    if not dist.is_initialized():
        # Before Accelerate, which knows one backend only: training runs over NCCL, agreements over gloo.
        backend = "cuda:nccl,cpu:gloo" if on_gpu else "gloo"
        if "RANK" in os.environ:
            if on_gpu:
                _take_gpu(int(os.environ["LOCAL_RANK"]))
            dist.init_process_group(backend, timeout=patience)
        else:
            dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=patience)
    # mixed_precision is ours; the launcher's wish for another one is refused where recipes are read.
    state = Accelerator(cpu=not on_gpu, mixed_precision="no")
    if dist.get_world_size() != state.num_processes:
        raise CheaptrainError(
            f"the launcher speaks of {state.num_processes} processes, and {dist.get_world_size()} came together"
        )
    _joined = Processes(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        device=state.device,
        control=dist.new_group(backend="gloo", timeout=patience),
        saving=dist.new_group(backend="gloo", timeout=patience),
    )
    return _joined


def _take_gpu(number: int) -> None:
    if number >= torch.cuda.device_count():
        raise PreflightError(
            f"process {number} of this machine has no GPU of its own: {torch.cuda.device_count()} are visible. Start "
            "one process a GPU (`cheaptrain launch` counts them), and let each process see all of them"
        )
    torch.cuda.set_device(number)


def leave() -> None:
    """Take the process groups down, so that the process ends without a complaint."""
    global _joined
    _joined = None
    make_mesh.cache_clear()  # its groups go with the others
    if dist.is_initialized():
        dist.destroy_process_group()


_joined: Processes | None = None


def _portable(error: Exception) -> Exception:
    """The error as it can be sent to another process."""
    try:
        again = pickle.loads(pickle.dumps(error))
        return again if str(again) == str(error) else CheaptrainError(f"{type(error).__name__}: {error}")
    except Exception:
        return CheaptrainError(f"{type(error).__name__}: {error}")
