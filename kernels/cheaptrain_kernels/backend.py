"""Which code turns logits into losses and gradients: Triton kernels on a GPU that has Triton, plain torch elsewhere.

Triton is imported by the first kernel that is launched, never before: a CPU machine needs none. The trap of choosing by
what can be imported is that a test of one path runs the other; `use_backend` settles it for a block of code.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Literal

import torch

Backend = Literal["torch", "triton"]

_forced: ContextVar[Backend | None] = ContextVar("cheaptrain_kernels_backend", default=None)


@contextmanager
def use_backend(backend: Backend) -> Iterator[None]:
    """Take this one inside the block, whatever the device: for tests, benchmarks, and plans of another machine.

    "triton" on CPU tensors runs in Triton's interpreter, where it was chosen before triton was imported
    (TRITON_INTERPRET=1), and on fake tensors runs nothing: shapes and memory are those of the GPU. Raises ValueError
    for another name.
    """
    if backend not in ("torch", "triton"):
        raise ValueError(f'there is no backend {backend!r}: "torch" or "triton"')
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def backend_for(device: torch.device) -> Backend:
    """The one that tensors on `device` are given to."""
    if (forced := _forced.get()) is not None:
        return forced
    return "triton" if device.type == "cuda" and _has_triton() else "torch"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
