"""RMSNorm, alone or together with the addition before it: sum and norm in one pass over the rows.

A decoder layer adds what attention gave to the residual stream and norms the sum. Here a row is read once, added,
written, normed and written again, all arithmetic in fp32; and the backward pass reads each row once for the gradient of
the input, of the stream, and of the gain. Source: Zhang and Sennrich 2019, arXiv 1910.07467.

torch.compile makes nearly the same of the plain code. Not measured on a GPU yet, so training does not use it.

The trap it avoids: the gain's gradient is a sum over all rows. Adding it up with atomics gives other bits in every run;
here a fixed number of programs each sum the same rows in the same order, and their sums are added in order.
"""

from typing import Any

import torch
from torch import Tensor

from cheaptrain_kernels import layer_gradients
from cheaptrain_kernels.layer_backend import layer_backend

_FORWARD = "(Tensor x, Tensor? residual, Tensor weight, float eps, ScalarType dtype) -> (Tensor, Tensor, Tensor)"
_BACKWARD = (
    "(Tensor? grad_normed, Tensor? grad_total, Tensor total, Tensor weight, Tensor inverse, ScalarType x_dtype, "
    "ScalarType? residual_dtype) -> (Tensor, Tensor, Tensor)"
)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """The plain way. Same arguments and result as `rms_norm`."""
    exact = x.float()
    normed = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.float()).to(dtype or x.dtype)


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """The plain way. Same arguments and results as `add_rms_norm`."""
    total = residual + x
    return rms_norm_reference(total, weight, eps, dtype), total


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension, in fp32.

    `x` `[..., hidden]`, `weight` `[hidden]`; the result has `dtype`, by default that of `x`. Models that round the
    normed value before they multiply by the gain differ by that rounding.
    """
    _check(x, None, weight)
    if layer_backend(x.device) == "torch":
        return rms_norm_reference(x, weight, eps, dtype)
    normed: Tensor = _rms_norm(x, None, weight, eps, dtype or x.dtype)[0]
    return normed


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """`rms_norm(x + residual)`, and the sum, which goes on as the residual stream.

    `x` and `residual` `[..., hidden]`, each in its own dtype; the sum has the wider of them. The normed value has
    `dtype`, by default that of the sum.
    """
    _check(x, residual, weight)
    if layer_backend(x.device) == "torch":
        return add_rms_norm_reference(x, residual, weight, eps, dtype)
    wider = torch.promote_types(x.dtype, residual.dtype)
    normed, total, _ = _rms_norm(x, residual, weight, eps, dtype or wider)
    return normed, total


@torch.library.custom_op("cheaptrain::rms_norm", mutates_args=(), schema=_FORWARD)
def _rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normed, sum (empty without a residual), and 1 / root mean square of each row, `[rows]` fp32."""
    if layer_backend(x.device) == "torch":
        total = x if residual is None else x + residual
        inverse = torch.rsqrt(total.float().square().mean(-1) + eps).flatten()
        normed = rms_norm_reference(total, weight, eps, dtype).contiguous()
        return normed, x.new_empty(0) if residual is None else total.contiguous(), inverse
    from cheaptrain_kernels import triton_norm

    return triton_norm.rms_norm(x, residual, weight, eps, dtype)


@_rms_norm.register_fake
def _(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    normed = x.new_empty(x.shape, dtype=dtype)
    wider = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(0 if residual is None else x.shape, dtype=wider)
    return normed, total, x.new_empty(x.shape[:-1].numel(), dtype=torch.float32)


@torch.library.custom_op("cheaptrain::rms_norm_backward", mutates_args=(), schema=_BACKWARD)
def _rms_norm_backward(
    grad_normed: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the residual (empty where it is that of x, or there is none), and of the gain."""
    given = grad_normed, grad_total, total, weight, inverse, x_dtype, residual_dtype
    if layer_backend(total.device) == "torch":
        return layer_gradients.rms_norm_backward(*given)
    from cheaptrain_kernels import triton_norm

    return triton_norm.rms_norm_backward(*given)


@_rms_norm_backward.register_fake
def _(
    grad_normed: Tensor | None,
    grad_total: Tensor | None,
    total: Tensor,
    weight: Tensor,
    inverse: Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    other = residual_dtype is not None and residual_dtype != x_dtype
    grad_residual = total.new_empty(total.shape if other else 0, dtype=residual_dtype or x_dtype)
    return total.new_empty(total.shape, dtype=x_dtype), grad_residual, torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, residual, weight, _, _ = inputs
    ctx.save_for_backward(x if residual is None else output[1], weight, output[2])
    ctx.dtypes = x.dtype, None if residual is None else residual.dtype
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: Any, grad_normed: Tensor | None, grad_total: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    total, weight, inverse = ctx.saved_tensors
    x_dtype, residual_dtype = ctx.dtypes
    if residual_dtype is None:
        grad_total = None  # of an empty tensor
    grad_x, grad_residual, grad_weight = _rms_norm_backward(
        grad_normed, grad_total, total, weight, inverse, x_dtype, residual_dtype
    )
    of_residual = None
    if residual_dtype is not None:
        of_residual = grad_x if residual_dtype == x_dtype else grad_residual
    return grad_x, of_residual, grad_weight, None, None


_rms_norm.register_autograd(_differentiate, setup_context=_save)


def _check(x: Tensor, residual: Tensor | None, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        other = "" if residual is None else f", {tuple(residual.shape)}"
        raise ValueError(f"expected [..., hidden]{other and ' twice'} and [hidden]; got {tuple(x.shape)}{other}, "
                         f"{tuple(weight.shape)}")  # fmt: skip
