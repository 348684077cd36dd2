"""What the processes that write one checkpoint say to each other.

Each of them may meet a full disk, and none may go on without the others: so every stretch of work ends with all of them
knowing how it went for each, and a failure is raised on all. They speak over the group that only saving uses, so this
runs in a background thread while training sends its own messages. The trap is the error in the middle of an exchange:
whoever stops listening leaves the others waiting, so work that sends or receives must do so to its end, whatever
happened, and only then fail.
"""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from cheaptrain.errors import CheaptrainError
from cheaptrain.parallel.processes import Processes

T = TypeVar("T")

_MESSAGE_BYTES = 2**26


class SaveFailed(CheaptrainError):
    """A checkpoint could not be written. The older ones are intact, the temporary folder is gone, the run may go on."""


class ProofFailed(CheaptrainError):
    """What was written is not the live model. The run must stop: no later save can be trusted either."""


class DiskTrouble(OSError):
    """The disk refused on some process; the text says which and how."""


def gather(processes: Processes, value: T) -> list[T]:
    """`value` of every process, by rank, over the group of saving. Collective.

    Raises CheaptrainError when one of them is gone.
    """
    if processes.size == 1:
        return [value]
    values: list[Any] = [None] * processes.size
    try:
        dist.all_gather_object(values, value, group=processes.saving)
    except RuntimeError as error:  # what gloo raises for a connection that broke, and for a time-out
        raise CheaptrainError(f"a process went away, or hangs, while a checkpoint was being saved: {error}") from error
    return values


def all_do(processes: Processes, work: Callable[[], T]) -> list[T]:
    """What `work` returned on every process, by rank; when it failed on any, its error on all. Collective.

    The gravest error wins: ProofFailed, then whatever nobody expected, then the disk's (as DiskTrouble, or as it came
    where there is one process).
    """
    if processes.size == 1:
        return [work()]
    own: Exception | None = None
    try:
        outcome: tuple[str, Any] = ("done", work())
    except Exception as error:
        own, outcome = error, (_kind(error), f"{type(error).__name__}: {error}")
        if isinstance(error, CheaptrainError | OSError):
            outcome = (outcome[0], str(error))
    outcomes = gather(processes, outcome)
    for kind, raised in _GRAVEST_FIRST.items():
        for rank, (what, value) in enumerate(outcomes):
            if what == kind:
                if rank == processes.rank and own is not None:
                    raise own
                raise raised(f"process {rank}: {value}") from own
    return [value for _, value in outcomes]


def on_first(processes: Processes, work: Callable[[], T]) -> T:
    """What `work` returns on the main process, on all; its error on all. Collective."""
    return all_do(processes, lambda: work() if processes.is_main else None)[0]  # type: ignore[return-value]


def send(tensor: Tensor, to: int, processes: Processes) -> None:
    """Send a CPU tensor's bytes."""
    for part in _messages(tensor):
        dist.send(part, to, group=processes.saving)


def receive(tensor: Tensor, source: int, processes: Processes) -> None:
    """Fill a contiguous CPU tensor with the bytes that `source` sends."""
    for part in _messages(tensor):
        dist.recv(part, source, group=processes.saving)


def is_disk_trouble(error: BaseException) -> bool:
    """Whether the disk refused, however the library at hand says so (tokenizers raises a bare Exception). A peer that
    went away is none."""
    if isinstance(error, OSError | SafetensorError):
        return not isinstance(error, ConnectionError)
    return isinstance(error, Exception) and "os error" in str(error)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous tensor's bytes, as a flat uint8 view."""
    return tensor.reshape(-1).view(torch.uint8)


def _messages(tensor: Tensor) -> Iterator[Tensor]:
    yield from as_bytes(tensor).split(_MESSAGE_BYTES) if tensor.numel() else ()


def _kind(error: Exception) -> str:
    if isinstance(error, ProofFailed):
        return "proof"
    return "disk" if is_disk_trouble(error) else "other"


_GRAVEST_FIRST: dict[str, Callable[[str], Exception]] = {
    "proof": ProofFailed,
    "other": CheaptrainError,
    "disk": DiskTrouble,
}
