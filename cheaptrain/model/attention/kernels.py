"""The kernels that attention on a GPU may run in, by name, behind one signature each for causal and for packed rows.

    causal(query, key, value, dropout, scaling)               rows that are one document each
    packed(query, key, value, boundaries, dropout, scaling)   rows laid end to end as one batch of documents

Both take `[rows, heads, seq, head_dim]` with the key and value heads as they are, fewer than those of the query where
these are grouped, in half precision, and return `[rows, seq, heads, head_dim]`.

    cudnn, flash, efficient   causal: torch's scaled_dot_product_attention, with the one that is named first in line
    varlen                    packed: torch.nn.attention.varlen
    flash2, flash3, flash4    both: the flash-attn libraries, where they are installed (`libraries.py`)

The trap it avoids: SDPA left to itself takes flash, which is a third slower than cuDNN on Hopper GPUs; and it takes
something else without a word where the one asked for cannot do a shape, so a trial has to allow that one alone
(`sdpa_alone`). Which kernel a run takes is measured at its start (`choice.py`).
"""

import inspect
from typing import Any

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.attention import libraries

CUDNN, FLASH, EFFICIENT, VARLEN = "cudnn", "flash", "efficient", "varlen"
CAUSAL_KERNELS = (CUDNN, FLASH, EFFICIENT, *libraries.NAMES)
PACKED_KERNELS = (VARLEN, *libraries.NAMES)
LABELS = {CUDNN: "cuDNN", FLASH: "flash", EFFICIENT: "efficient", VARLEN: "varlen", **libraries.LABELS}

_BACKENDS = {
    CUDNN: SDPBackend.CUDNN_ATTENTION,
    FLASH: SDPBackend.FLASH_ATTENTION,
    EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
}
# The others stay in line, for shapes that the first cannot do: evaluation has some of its own.
_IN_LINE = {
    name: [first, *(other for other in _BACKENDS.values() if other is not first), SDPBackend.MATH]
    for name, first in _BACKENDS.items()
}
_VARLEN_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.13 does, 2.11 does not
_DROPPING = frozenset({CUDNN, FLASH, EFFICIENT, "flash2"})


def causal(kernel: str, query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    """Causal attention by a kernel of CAUSAL_KERNELS; see above for shapes."""
    if kernel in libraries.NAMES:
        _refuse_dropout(kernel, dropout)
        return libraries.causal(kernel, query, key, value, dropout, scaling)
    with sdpa_kernel(_IN_LINE[kernel], set_priority=True):
        return _sdpa(query, key, value, dropout, scaling)


def sdpa_alone(kernel: str, query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    """Causal attention by this kernel of SDPA and no other; raises RuntimeError where it cannot do it."""
    with sdpa_kernel([_BACKENDS[kernel]]):
        return _sdpa(query, key, value, 0.0, scaling)


def packed(
    kernel: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention within documents by a kernel of PACKED_KERNELS; see above for shapes. `boundaries`: where the
    documents begin in rows laid end to end, and the end; int32, on the device."""
    rows, heads, seq, dim = query.shape
    _refuse_dropout(kernel, dropout)
    if kernel == VARLEN and not _VARLEN_KNOWS_GQA and heads != key.shape[1]:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    query, key, value = (x.transpose(1, 2).reshape(rows * seq, x.shape[1], dim) for x in (query, key, value))
    if kernel == VARLEN:
        output = _varlen(query, key, value, boundaries, seq, scaling)
    else:
        output = libraries.packed(kernel, query, key, value, boundaries, seq, dropout, scaling)
    return output.view(rows, seq, heads, dim)


def drops(kernel: str) -> bool:
    """Whether a kernel knows attention dropout."""
    return kernel in _DROPPING


def _sdpa(query: Tensor, key: Tensor, value: Tensor, dropout: float, scaling: float | None) -> Tensor:
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        dropout_p=dropout,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scaling: float | None
) -> Tensor:
    """torch's, `[tokens, heads, dim]`."""
    extra: dict[str, Any] = {"enable_gqa": query.shape[1] != key.shape[1]} if _VARLEN_KNOWS_GQA else {}
    output = varlen_attn(
        query, key, value, boundaries, boundaries, longest, longest, scale=scaling, window_size=(-1, 0), **extra
    )
    assert isinstance(output, Tensor)
    return output


def _refuse_dropout(kernel: str, dropout: float) -> None:
    if dropout > 0 and not drops(kernel):
        raise CheaptrainError(
            f"attention dropout is {dropout}, which the GPU kernel {LABELS[kernel]} does not do: set the model's "
            "attention dropout to 0 in model.overrides, or data.document_mask = false (packed documents have no other "
            "kernel), or train.attention to one that does"
        )
