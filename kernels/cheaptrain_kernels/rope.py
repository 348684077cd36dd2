"""Rotary positions (RoPE), with the norm of queries and keys before it where a model has one, in one pass.

The two numbers of a pair are turned by the angle of their token. Pairs are neighbours (interleaved: Llama 4) or half a
head apart (half-split: Qwen3, Llama). Norm and rotation of a head need its numbers only, so both happen in registers,
in fp32; the backward pass turns back, and works out the norm again. Sources: Su et al. 2021, arXiv 2104.09864;
Henry et al. 2020, arXiv 2010.04245.

torch.compile makes nearly the same of the plain code. Not measured on a GPU yet, so training does not use it.

The trap it avoids: Qwen3 norms with learned gains and then turns, Llama 4 turns and then norms without gains. A
rotation changes no length, so without gains the order makes no difference, and this one order serves both.
"""

from typing import Any

import torch
from torch import Tensor

from cheaptrain_kernels import layer_gradients
from cheaptrain_kernels.layer_backend import layer_backend

_FORWARD = "(Tensor states, Tensor cosines, Tensor sines, Tensor? gain, float eps, bool interleaved) -> Tensor"
_BACKWARD = (
    "(Tensor gradient, Tensor states, Tensor cosines, Tensor sines, Tensor? gain, float eps, bool interleaved) "
    "-> (Tensor, Tensor)"
)


def rope_reference(
    states: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    interleaved: bool,
    eps: float | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """The plain way. Same arguments and result as `rope`."""
    exact = states.float()
    if eps is not None:
        exact = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    if gain is not None:
        exact = exact * gain.float()
    cosines, sines = cosines[:, :, None], sines[:, :, None]  # [rows, seq, 1, dim / 2]
    a, b = exact.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else exact.chunk(2, dim=-1)
    turned = (a * cosines - b * sines, b * cosines + a * sines)
    result = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return result.to(states.dtype)


def rope(
    states: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    interleaved: bool,
    eps: float | None = None,
    gain: Tensor | None = None,
) -> Tensor:
    """Turn each pair of `states` `[rows, seq, heads, dim]` by the angle of its token.

    `cosines`, `sines` `[rows, seq, dim / 2]` fp32, of each pair once. With `eps` each head is divided by its root mean
    square first, and multiplied by `gain` `[dim]` if there is one. The result has the shape and dtype of `states`.
    """
    rows, seq, _, dim = states.shape
    if dim % 2 or cosines.shape != (rows, seq, dim // 2) or sines.shape != cosines.shape:
        raise ValueError(
            f"expected [rows, seq, heads, dim] and twice [rows, seq, dim / 2]; got {tuple(states.shape)}, "
            f"{tuple(cosines.shape)}, {tuple(sines.shape)}"
        )
    if (gain is not None and (eps is None or gain.shape != (dim,))) or (eps is not None and eps <= 0):
        raise ValueError(f"a gain is [dim] = [{dim}] and goes with an eps above 0; got eps = {eps}, gain = {gain}")
    if layer_backend(states.device) == "torch":
        return rope_reference(states, cosines, sines, interleaved=interleaved, eps=eps, gain=gain)
    result: Tensor = _rope(states, cosines, sines, gain, eps or 0.0, interleaved)
    return result


@torch.library.custom_op("cheaptrain::rope", mutates_args=(), schema=_FORWARD)
def _rope(states: Tensor, cosines: Tensor, sines: Tensor, gain: Tensor | None, eps: float, interleaved: bool) -> Tensor:
    """`eps` 0: no norm."""
    if layer_backend(states.device) == "torch":
        plain = rope_reference(states, cosines, sines, interleaved=interleaved, eps=eps or None, gain=gain)
        return plain.contiguous()
    from cheaptrain_kernels import triton_rope

    return triton_rope.rope(states, cosines, sines, gain, eps, interleaved)


@_rope.register_fake
def _(states: Tensor, *_: object) -> Tensor:
    return states.new_empty(states.shape)


@torch.library.custom_op("cheaptrain::rope_backward", mutates_args=(), schema=_BACKWARD)
def _rope_backward(
    gradient: Tensor,
    states: Tensor,
    cosines: Tensor,
    sines: Tensor,
    gain: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of the states and of the gain (empty without one)."""
    given = gradient, states, cosines, sines, gain, eps, interleaved
    if layer_backend(states.device) == "torch":
        return layer_gradients.rope_backward(*given)
    from cheaptrain_kernels import triton_rope

    return triton_rope.rope_backward(*given)


@_rope_backward.register_fake
def _(
    gradient: Tensor,
    states: Tensor,
    cosines: Tensor,
    sines: Tensor,
    gain: Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    of_gain = states.new_empty(0, dtype=torch.float32) if gain is None else gain.new_empty(gain.shape)
    return states.new_empty(states.shape), of_gain


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    states, cosines, sines, gain, ctx.eps, ctx.interleaved = inputs
    ctx.save_for_backward(states, cosines, sines, gain)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    states, cosines, sines, gain = ctx.saved_tensors
    of_states, of_gain = _rope_backward(gradient, states, cosines, sines, gain, ctx.eps, ctx.interleaved)
    return of_states, None, None, None if gain is None else of_gain, None, None


_rope.register_autograd(_differentiate, setup_context=_save)
