"""Loss and bits per byte on held-out documents, source by source.

Bits per byte divides by the bytes of text the predicted tokens stand for, so it compares models with different
tokenizers. Tokens that stand for no text (end-of-text) count in the loss but not in bits per byte: neither their bits
nor any byte. The training state is left exactly as it was: no dropout, no gradient, no random number drawn.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from cheaptrain_kernels import token_losses
from torch import Tensor
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.parts import head
from cheaptrain.train.objective import Compute, hidden_states


@dataclass(frozen=True)
class Score:
    """Sums over one source's held-out tokens: nats, tokens, and nats and bytes of the tokens that stand for text."""

    nats: float
    tokens: int
    text_nats: float
    text_bytes: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / max(1, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of text."""
        return self.text_nats / math.log(2) / max(1, self.text_bytes)


@torch.no_grad()
def validate(
    model: PreTrainedModel, batches: Mapping[str, Iterable[RowBatch]], token_bytes: Tensor, compute: Compute
) -> dict[str, Score]:
    """Score every source; `token_bytes` is `[vocab]`, the bytes of text each id stands for."""
    was_training = model.training
    model.eval()
    try:
        return {source: _score(model, rows, token_bytes, compute) for source, rows in batches.items()}
    finally:
        model.train(was_training)


def _score(model: PreTrainedModel, batches: Iterable[RowBatch], token_bytes: Tensor, compute: Compute) -> Score:
    nats, text_nats, tokens, text_bytes = 0.0, 0.0, 0, 0
    for batch in batches:
        moved = batch.to(compute.device)
        labels = moved.labels.flatten()  # [rows * seq]
        with compute.autocast():
            hidden = hidden_states(model, moved, compute).flatten(0, 1)
            losses = token_losses(hidden, head(model).weight, labels, chunk_tokens=compute.loss_chunk_tokens)
        of_label = token_bytes[labels.clamp_min(0)] * (labels >= 0)
        nats += losses.double().sum().item()
        text_nats += losses.double()[of_label > 0].sum().item()
        tokens += batch.supervised
        text_bytes += int(of_label.sum().item())
    return Score(nats, tokens, text_nats, text_bytes)


def validation_metrics(scores: Mapping[str, Score]) -> dict[str, float]:
    """`val/loss` and `val/bpb` over all sources together, and `val/<source>/loss`, `val/<source>/bpb`.

    Where no token was scored there is no loss, and without a byte of text no bits per byte: a 0 would be an untruth.
    """
    total = Score(
        sum(s.nats for s in scores.values()),
        sum(s.tokens for s in scores.values()),
        sum(s.text_nats for s in scores.values()),
        sum(s.text_bytes for s in scores.values()),
    )
    metrics = {}
    for name, score in {"val": total, **{f"val/{source}": score for source, score in scores.items()}}.items():
        if score.tokens:
            metrics[f"{name}/loss"] = score.loss
        if score.text_bytes:
            metrics[f"{name}/bpb"] = score.bits_per_byte
    return metrics
