"""Loss and bits per byte on held-out documents, source by source.

Bits per byte divides by the bytes of text the predicted tokens stand for, so it compares models with different
tokenizers. Tokens that stand for no text (end-of-text) count in the loss but not in bits per byte: neither their bits
nor any byte. The training state is left exactly as it was: no dropout, no gradient, no random number drawn.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from cheaptrain.data.rows import RowBatch
from cheaptrain.parallel.root import Root, forget_gathered
from cheaptrain.train.objective import Compute, losses_of_tokens


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
    root: Root,
    batches: Mapping[str, Sequence[RowBatch]],
    token_bytes: Tensor,
    compute: Compute,
    mesh: DeviceMesh,
    interrupted: Callable[[], bool] = lambda: False,
) -> dict[str, Score] | None:
    """Score every source; `token_bytes` is `[vocab]`, the bytes of text each id stands for.

    `batches` are this process's share, as many of each source on every process. `interrupted` is asked after each
    batch, by all processes together; once it says yes, there is no score: None.
    """
    was_training = root.training
    root.eval()
    sums = torch.zeros(len(batches), 4, dtype=torch.float64, device=compute.device)
    try:
        for of_source, rows in zip(sums, batches.values(), strict=True):
            for batch in rows:
                of_source += _score(root, batch, token_bytes, compute)
                if interrupted():
                    return None
    finally:
        root.train(was_training)
        forget_gathered(root)
    if mesh.size() > 1:
        dist.all_reduce(sums.mul_(mesh["tp"].get_local_rank() == 0))  # the tp axis has the same tokens: one counts
    return {
        source: Score(nats, int(tokens), text_nats, int(text_bytes))
        for source, (nats, tokens, text_nats, text_bytes) in zip(batches, sums.tolist(), strict=True)
    }


def _score(root: Root, batch: RowBatch, token_bytes: Tensor, compute: Compute) -> Tensor:
    """Nats, tokens, nats of the tokens that stand for text, and bytes of it: `[4]` float64, on the device."""
    moved = batch.to(compute.device)
    losses = root(losses_of_tokens, moved, compute).double()
    labels = moved.labels.flatten()  # [rows * seq]
    of_label = token_bytes[labels.clamp_min(0)] * (labels >= 0)
    tokens = torch.tensor(batch.supervised, dtype=torch.float64, device=compute.device)
    return torch.stack([losses.sum(), tokens, (losses * (of_label > 0)).sum(), of_label.sum().double()])


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
