"""flash-attn 2, 3 and 4 as modules with the signatures of the real ones, computed in plain arithmetic on a CPU.

2: flash-attn 2.8; 3: the interface in the `hopper` folder of its repository, which in some versions returns the output
alone, in others a tuple; 4: flash-attn-4 4.0.0b36. Whatever they are given that they would not take raises.
"""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from cheaptrain.model.attention.check import written_out


def _documents(boundaries: Tensor, tokens: int) -> Tensor:
    assert boundaries.dtype == torch.int32
    if not torch.compiler.is_compiling():
        assert boundaries[0] == 0 and boundaries[-1] == tokens
    return torch.searchsorted(boundaries, torch.arange(tokens, dtype=torch.int32), right=True)[None]


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool) -> Tensor:
    assert causal and q.dim() == k.dim() == v.dim() == 4 and q.shape[1] == k.shape[1], "[rows, seq, heads, dim]"
    whole = torch.zeros(q.shape[:2])
    heads = (x.transpose(1, 2).float() for x in (q, k, v))
    return written_out(*heads, whole, scale).transpose(1, 2).to(q.dtype)


def _packed(q: Tensor, k: Tensor, v: Tensor, boundaries: Tensor, longest: int, scale: float | None, causal) -> Tensor:
    assert causal and q.dim() == k.dim() == v.dim() == 3, "[tokens, heads, dim]"
    if not torch.compiler.is_compiling():
        assert longest >= int(boundaries.diff().max())
    heads = (x.transpose(0, 1)[None].float() for x in (q, k, v))
    return written_out(*heads, _documents(boundaries, len(q)), scale)[0].transpose(0, 1).to(q.dtype)


def _sums(q: Tensor) -> Tensor:
    """Stands for the logarithms of sums of exponentials: fp32, heads before tokens."""
    return torch.zeros([*q.shape[:-3], q.shape[-2], q.shape[-3]])


def flash_attn_2() -> ModuleType:
    def flash_attn_func(
        q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
        deterministic=False, return_attn_probs=False,
    ):  # fmt: skip
        assert dropout_p == 0.0
        return _dense(q, k, v, softmax_scale, causal)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        assert dropout_p == 0.0 and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
        return _packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)

    return _module("flash_attn", flash_attn_func, flash_attn_varlen_func)


def flash_attn_3(tuples: bool) -> ModuleType:
    def flash_attn_func(
        q, k, v, softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        output = _dense(q, k, v, softmax_scale, causal)
        return (output, _sums(q)) if tuples else output

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        output = _packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
        return (output, _sums(q)) if tuples else output

    return _module("flash_attn_interface", flash_attn_func, flash_attn_varlen_func)


def flash_attn_4() -> dict[str, ModuleType]:
    """`flash_attn` without functions of its own, `flash_attn.cute` and its interface. What they compute is hidden from
    whoever traces: they ask for the addresses of their tensors, as a launch does."""

    def flash_attn_func(
        q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
        learnable_sink=None, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None,
        score_mod_bwd=None, mask_mod=None, aux_tensors=None, aux_scalars=None, block_sparse_tensors=None,
        block_sparse_tensors_bwd=None, return_lse=False, gather_bwd_recompute_p=False, gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert q.data_ptr()
        return _dense(q, k, v, softmax_scale, causal).contiguous(), _sums(q) if return_lse else None

    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        assert q.data_ptr()
        output = _packed(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
        return output.contiguous(), _sums(q) if return_lse else None

    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, **others,
    ):  # fmt: skip
        assert not others and lse.dtype == torch.float32 and lse.shape == _sums(q).shape and out.shape == dout.shape

        def differentiate() -> tuple[Tensor, ...]:
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            if cu_seqlens_q is None:
                again = _dense(*inputs, softmax_scale, causal)
            else:
                again = _packed(*inputs, cu_seqlens_q, max_seqlen_q, softmax_scale, causal)
            return torch.autograd.grad(again, inputs, dout)

        with ThreadPoolExecutor(1) as elsewhere:  # within an operator there is no autograd
            return elsewhere.submit(differentiate).result()

    folder, cute, interface = (ModuleType(f"flash_attn{rest}") for rest in ("", ".cute", ".cute.interface"))
    folder.__path__ = cute.__path__ = []
    cute.flash_attn_func, cute.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func
    interface._flash_attn_bwd = _flash_attn_bwd
    return {module.__name__: module for module in (folder, cute, interface)}


def _module(name: str, causal: Any, packed: Any) -> ModuleType:
    module: Any = ModuleType(name)
    module.flash_attn_func, module.flash_attn_varlen_func = causal, packed
    return module
