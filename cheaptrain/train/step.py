"""One optimizer step, accumulated over micro-batches.

The loss is the sum over supervised tokens divided by the supervised tokens of the *whole* global batch. The count is
taken before the first backward, so accumulation only changes the order of additions, and a micro-batch without a
supervised token adds nothing instead of 0/0. Nothing reaches the weights before loss and gradients are known to be
finite.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.train.objective import Compute, Objective
from cheaptrain.train.optim import set_learning_rate


@dataclass(frozen=True)
class StepResult:
    """What one step did. `loss` is nats a supervised token; `applied` is False when the step was not finite."""

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    supervised: int
    tokens: int
    applied: bool


def train_step(
    model: PreTrainedModel,
    optimizers: Sequence[Optimizer],
    batches: Sequence[RowBatch],
    *,
    objective: Objective,
    compute: Compute,
    learning_rate_factor: float,
    grad_clip: float,
) -> StepResult:
    """Run forward and backward over `batches`, clip, and step, unless loss or gradient norm is not finite."""
    supervised = sum(batch.supervised for batch in batches)
    loss = torch.zeros((), device=compute.device)
    correct = torch.zeros((), dtype=torch.int64, device=compute.device)
    for batch in batches:
        sums = objective(model, batch.to(compute.device), compute)
        (sums.loss / max(1, supervised)).backward()
        loss += sums.loss.detach()
        correct += sums.correct

    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip if grad_clip > 0 else float("inf"), foreach=True)
    mean_loss, norm = (loss / max(1, supervised)).item(), grad_norm.item()
    applied = math.isfinite(mean_loss) and math.isfinite(norm)
    rate = set_learning_rate(optimizers, learning_rate_factor)
    if applied:
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    return StepResult(
        loss=mean_loss,
        accuracy=correct.item() / max(1, supervised),
        grad_norm=norm,
        learning_rate=rate,
        supervised=supervised,
        tokens=sum(batch.input_ids.numel() for batch in batches),
        applied=applied,
    )
