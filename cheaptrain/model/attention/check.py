"""Attention written out in plain arithmetic, and how far another way of computing it is from that.

What a library claims to support is worth little: a kernel can be missing from a build, refuse a head size, or (the
trap) run and be wrong. So it is run, forward and backward, and its numbers are compared: the output and the gradients
of query, key and value, against softmax written out.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

HALF_ALLOWED = 5e-2  # in half precision, of the largest number; what is really wrong is off by about 1


def written_out(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, scaling: float | None = None) -> Tensor:
    """`[rows, heads, seq, head_dim]` over keys and values with as many heads or fewer, causal and within `documents`
    `[rows, seq]` (numbers that differ from one document to the next, and never come again in a row)."""
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    allowed = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]  # [rows, 1, seq, seq]
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    return scores.masked_fill(~allowed, float("-inf")).softmax(-1) @ value


def forward_backward(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], weights: Tensor
) -> list[Tensor]:
    """The output of `attend` and the gradients of query, key and value, when the loss is the output times `weights`,
    summed."""
    query, key, value = (x.detach().clone().requires_grad_() for x in inputs)
    output = attend(query, key, value)
    gradients = torch.autograd.grad((output * weights.to(output.dtype)).sum(), (query, key, value))
    if output.is_cuda:
        torch.cuda.synchronize()
    return [output.detach(), *gradients]


def largest_difference(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of all, each relative to the largest number of its tensor; NaN if there is one."""
    differences = [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]
    return torch.tensor(differences).max().item()  # Python's max() can lose a NaN
