"""Triton kernels of `rms_norm.py`: a row in registers, read once forward and once backward.

Forward one program has one row. Backward a fixed number of programs have every so many rows each, and keep their share
of the gain's gradient in registers until the end. Rows of more than 16,384 numbers do not fit and are refused.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 528  # of the backward pass: four for each multiprocessor of a Hopper GPU; fixed, so that sums are the same
_LONGEST = 16384


def rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rms_norm._rms_norm`."""
    rows, hidden = x.shape[:-1].numel(), x.shape[-1]
    wider = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(x.shape, dtype=dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=wider)
    inverse = x.new_empty(rows, dtype=torch.float32)
    block, warps = _block(hidden)
    if x.numel():
        _forward[(rows,)](
            x.contiguous(),
            None if residual is None else residual.contiguous(),
            weight.contiguous(),
            normed,
            total,
            inverse,
            eps,
            ADDS=residual is not None,
            HIDDEN=hidden,
            BLOCK=block,
            num_warps=warps,
        )
    return normed, total, inverse


def rms_norm_backward(
    grad_normed: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `rms_norm._rms_norm_backward`."""
    other = residual_dtype is not None and residual_dtype != x_dtype
    rows, hidden = len(inverse), total.shape[-1]
    grad_x = total.new_empty(total.shape, dtype=x_dtype)
    grad_residual = total.new_empty(total.shape if other else 0, dtype=residual_dtype or x_dtype)
    if total.numel() == 0:
        return grad_x, grad_residual, torch.zeros_like(weight)
    programs = min(PROGRAMS, rows)
    parts = total.new_empty(programs, hidden, dtype=torch.float32)
    block, warps = _block(hidden)
    _backward[(programs,)](
        None if grad_normed is None else grad_normed.contiguous(),
        None if grad_total is None else grad_total.contiguous(),
        total.contiguous(),
        weight.contiguous(),
        inverse,
        grad_x,
        grad_residual,
        parts,
        rows,
        programs,
        NORMED=grad_normed is not None,
        TOTAL=grad_total is not None,
        OTHER=other,
        ROWS_EACH=triton.cdiv(rows, programs),
        HIDDEN=hidden,
        BLOCK=block,
        num_warps=warps,
    )
    return grad_x, grad_residual, parts.sum(0).to(weight.dtype)


def _block(hidden: int) -> tuple[int, int]:
    if hidden > _LONGEST:
        raise ValueError(f"rows of {hidden:,} numbers do not fit into registers (at most {_LONGEST:,})")
    block = triton.next_power_of_2(max(hidden, 16))
    return block, min(16, max(1, block // 512))


@triton.jit
def _forward(
    x,
    residual,
    weight,
    normed,
    total,
    inverse,
    eps,
    ADDS: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HIDDEN
    places = row * HIDDEN + lanes
    values = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + places, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(total.dtype.element_ty)  # the norm is that of the sum as it goes on
        tl.store(total + places, rounded, mask=inside)
        values = rounded.to(tl.float32)
    gain = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / HIDDEN + eps)
    tl.store(inverse + row, scale)
    tl.store(normed + places, (values * scale * gain).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    grad_normed,
    grad_total,
    total,
    weight,
    inverse,
    grad_x,
    grad_residual,
    parts,
    rows,
    programs,
    NORMED: tl.constexpr,
    TOTAL: tl.constexpr,
    OTHER: tl.constexpr,
    ROWS_EACH: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    inside = lanes < HIDDEN
    gain = tl.load(weight + lanes, mask=inside, other=0.0).to(tl.float32)
    of_gain = tl.zeros([BLOCK], dtype=tl.float32)
    for step in range(ROWS_EACH):
        row = first + step * programs
        there = inside & (row < rows)
        places = row.to(tl.int64) * HIDDEN + lanes
        gradient = tl.zeros([BLOCK], dtype=tl.float32)
        if NORMED:
            scale = tl.load(inverse + row, mask=row < rows, other=0.0)
            unit = tl.load(total + places, mask=there, other=0.0).to(tl.float32) * scale
            above = tl.load(grad_normed + places, mask=there, other=0.0).to(tl.float32)
            of_gain += above * unit
            above *= gain
            gradient = (above - unit * (tl.sum(above * unit, 0) / HIDDEN)) * scale
        if TOTAL:
            gradient += tl.load(grad_total + places, mask=there, other=0.0).to(tl.float32)
        tl.store(grad_x + places, gradient.to(grad_x.dtype.element_ty), mask=there)
        if OTHER:
            tl.store(grad_residual + places, gradient.to(grad_residual.dtype.element_ty), mask=there)
    tl.store(parts + first.to(tl.int64) * HIDDEN + lanes, of_gain, mask=inside)
