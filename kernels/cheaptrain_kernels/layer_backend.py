"""The choice of `backend.py` for kernels that are called inside compiled layers.

torch.compile cannot look into a context variable, and breaks a graph over one. So while it traces, the device alone
decides, and `use_backend` has no say: what is compiled serves long after the block it was asked for in.
"""

import importlib.util

import torch

from cheaptrain_kernels.backend import Backend, backend_for

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def layer_backend(device: torch.device) -> Backend:
    """The one that tensors on `device` are given to."""
    if torch.compiler.is_compiling():
        return "triton" if device.type == "cuda" and _HAS_TRITON else "torch"
    return backend_for(device)
