"""SwiGLU over the output of a merged gate and up projection: silu(gate) * up, read and written once.

The backward pass works out the sigmoid again from the projection's output, so nothing else is kept, and writes both
gradients side by side, as the merged projection's backward product takes them. Source: Shazeer 2020, arXiv 2002.05202.

torch.compile makes nearly the same of the plain code. Not measured on a GPU yet, so training does not use it.

The trap it avoids: rounding silu(gate) to bf16 before it is multiplied; all arithmetic is fp32, with one rounding at
the end.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from cheaptrain_kernels import layer_gradients
from cheaptrain_kernels.layer_backend import layer_backend


def swiglu_reference(gate_up: Tensor) -> Tensor:
    """The plain way. Same argument and result as `swiglu`."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` `[..., ffn]`, in the dtype of `gate_up` `[..., 2 * ffn]`: the gate's outputs, then up's."""
    if gate_up.shape[-1] % 2:
        raise ValueError(f"expected gate and up side by side, [..., 2 * ffn]; got {tuple(gate_up.shape)}")
    if layer_backend(gate_up.device) == "torch":
        return swiglu_reference(gate_up)
    output: Tensor = _swiglu(gate_up)
    return output


@torch.library.custom_op("cheaptrain::swiglu", mutates_args=(), schema="(Tensor gate_up) -> Tensor")
def _swiglu(gate_up: Tensor) -> Tensor:
    if layer_backend(gate_up.device) == "torch":
        return swiglu_reference(gate_up).contiguous()
    from cheaptrain_kernels import triton_swiglu

    return triton_swiglu.swiglu(gate_up)


@_swiglu.register_fake
def _(gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@torch.library.custom_op(
    "cheaptrain::swiglu_backward", mutates_args=(), schema="(Tensor gradient, Tensor gate_up) -> Tensor"
)
def _swiglu_backward(gradient: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of `gate_up`, in its shape and dtype."""
    if layer_backend(gate_up.device) == "torch":
        return layer_gradients.swiglu_backward(gradient, gate_up)
    from cheaptrain_kernels import triton_swiglu

    return triton_swiglu.swiglu_backward(gradient, gate_up)


@_swiglu_backward.register_fake
def _(gradient: Tensor, gate_up: Tensor) -> Tensor:
    return gate_up.new_empty(gate_up.shape)


def _save(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _differentiate(ctx: Any, gradient: Tensor) -> Tensor:
    (gate_up,) = ctx.saved_tensors
    result: Tensor = _swiglu_backward(gradient, gate_up)
    return result


_swiglu.register_autograd(_differentiate, setup_context=_save)
