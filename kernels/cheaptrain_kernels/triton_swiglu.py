"""Triton kernels of `swiglu.py`: each program has a stretch of one row. Element by element; nothing is reduced."""

import triton
import triton.language as tl
from torch import Tensor

_MOST = 2048  # columns of a program


def swiglu(gate_up: Tensor) -> Tensor:
    """See `swiglu.swiglu`."""
    output = gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)
    if output.numel():
        block, warps, grid = _grid(output)
        _forward[grid](gate_up.contiguous(), output, FFN=output.shape[-1], BLOCK=block, num_warps=warps)
    return output


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """See `swiglu._swiglu_backward`."""
    output = gate_up.new_empty(gate_up.shape)
    if output.numel():
        block, warps, grid = _grid(gradient)
        _backward[grid](
            gradient.contiguous(),
            gate_up.contiguous(),
            output,
            FFN=gradient.shape[-1],
            BLOCK=block,
            num_warps=warps,
        )
    return output


def _grid(output: Tensor) -> tuple[int, int, tuple[int, int]]:
    """Columns and warps of a program, and how many programs: rows first, of which there may be more than 65,535."""
    ffn = output.shape[-1]
    block = min(triton.next_power_of_2(max(ffn, 16)), _MOST)
    return block, max(1, block // 512), (output.shape[:-1].numel(), triton.cdiv(ffn, block))


@triton.jit
def _forward(gate_up, output, FFN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FFN
    gate = tl.load(gate_up + row * 2 * FFN + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * FFN + FFN + columns, mask=inside, other=0.0).to(tl.float32)
    result = gate * tl.sigmoid(gate) * up
    tl.store(output + row * FFN + columns, result.to(output.dtype.element_ty), mask=inside)


@triton.jit
def _backward(gradient, gate_up, output, FFN: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < FFN
    above = tl.load(gradient + row * FFN + columns, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_up + row * 2 * FFN + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * FFN + FFN + columns, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    of_gate = above * up * share * (1.0 + gate * (1.0 - share))
    of_up = above * gate * share
    tl.store(output + row * 2 * FFN + columns, of_gate.to(output.dtype.element_ty), mask=inside)
    tl.store(output + row * 2 * FFN + FFN + columns, of_up.to(output.dtype.element_ty), mask=inside)
