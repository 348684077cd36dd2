"""The matrix products around a chunk of logits: the head as they take it, and a gradient of logits taken on to the
hidden states and to the head.

The trap is rounding that adds up. The head's gradient is a sum over chunks: kept in fp32, but of products that were
each rounded to bf16 it is no better than bf16. cuBLAS can add a product of bf16 matrices to an fp32 one without
rounding it; whether this torch can ask it to is tried once for each device, and compared with the sum in fp64.
"""

from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from cheaptrain_kernels.backend import Backend

_ALIGNED, _UNALIGNED = 64, 16  # columns


def compute_head(weight: Tensor, count: int, dtype: torch.dtype, backend: Backend, *, spare: bool = False) -> Tensor:
    """The first `count` rows of `weight` `[rows, hidden]` in the compute dtype, for logits in whole cache lines.

    Rows of logits that do not begin at a multiple of 16 bytes are what matrix products and vector loads are slow on: a
    vocabulary of 50,257 is given rows of zeros up to 50,304. Their logits are the kernels' to leave out; the plain
    path has no use for them. With `spare` further rows of `weight` will do, for logits that no gradient comes from:
    nothing is copied.
    """
    if backend == "torch" or count % _UNALIGNED == 0:
        return weight[:count].to(dtype)
    rows = -(-count // _ALIGNED) * _ALIGNED
    if spare and weight.shape[0] >= rows:
        return weight[:rows].to(dtype)
    head = torch.zeros(rows, weight.shape[1], dtype=dtype, device=weight.device)
    head[:count] = weight[:count]
    return head


def add_chunk(
    gradient: Tensor, chunk: Tensor, head: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Take a chunk's gradient of the logits `[chunk, columns]` on to its hidden states and to the head.

    `chunk` `[chunk, hidden]`, `head` `[columns, hidden]` of `compute_head`, in the dtype of `gradient`. `grad_hidden`
    `[chunk, hidden]` is filled; `grad_weight` `[rows, hidden]`, of the first columns, is added to in its own dtype.
    """
    if grad_hidden is not None:
        torch.mm(gradient, head, out=grad_hidden)
    if grad_weight is None:
        return
    columns = gradient[:, : grad_weight.shape[0]].T
    if gradient.dtype == grad_weight.dtype:
        grad_weight.addmm_(columns, chunk)
    elif (way := _sums_in_fp32(gradient.dtype, gradient.device)) == "in place":
        torch.ops.aten.addmm.dtype_out(grad_weight, columns, chunk, torch.float32, out=grad_weight)
    elif way == "product":
        grad_weight += torch.mm(columns, chunk, out_dtype=torch.float32)
    else:
        grad_weight += columns @ chunk


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that the forward pass left in `ctx.gradients`, times the incoming scalar, in place."""
    gradients: tuple[Tensor | None, Tensor | None] = ctx.gradients
    ctx.gradients = None  # free them: a second backward through the same loss is an error, as with any saved tensor
    for gradient in gradients:
        if gradient is not None:
            _scale(gradient, grad_loss, ctx.chunk_tokens)
    return gradients


def _scale(gradient: Tensor, factor: Tensor, chunk_rows: int) -> None:
    """Multiply in place by the fp32 scalar `factor`, which is 1 / tokens of the batch.

    Rounded to bf16 first, as a plain product would, it is off by up to 0.4 %, in one direction for every layer below.
    """
    if gradient.dtype.itemsize >= factor.dtype.itemsize:
        gradient.mul_(factor.to(gradient.dtype))
        return
    for rows in gradient.split(chunk_rows):
        rows.copy_(rows.to(factor.dtype).mul_(factor))


@cache
def _sums_in_fp32(dtype: torch.dtype, device: torch.device) -> Literal["in place", "product", "rounded"]:
    """How a product of matrices in `dtype` is added to an fp32 matrix on `device`: in one call, unrounded in two, or
    rounded first, which is what a CPU has."""
    if device.type != "cuda":
        return "rounded"
    draw = torch.Generator().manual_seed(0)
    sizes = ((320, 192), (320, 128), (192, 128))
    gradient, chunk, before = (torch.randn(size, generator=draw).to(device) for size in sizes)
    gradient, chunk = gradient.to(dtype), chunk.to(dtype)
    wanted = before.double() + gradient.T.double() @ chunk.double()

    def exact(found: Tensor) -> bool:  # numbers of about 20: in fp32 they are off by 1e-5, rounded to bf16 by 0.05
        return bool((found - wanted).abs().max() < 1e-3)

    try:
        found = before.clone()
        torch.ops.aten.addmm.dtype_out(found, gradient.T, chunk, torch.float32, out=found)
        if exact(found):
            return "in place"
    except (AttributeError, NotImplementedError, RuntimeError):
        pass  # this torch has it for addends in the dtype of the matrices alone, or not at all
    try:
        if exact(before + torch.mm(gradient.T, chunk, out_dtype=torch.float32)):
            return "product"
    except (TypeError, NotImplementedError, RuntimeError):
        pass
    return "rounded"
