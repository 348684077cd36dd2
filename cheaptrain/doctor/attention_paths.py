"""Every way attention can be computed on this device, run forward and backward and held against plain arithmetic.

Two of them are what training takes: rows that are one document, and packed rows. The others are the kernels SDPA may
choose from for the first. A list of what a library claims to support is worth little: a kernel can be missing from the
build, refuse this head size, or (the trap) run and be wrong. So each runs, and its numbers are compared: the output and
the three gradients, against softmax written out in fp64.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cheaptrain.model.attention import attention_inputs, cheaptrain_attention

CAUSAL, PACKED, PACKED_FP32 = "causal rows", "packed rows", "packed, fp32"
TRAINED_WITH = (CAUSAL, PACKED)
_KERNELS = {
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    "SDPA math": SDPBackend.MATH,
}
_GPU_ONLY = ("SDPA cuDNN", "SDPA efficient", PACKED_FP32)
_ROWS = 2
_ALLOWED = {"cpu": {torch.float32: 1e-4}, "cuda": {torch.float32: 5e-3}}  # TF32 may be on
_ALLOWED_HALF = 5e-2


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
    return [name for name in (CAUSAL, PACKED, *_KERNELS, PACKED_FP32) if device == "cuda" or name not in _GPU_ONLY]


def run_path(name: str, shape: Shape, device: str, dtype: torch.dtype) -> Ran:
    """Run one path in `dtype` and compare it. An error, whatever it is, becomes part of the answer."""
    if name == PACKED_FP32:
        dtype = torch.float32
    generator = torch.Generator().manual_seed(0)
    sizes = ((_ROWS, heads, shape.seq, shape.head_dim) for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    inputs = [torch.randn(size, generator=generator).to(device, dtype) for size in sizes]
    weights = torch.randn(_ROWS, shape.heads, shape.seq, shape.head_dim, generator=generator).to(device)
    documents = _documents(shape.seq, packed=name in (PACKED, PACKED_FP32))
    allowed = _ALLOWED[device].get(dtype, _ALLOWED_HALF)
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter("always")
        try:
            got = _forward_backward(partial(_attention, name, documents=documents), inputs, weights)
        except Exception as error:
            return Ran(None, allowed, _in_words(error, [str(reason.message) for reason in reasons]))
    expected = _forward_backward(
        partial(_written_out, documents=documents.to(device)), [x.double() for x in inputs], weights.double()
    )
    differences = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]
    return Ran(torch.tensor(differences).max().item(), allowed)  # Python's max() can lose a NaN


def _attention(name: str, query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor) -> Tensor:
    """`[rows, heads, seq, head_dim]` by the path of this name."""
    if name not in _KERNELS:
        inputs = attention_inputs(documents, True, query.device)
        return cheaptrain_attention(nn.Module(), query, key, value, None, **inputs)[0].transpose(1, 2)
    with sdpa_kernel([_KERNELS[name]]):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
        )


def _written_out(query: Tensor, key: Tensor, value: Tensor, *, documents: Tensor) -> Tensor:
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    allowed = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # [rows, 1, seq, seq]
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def _forward_backward(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], weights: Tensor
) -> list[Tensor]:
    """The output and the gradients of query, key and value."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs)
    output = attend(query, key, value)
    gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), (query, key, value))
    if output.is_cuda:
        torch.cuda.synchronize()
    return [output.detach(), *gradients]


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
