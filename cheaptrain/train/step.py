"""One optimizer step, accumulated over micro-batches and summed over processes.

The loss is the sum over supervised tokens divided by the supervised tokens of the *whole* global batch (by its
examples, where each weighs the same). The count is taken over all processes before the first backward, so neither
accumulation nor their number changes more than the order of additions, and a micro-batch without a supervised token
adds nothing instead of 0/0. Nothing reaches the weights before loss and gradients are known to be finite on every
process. What the processes have to agree on after the backward pass (the sums, whether all is finite, whether somebody
was asked to stop) travels in one message.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer

from cheaptrain.data.rows import RowBatch
from cheaptrain.parallel.clip import clip_grad_norm
from cheaptrain.parallel.root import Root, last_micro_batch
from cheaptrain.parallel.vectors import sum_vector_gradients
from cheaptrain.train.counts import StepCounts, counts_from, counts_vector
from cheaptrain.train.objective import Compute, Objective, Taught
from cheaptrain.train.optim import set_learning_rate


@dataclass(frozen=True)
class MeansTaught:
    """What a teacher adds to a step's result, as means; the divergence over what it speaks of. One with other tokens
    agrees on none of them: then `agreement` is None, and `aligned` the share of the positions that it speaks of."""

    divergence: float
    cross_entropy: float
    agreement: float | None
    aligned: float | None


@dataclass(frozen=True)
class StepResult:
    """What one step did, over all processes. `loss` is what was minimised, in nats a supervised token (or example);
    `applied` is False when the step was not finite; `stop`: a process was asked to stop. With a teacher: the divergence
    from it, the student's cross-entropy, and the share of tokens that both find likeliest."""

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    counts: StepCounts
    applied: bool
    stop: bool
    taught: MeansTaught | None = None


def train_step(
    root: Root,
    optimizers: Sequence[Optimizer],
    batches: Sequence[RowBatch],
    *,
    mesh: DeviceMesh,
    objective: Objective,
    compute: Compute,
    sources: int,
    learning_rate_factor: float,
    grad_clip: float,
    stop: bool = False,
    beat: Callable[[str], None] = lambda phase: None,
) -> StepResult:
    """Run forward and backward over this process's `batches`, clip, and step, unless loss or gradients are not finite.

    `sources` is how many sources rows come from; `stop` whether this process was asked to; `beat` is told how far the
    step is. All processes call it together.
    """
    device = compute.device
    # The rows are counted by the first of those that share them.
    counted = counts_vector(batches, sources, shared=mesh["cp"].get_local_rank() > 0).to(device)
    speaks = mesh["tp"].get_local_rank() == 0  # the processes of the tp axis have the same tokens: one counts
    _sum_over_processes(counted.mul_(speaks), mesh)
    normaliser = counted[1].clamp_min(1)

    loss = torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    taught = torch.zeros(len(Taught._fields), dtype=torch.float64, device=device)
    told: Taught | None = None
    for number, batch in enumerate(batches, 1):
        last_micro_batch(root, number == len(batches))
        sums = root(objective, batch.to(device), compute)
        (sums.loss / normaliser).backward()
        loss += sums.loss.detach()
        correct += sums.correct
        if sums.taught is not None:
            told = sums.taught
            taught += torch.stack([loss.new_zeros(()).double() if each is None else each.double() for each in told])
        beat(f"micro-batch {number} of {len(batches)}")

    sum_vector_gradients(root, mesh)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm(parameters, grad_clip)
    totals = torch.cat([torch.stack([loss.double(), correct.double()]), taught]).mul_(speaks)
    flags = torch.stack([(~torch.isfinite(norm)).double(), torch.tensor(float(stop), device=device).double()])
    totals = _sum_over_processes(torch.cat([totals, flags]), mesh)
    loss_sum, right, *of_teacher, not_finite, stops = totals.tolist()
    counts = counts_from(counted, batches[0].document_ids.shape[1])
    applied = math.isfinite(loss_sum) and not_finite == 0
    rate = set_learning_rate(optimizers, learning_rate_factor)
    if applied:
        for optimizer in optimizers:
            optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    beat("optimizer step")
    by, tokens = max(1, counts.normaliser), max(1, counts.supervised)
    return StepResult(
        loss=loss_sum / by,
        accuracy=right / tokens,
        grad_norm=norm.item(),
        learning_rate=rate,
        counts=counts,
        applied=applied,
        stop=stops > 0,
        taught=None if told is None else _means(told, of_teacher, by, tokens),
    )


def _means(told: Taught, sums: list[float], by: int, tokens: int) -> MeansTaught:
    """Of the `sums` of a step; `told` says which of them there are."""
    divergence, cross_entropy, agreed, aligned = sums
    return MeansTaught(
        divergence=divergence / (by if told.aligned is None else aligned or 1.0),
        cross_entropy=cross_entropy / by,
        agreement=None if told.agreed is None else agreed / tokens,
        aligned=None if told.aligned is None else aligned / by,
    )


def _sum_over_processes(values: torch.Tensor, mesh: DeviceMesh) -> torch.Tensor:
    if mesh.size() > 1:
        dist.all_reduce(values)
    return values
