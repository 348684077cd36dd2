"""The gradients of the operators for layers in plain torch, for tensors that no Triton kernel is for.

An operator's forward pass without Triton is its reference. Its backward pass cannot be autograd's of the reference,
which sees nothing of what goes on inside an operator, so here it is written down; with it a machine without a GPU runs
the same compiled graph.
"""

import torch
from torch import Tensor
from torch.nn import functional


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
    gradient = total.new_zeros(total.shape, dtype=torch.float32)
    of_gain = torch.zeros_like(weight)
    if grad_normed is not None:
        scale = inverse.view(*total.shape[:-1], 1)
        unit, above = total.float() * scale, grad_normed.float()
        of_gain = (above * unit).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        above = above * weight.float()
        gradient = (above - unit * (above * unit).mean(-1, keepdim=True)) * scale
    if grad_total is not None:
        gradient = gradient + grad_total.float()
    gradient = gradient.contiguous()
    other = residual_dtype is not None and residual_dtype != x_dtype
    grad_residual = gradient.to(residual_dtype) if other else total.new_empty(0, dtype=residual_dtype or x_dtype)
    return gradient.to(x_dtype), grad_residual, of_gain


def swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """See `swiglu._swiglu_backward`."""
    above, (gate, up) = gradient.float(), gate_up.float().chunk(2, dim=-1)
    share = gate.sigmoid()
    of_gate = above * up * share * (1.0 + gate * (1.0 - share))
    return torch.cat([of_gate, above * functional.silu(gate)], -1).to(gate_up.dtype)


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
    cosines, sines = cosines[:, :, None], sines[:, :, None]  # [rows, seq, 1, dim / 2]
    above = gradient.float()
    first, second = above.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else above.chunk(2, dim=-1)
    back = first * cosines + second * sines, second * cosines - first * sines
    above = torch.stack(back, -1).flatten(-2) if interleaved else torch.cat(back, -1)
    of_gain = states.new_empty(0, dtype=torch.float32)
    if eps > 0:
        exact = states.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
        unit = exact * scale
        if gain is not None:
            of_gain = (above * unit).sum((0, 1, 2)).to(gain.dtype)
            above = above * gain.float()
        above = (above - unit * (above * unit).mean(-1, keepdim=True)) * scale
    return above.to(states.dtype).contiguous(), of_gain
