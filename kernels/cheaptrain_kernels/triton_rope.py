"""Triton kernels of `rope.py`: a program has all heads of a token, as two blocks `[heads, dim / 2]` of the first and
the second numbers of each pair.

Tokens may be further apart than their heads are long, as in a slice of a merged projection. Where there is a gain, a
fixed number of programs have every so many tokens each in the backward pass and keep its gradient in registers, so
that it is added up in the same order in every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cheaptrain_kernels.triton_norm import PROGRAMS


def rope(states: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    """See `rope._rope`."""
    output = states.new_empty(states.shape)
    if output.numel():
        states, stride = _tokens(states)
        tokens = states.shape[0] * states.shape[1]
        _forward[(tokens,)](
            states,
            stride,
            cosines.contiguous(),
            sines.contiguous(),
            None if gain is None else gain.contiguous(),
            output,
            eps,
            **_constants(states, gain, eps, interleaved),
        )
    return output


def rope_backward(
    gradient: Tensor,
    states: Tensor,
    cosines: Tensor,
    sines: Tensor,
    gain: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """See `rope._rope_backward`."""
    output = states.new_empty(states.shape)
    if not output.numel():
        return output, states.new_empty(0, dtype=torch.float32) if gain is None else torch.zeros_like(gain)
    states, stride = _tokens(states)
    gradient, gradient_stride = _tokens(gradient)
    tokens = states.shape[0] * states.shape[1]
    programs = tokens if gain is None else min(PROGRAMS, tokens)
    parts = states.new_empty(0 if gain is None else programs, states.shape[-1], dtype=torch.float32)
    _backward[(programs,)](
        gradient,
        gradient_stride,
        states,
        stride,
        cosines.contiguous(),
        sines.contiguous(),
        None if gain is None else gain.contiguous(),
        output,
        parts,
        eps,
        tokens,
        programs,
        TOKENS_EACH=triton.cdiv(tokens, programs),
        **_constants(states, gain, eps, interleaved),
    )
    return output, parts.flatten() if gain is None else parts.sum(0).to(gain.dtype)


def _tokens(states: Tensor) -> tuple[Tensor, int]:
    """States whose heads lie side by side in each token and whose tokens are equally far apart, and how far."""
    _, seq, _, dim = states.shape
    if states.stride(3) != 1 or states.stride(2) != dim or states.stride(0) != seq * states.stride(1):
        states = states.contiguous()
    return states, states.stride(1)


def _constants(states: Tensor, gain: Tensor | None, eps: float, interleaved: bool) -> dict[str, int | bool]:
    heads, half = states.shape[2], states.shape[3] // 2
    block = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    return {
        "NORMS": eps > 0,
        "GAINS": gain is not None,
        "INTERLEAVED": interleaved,
        "HEADS": heads,
        "HALF": half,
        "HEADS_BLOCK": block[0],
        "HALF_BLOCK": block[1],
        "num_warps": min(8, max(1, block[0] * block[1] // 256)),
    }


@triton.jit
def _places(HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Where in a head the first and the second numbers of the pairs are, `[1, half]` each."""
    lanes = tl.arange(0, HALF_BLOCK)[None, :]
    if INTERLEAVED:
        first = 2 * lanes
        second = first + 1
    else:
        first = lanes
        second = lanes + HALF
    return lanes, first, second


@triton.jit
def _forward(
    states,
    stride,
    cosines,
    sines,
    gain,
    output,
    eps,
    NORMS: tl.constexpr,
    GAINS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    lanes, first, second = _places(HALF, HALF_BLOCK, INTERLEAVED)
    inside = (heads < HEADS) & (lanes < HALF)
    source = states + token * stride + heads * (2 * HALF)
    a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
    if NORMS:
        scale = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        a *= scale
        b *= scale
    if GAINS:
        a *= tl.load(gain + first, mask=lanes < HALF, other=0.0).to(tl.float32)
        b *= tl.load(gain + second, mask=lanes < HALF, other=0.0).to(tl.float32)
    cosine = tl.load(cosines + token * HALF + lanes, mask=lanes < HALF, other=0.0)
    sine = tl.load(sines + token * HALF + lanes, mask=lanes < HALF, other=0.0)
    target = output + token * (HEADS * 2 * HALF) + heads * (2 * HALF)
    kind = output.dtype.element_ty
    tl.store(target + first, (a * cosine - b * sine).to(kind), mask=inside)
    tl.store(target + second, (b * cosine + a * sine).to(kind), mask=inside)


@triton.jit
def _backward(
    gradient,
    gradient_stride,
    states,
    stride,
    cosines,
    sines,
    gain,
    output,
    parts,
    eps,
    tokens,
    programs,
    TOKENS_EACH: tl.constexpr,
    NORMS: tl.constexpr,
    GAINS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    heads = tl.arange(0, HEADS_BLOCK)[:, None]
    lanes, first, second = _places(HALF, HALF_BLOCK, INTERLEAVED)
    within = lanes < HALF
    gain_a = tl.zeros([1, HALF_BLOCK], dtype=tl.float32)
    gain_b = tl.zeros([1, HALF_BLOCK], dtype=tl.float32)
    if GAINS:
        gain_a = tl.load(gain + first, mask=within, other=0.0).to(tl.float32)
        gain_b = tl.load(gain + second, mask=within, other=0.0).to(tl.float32)
    of_a = tl.zeros([HALF_BLOCK], dtype=tl.float32)
    of_b = tl.zeros([HALF_BLOCK], dtype=tl.float32)
    for step in range(TOKENS_EACH):
        number = program + step * programs
        token = number.to(tl.int64)
        live = within & (number < tokens)
        inside = (heads < HEADS) & live
        cosine = tl.load(cosines + token * HALF + lanes, mask=live, other=0.0)
        sine = tl.load(sines + token * HALF + lanes, mask=live, other=0.0)
        above = gradient + token * gradient_stride + heads * (2 * HALF)
        turned_a = tl.load(above + first, mask=inside, other=0.0).to(tl.float32)
        turned_b = tl.load(above + second, mask=inside, other=0.0).to(tl.float32)
        a = turned_a * cosine + turned_b * sine
        b = turned_b * cosine - turned_a * sine
        if NORMS:
            source = states + token * stride + heads * (2 * HALF)
            unit_a = tl.load(source + first, mask=inside, other=0.0).to(tl.float32)
            unit_b = tl.load(source + second, mask=inside, other=0.0).to(tl.float32)
            squares = tl.sum(unit_a * unit_a, 1) + tl.sum(unit_b * unit_b, 1)
            scale = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            unit_a *= scale
            unit_b *= scale
            if GAINS:
                of_a += tl.sum(a * unit_a, 0)
                of_b += tl.sum(b * unit_b, 0)
                a *= gain_a
                b *= gain_b
            shared = ((tl.sum(a * unit_a, 1) + tl.sum(b * unit_b, 1)) / (2 * HALF))[:, None]
            a = (a - unit_a * shared) * scale
            b = (b - unit_b * shared) * scale
        target = output + token * (HEADS * 2 * HALF) + heads * (2 * HALF)
        kind = output.dtype.element_ty
        tl.store(target + first, a.to(kind), mask=inside)
        tl.store(target + second, b.to(kind), mask=inside)
    if GAINS:
        part = parts + program.to(tl.int64) * (2 * HALF)
        tl.store(part + first, of_a[None, :], mask=within)
        tl.store(part + second, of_b[None, :], mask=within)
