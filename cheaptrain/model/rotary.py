"""Llama 4's rotary positions in real arithmetic.

transformers turns queries and keys of Llama 4 by complex products, which torch.compile cannot fuse: each layer then
runs complex kernels between its own. The same rotation of pairs in real numbers is (a, b) -> (a cos - b sin,
b cos + a sin), two products and a sum that go into the kernels around them. The tables are made once a forward pass,
outside of the layers.

Only the model in hand is changed: its rotary module gives real tables, and the function its attention calls takes
either kind. So the plain twin still computes as transformers does, and the proof of isolated documents (`proof.py`),
which compares the two, proves this as well.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


def use_real_rotary(model: PreTrainedModel) -> None:
    """Make a Llama 4 text model turn its queries and keys in real arithmetic, in place; any other stays as it is."""
    if model.config.model_type != "llama4_text":
        return
    from transformers.models.llama4 import modeling_llama4

    _take_tables_too()
    for module in model.modules():
        if isinstance(module, modeling_llama4.Llama4TextRotaryEmbedding):
            module.forward = functools.partial(_tables, module.forward)


def rotate_pairs(states: Tensor, tables: Tensor) -> Tensor:
    """Turn each pair of neighbouring numbers of `states` `[rows, seq, heads, dim]` by the angle of its position.

    `tables` `[2, rows, seq, dim]` fp32: cosines, then sines with a minus before the first of each pair. Computes in
    fp32; the result has the dtype of `states`.
    """
    cosines, sines = tables[:, :, :, None].unbind()  # [rows, seq, 1, dim]
    exact = states.float()
    swapped = exact.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (exact * cosines + swapped * sines).type_as(states)


def _tables(forward: Any, *arguments: Any, **named: Any) -> Tensor:
    """The angles that transformers gives as complex numbers `[rows, seq, dim / 2]`, as `rotate_pairs` takes them."""
    angles = forward(*arguments, **named)
    cosines = angles.real.repeat_interleave(2, -1)
    sines = torch.stack([-angles.imag, angles.imag], -1).flatten(-2)
    return torch.stack([cosines, sines])


@functools.cache
def _take_tables_too() -> None:
    """Let the attention of Llama 4, which calls a function of its module, take either kind of position embeddings."""
    from transformers.models.llama4 import modeling_llama4

    of_transformers = modeling_llama4.apply_rotary_emb

    @functools.wraps(of_transformers)
    def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
        if freqs_cis.is_complex():
            return of_transformers(xq, xk, freqs_cis)  # type: ignore[no-any-return]
        return rotate_pairs(xq, freqs_cis), rotate_pairs(xk, freqs_cis)

    modeling_llama4.apply_rotary_emb = apply_rotary_emb  # type: ignore[assignment]
