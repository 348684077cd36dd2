"""Every way attention can be computed on this device, run forward and backward and held against plain arithmetic.

Two of them are what training takes unless it finds a faster one when it starts: rows that are one document, and packed
rows. The others are the kernels that it may find (`kernels.py`), of SDPA for the first and of the flash-attn
libraries for both, and plain arithmetic. The numbers are compared with softmax written out in fp64.
"""

import warnings
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cheaptrain.model.attention import DEFAULT, AttentionChoice, attention_inputs, cheaptrain_attention, libraries
from cheaptrain.model.attention.check import HALF_ALLOWED, forward_backward, largest_difference, written_out

CAUSAL, PACKED, PACKED_FP32 = "causal rows", "packed rows", "packed, fp32"
TRAINED_WITH = (CAUSAL, PACKED)
_KERNELS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
_LIBRARIES = {label: name for name, label in libraries.LABELS.items()}
_LIBRARIES_PACKED = {f"{label}, packed": name for label, name in _LIBRARIES.items()}
_GPU_ONLY = ("SDPA cuDNN", "SDPA efficient", PACKED_FP32, *_LIBRARIES, *_LIBRARIES_PACKED)
_ROWS = 2
_ALLOWED = {"cpu": {torch.float32: 1e-4}, "cuda": {torch.float32: 5e-3}}  # TF32 may be on


@dataclass(frozen=True)
class Shape:
    """One attention layer, and tokens a row."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    seq: int = 256


@dataclass(frozen=True)
class Ran:
    """What became of one path. `difference`: the largest, relative to the largest number; None when it did not run."""

    difference: float | None
    allowed: float
    error: str = ""

    @property
    def right(self) -> bool:
        return self.difference is not None and self.difference <= self.allowed


def paths_on(device: str) -> list[str]:
    """Names of what can be tried on a device, those of training first."""
    names = (CAUSAL, PACKED, *_KERNELS, *_LIBRARIES, *_LIBRARIES_PACKED, PACKED_FP32)
    return [name for name in names if device == "cuda" or name not in _GPU_ONLY]


def run_path(name: str, shape: Shape, device: str, dtype: torch.dtype) -> Ran:
    """Run one path in `dtype` and compare it. An error, whatever it is, becomes part of the answer."""
    if name == PACKED_FP32:
        dtype = torch.float32
    if library := _LIBRARIES.get(name) or _LIBRARIES_PACKED.get(name):
        reason = "half precision only" if dtype == torch.float32 else libraries.why_not(library)
        if reason is not None:
            return Ran(None, HALF_ALLOWED, reason)
    generator = torch.Generator().manual_seed(0)
    sizes = ((_ROWS, heads, shape.seq, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    weights = torch.randn(_ROWS, shape.heads, shape.seq, shape.head_dim, generator=generator).to(device)
    documents = _documents(shape.seq, packed=name in (PACKED, PACKED_FP32, *_LIBRARIES_PACKED))
    allowed = _ALLOWED[device].get(dtype, HALF_ALLOWED)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            got = forward_backward(partial(_attention, name, documents=documents), inputs, weights)
        except Exception as error:
            return Ran(None, allowed, _in_words(error, [str(reason.message) for reason in reasons]))
    expected = forward_backward(
        partial(written_out, documents=documents.to(device)), [x.double() for x in inputs], weights.double()
    )
    return Ran(largest_difference(got, expected), allowed)


def _attention(name: str, query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor) -> Tensor:
    """`[rows, heads, seq, head_dim]` by the path of this name."""
    if name not in _KERNELS:
        library = _LIBRARIES.get(name) or _LIBRARIES_PACKED.get(name)
        choice = AttentionChoice(library, library) if library else DEFAULT
        inputs = attention_inputs(documents, True, query.device, choice=choice)
        return cheaptrain_attention(nn.Module(), query, key, value, None, **inputs)[0].transpose(1, 2)
    with sdpa_kernel([_KERNELS[name]]):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )


def _documents(seq: int, *, packed: bool) -> Tensor:
    """Document of each token, `[rows, seq]`; packed: three of them, cut at other places in each row."""
    positions = torch.arange(seq).expand(_ROWS, seq)
    if not packed:
        return torch.zeros_like(positions)
    cuts = torch.tensor([[seq // 5, seq // 2], [seq // 3, seq - 1]])  # [rows, cuts]
    return (positions[:, :, None] >= cuts[:, None, :]).sum(-1)


def _in_words(error: Exception, reasons: list[str]) -> str:
    """First line of the error, and what SDPA warned of: it gives the reason of a refusal as a warning only."""
    lines = str(error).splitlines() or [type(error).__name__]
    told = dict.fromkeys(reason.split(" (Triggered internally")[0].strip() for reason in reasons)
    # Of kernels that were not asked for it warns as well: that they are disabled.
    useful = [reason for reason in told if not any(word in reason for word in ("not used because", "disabled"))]
    return "; ".join([lines[0], *useful][:3])
