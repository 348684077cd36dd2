"""The loop that people write for GPT-2: a model of one's own in eighty lines, compiled whole, with full logits.

SDPA's flash attention, bf16 autocast, gradients accumulated to half a million tokens, fused AdamW, and the learning
rate of one step. Written here from the architecture alone (the config of `gpt2`: pre-norm, learned positions, tanh
GELU, tied head); its weights are those of transformers' class, so that its loss can be held against the others'.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cheaptrain.bench.rows import Rows
from cheaptrain.bench.theirs import loop_trial
from cheaptrain.bench.trial import Trial, Unavailable, plain_model
from cheaptrain.bench.works import Work
from cheaptrain.data.rows import IGNORED


def gpt2_loop_trial(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
    """The plain loop, compiled on a GPU. Raises Unavailable for a model that is no GPT-2."""
    reference = plain_model(work, work.model, device)
    if reference.config.model_type != "gpt2":
        raise Unavailable(f"{variant} is a GPT-2, and the work's model a {reference.config.model_type}")
    model = Gpt2(reference).to(device)
    del reference
    compiled = torch.compile(model) if device.type == "cuda" else model

    def loss(rows: Rows) -> Tensor:
        logits = compiled(rows.input_ids)
        return functional.cross_entropy(
            logits.flatten(0, 1), rows.labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )

    return loop_trial(work, device, micro_rows, model, loss, "whole model compiled" if device.type == "cuda" else "")


class Gpt2(nn.Module):
    """GPT-2 with the weights of a transformers model. `[rows, seq]` ids → `[rows, seq, vocab]` logits."""

    def __init__(self, like: PreTrainedModel) -> None:
        super().__init__()
        inner: Any = like.transformer
        self.tokens = nn.Embedding.from_pretrained(inner.wte.weight.detach(), freeze=False)
        self.positions = nn.Embedding.from_pretrained(inner.wpe.weight.detach(), freeze=False)
        self.blocks = nn.ModuleList(_Block(block, like.config.n_head) for block in inner.h)
        self.norm = _norm(inner.ln_f)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.tokens.weight)


class _Block(nn.Module):
    def __init__(self, like: Any, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = _norm(like.ln_1), _norm(like.ln_2)
        self.qkv, self.out = _linear(like.attn.c_attn), _linear(like.attn.c_proj)
        self.up, self.down = _linear(like.mlp.c_fc), _linear(like.mlp.c_proj)

    def forward(self, x: Tensor) -> Tensor:
        rows, seq, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(rows, seq, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [rows, heads, seq, head_dim]
        seen = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(rows, seq, width))
        return x + self.down(functional.gelu(self.up(self.before_mlp(x)), approximate="tanh"))


def _norm(like: Any) -> nn.LayerNorm:
    norm = nn.LayerNorm(like.weight.shape[0], eps=like.eps)
    norm.load_state_dict(like.state_dict())
    return norm


def _linear(like: Any) -> nn.Linear:
    """transformers stores GPT-2's matrices as `[in, out]`."""
    inputs, outputs = like.weight.shape
    linear = nn.Linear(inputs, outputs)
    linear.load_state_dict({"weight": like.weight.t(), "bias": like.bias})
    return linear
