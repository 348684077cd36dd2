"""What is alive on a process while a model runs on fake tensors, and what it sends.

Fake tensors have shapes and storage sizes, and no memory. Every operation passes by here on its way; each storage it
makes is written down when it comes and struck out when it goes, so the sum is what an allocator would hold. The traps:
FSDP frees and refills the storages of gathered weights without any operation, so resizing is watched as well; and
DTensor tries operations out on whole tensors to learn their shapes, which never exist and must not count.
"""

import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._tools.fake_collectives import CollectiveOp, collective_ops, sync_ops
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WEIGHTS, GRADIENTS, GATHERED, COPIES = "weights", "gradients", "gathered weights", "bf16 copies"
ACTIVATIONS, LOSS, MESSAGES = "activations", "loss", "communication"
TEACHER = "teacher"
BATCH = "batch"
_FOR_GOOD = (WEIGHTS, GRADIENTS, GATHERED, BATCH)

Moment = tuple[int, Counter[str]]  # bytes alive, and of what


class Tracker(TorchDispatchMode):
    """While entered, above the `FakeTensorMode` of its tensors: counts bytes alive by kind.

    `place` says where the run is; `peaks` has the fullest moment of each place. `sent` counts the bytes this process
    sends, by the name of the process group and whether it is an exchange of each with each.
    """

    def __init__(self, fake: FakeTensorMode) -> None:
        super().__init__()
        self.place = ""
        self.making = ACTIVATIONS  # what new storages are, unless the operation says otherwise
        self.peaks: dict[str, Moment] = {}
        self.sent: defaultdict[tuple[str, bool], float] = defaultdict(float)
        self._fake = fake
        self._held: dict[int, _Storage] = {}
        self._alive: Counter[str] = Counter()
        self._total = 0

    def note(self, tensor: Tensor, kind: str) -> None:
        """Write down the storage of `tensor`; one that is known already keeps its kind."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if not isinstance(tensor, FakeTensor) or tensor.fake_mode is not self._fake:
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._held:
            self._resize(address, storage.nbytes())
            return
        # An address is used again only after its storage has gone, and with it its entry.
        self._held[address] = _Storage(kind, storage.nbytes(), weakref.ref(storage, partial(self._gone, address)))
        self._add(kind, storage.nbytes())

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """From now on the storage of `tensor` counts as `kind`."""
        tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        if held := self._known(tensor):
            self._turn(held, kind)

    def what_stays_is(self, kind: str) -> None:
        """Everything alive that is not weights, gradients or the batch counts as `kind` from now on."""
        for held in self._held.values():
            if held.kind not in _FOR_GOOD:
                self._turn(held, kind)

    def __enter__(self) -> "Tracker":
        self._resizing = _watched_resizes(self)
        self._resizing.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._resizing.__exit__(None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it becomes operations on local tensors, which come by here again
        if func is torch.ops._c10d_functional.wait_tensor.default:
            return args[0]  # its stand-in for fake tensors would make a new tensor; the real one does not
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return True  # "do documents begin inside these rows?"; a fake tensor has no answer
        result = func(*args, **(kwargs or {}))
        kind = self._kind(func, args)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.note(tensor, kind)
        if func in collective_ops and func not in sync_ops:
            group = CollectiveOp.get_process_group(func, args)
            whole = CollectiveOp.get_comm_tensor_size(func, result, args, kwargs)
            self.sent[group.group_name, "all_to_all" in func.name()] += _bytes_sent(func.name(), whole, group.size())
        return result

    def _kind(self, func: Any, args: Any) -> str:
        if func.namespace in ("c10d", "fsdp"):  # they fill buffers made before
            for tensor in tree_leaves(args):
                held = self._known(tensor)
                if held and held.kind not in _FOR_GOOD:
                    self._turn(held, MESSAGES)
            return MESSAGES
        if func.namespace == "_c10d_functional":
            return MESSAGES
        if func is torch.ops.aten._to_copy.default:
            source = self._known(args[0])
            if source and source.kind in (WEIGHTS, GATHERED):
                return COPIES
        return self.making

    def _known(self, tensor: Any) -> "_Storage | None":
        return self._held.get(tensor.untyped_storage()._cdata) if isinstance(tensor, FakeTensor) else None

    def resized(self, storage: torch.UntypedStorage) -> None:
        """FSDP gathers weights into storages that it has emptied before, and empties them again."""
        held = self._held.get(storage._cdata)
        if held is not None:
            if held.nbytes == 0:
                held.kind = GATHERED
            self._resize(storage._cdata, storage.nbytes())

    def _resize(self, address: int, nbytes: int) -> None:
        held = self._held[address]
        if held.nbytes != nbytes:
            held.nbytes, change = nbytes, nbytes - held.nbytes
            self._add(held.kind, change)

    def _turn(self, held: "_Storage", kind: str) -> None:
        self._alive[held.kind] -= held.nbytes
        self._alive[kind] += held.nbytes
        held.kind = kind
        self._look()

    def _gone(self, address: int, _: Any) -> None:
        held = self._held.pop(address)
        self._add(held.kind, -held.nbytes)

    def _add(self, kind: str, nbytes: int) -> None:
        self._alive[kind] += nbytes
        self._total += nbytes
        if nbytes > 0:
            self._look()

    def _look(self) -> None:
        """Keep this moment if the place has seen none as full; of equal ones the last, which knows its kinds best."""
        if self._total >= self.peaks.get(self.place, (0,))[0]:
            self.peaks[self.place] = (self._total, Counter(self._alive))


class _Storage:
    """A storage that is alive; `alive` strikes it out when it goes."""

    __slots__ = ("alive", "kind", "nbytes")

    def __init__(self, kind: str, nbytes: int, alive: "weakref.ref[Any]") -> None:
        self.kind, self.nbytes, self.alive = kind, nbytes, alive


@contextmanager
def _watched_resizes(tracker: Tracker) -> Iterator[None]:
    resize = torch.UntypedStorage.resize_

    def watched(storage: torch.UntypedStorage, size: int) -> Any:
        result = resize(storage, size)
        tracker.resized(storage)
        return result

    torch.UntypedStorage.resize_ = watched  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]


def _bytes_sent(operation: str, whole: int, processes: int) -> float:
    """What one process sends in a ring, for a message that is `whole` bytes when put together."""
    passes = 2.0 if "all_reduce" in operation or "allreduce" in operation else 1.0
    if "all_to_all" in operation:
        passes = 0.5  # counted are what is sent and what is received
    return passes * whole * (processes - 1) / processes
