"""flash-attn 4 as two operators that torch.compile keeps in a layer's graph without looking inside.

Its kernels are compiled from Python when they are first launched, and it registers no operator: traced as it is, a
compiled layer would break into pieces at every attention, or take the tracer's placeholders for tensors. So forward
and backward are operators here, with the shapes of what they return. The backward pass calls the library's own
function for it, which is not part of its public interface: written for flash-attn-4 4.0.0b36, and another version
that has it otherwise fails in the trial at the start of a run, where it is no candidate then.
"""

import torch
from flash_attn.cute import flash_attn_func as _library_causal
from flash_attn.cute import flash_attn_varlen_func as _library_packed
from flash_attn.cute.interface import _flash_attn_bwd as _library_backward
from torch import Tensor


def flash_attn_func(query: Tensor, key: Tensor, value: Tensor, *, softmax_scale: float | None, causal: bool) -> Tensor:
    """`[rows, seq, heads, head_dim]`; causal attention only."""
    return _attend(query, key, value, None, 0, softmax_scale, causal)


def flash_attn_varlen_func(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    """`[tokens, heads, head_dim]` of documents end to end, which attend to themselves: the arguments for keys are
    those for queries."""
    assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    return _attend(query, key, value, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    boundaries: Tensor | None,
    longest: int,
    scale: float | None,
    causal: bool,
) -> Tensor:
    assert causal
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    output: Tensor = _forward(query, key, value, boundaries, longest, scale)[0]
    return output


@torch.library.custom_op("cheaptrain::flash4", mutates_args=())
def _forward(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The output, and for the backward pass the logarithm of each query's sum of exponentials."""
    if boundaries is None:
        output, sums = _library_causal(query, key, value, softmax_scale=scale, causal=True, return_lse=True)
    else:
        output, sums = _library_packed(
            query,
            key,
            value,
            cu_seqlens_q=boundaries,
            cu_seqlens_k=boundaries,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scale,
            causal=True,
            return_lse=True,
        )
    return output, sums


@_forward.register_fake
def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor | None, longest: int, scale: float
) -> tuple[Tensor, Tensor]:
    *batch, tokens, heads, dim = query.shape
    sums = query.new_empty([*batch, heads, tokens], dtype=torch.float32)
    return query.new_empty([*batch, tokens, heads, dim]), sums


@torch.library.custom_op("cheaptrain::flash4_backward", mutates_args=())
def _backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    boundaries: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    lengths = {}
    if boundaries is not None:
        lengths = {
            "cu_seqlens_q": boundaries,
            "cu_seqlens_k": boundaries,
            "max_seqlen_q": longest,
            "max_seqlen_k": longest,
        }
    gradients = _library_backward(
        query, key, value, output, gradient, sums, softmax_scale=scale, causal=True, **lengths
    )
    dq, dk, dv = gradients[:3]
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@_backward.register_fake
def _backward_shapes(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    boundaries: Tensor | None,
    longest: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _remember(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:  # type: ignore[type-arg]
    query, key, value, boundaries, ctx.longest, ctx.scale = inputs  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, *output, boundaries)


def _differentiate(ctx, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    query, key, value, output, sums, boundaries = ctx.saved_tensors
    gradients = _backward(gradient, query, key, value, output, sums, boundaries, ctx.longest, ctx.scale)
    return *gradients, None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)
