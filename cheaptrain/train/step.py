"""One optimizer step, accumulated over micro-batches and summed over processes.

The loss is the sum over supervised tokens divided by the supervised tokens of the *whole* global batch (by its
examples, where each weighs the same). The count is taken over all processes before the first backward, so neither
accumulation nor their number changes more than the order of additions, and a micro-batch without a supervised token
adds nothing instead of 0/0. Nothing reaches the weights unless loss and gradients are finite on every process. What the
processes have to agree on after the backward pass (the sums, whether all is finite, whether somebody was asked to stop)
travels in one message.

The host never waits for the device here. Whether a step counts is decided where its numbers are: a flag on the device
tells the optimizers to leave everything as it is. What a step was (`StepResult`) is read from a copy that the device
makes when it gets there, later, so that the next step can be handed over meanwhile. The trap: a single `.item()` on the
way would keep the device waiting for Python once a step.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
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
    from it, the student's cross-entropy, and the share of tokens that both find likeliest. `cross_entropy`: the loss
    without the z-loss, where there is one."""

    loss: float
    accuracy: float
    grad_norm: float
    learning_rate: float
    counts: StepCounts
    applied: bool
    stop: bool
    taught: MeansTaught | None = None
    cross_entropy: float | None = None


@dataclass(frozen=True)
class StartedStep:
    """A step handed to the device, which may not have done it yet."""

    figures: Tensor  # float64 on the host: the fixed ones of _FIGURES, then the counts; there once `copied`
    copied: torch.cuda.Event | None  # None: they are there
    learning_rate: float
    seq_len: int
    told: Taught | None  # which of its fields there are
    has_z_loss: bool

    def result(self) -> StepResult:
        """What the step did. Waits for the device."""
        if self.copied is not None:
            self.copied.synchronize()
        loss, right, entropy, *taught, not_finite, stops, norm = self.figures[:_FIGURES].tolist()
        counts = counts_from(self.figures[_FIGURES:].long(), self.seq_len)
        by, tokens = max(1, counts.normaliser), max(1, counts.supervised)
        return StepResult(
            loss=loss / by,
            accuracy=right / tokens,
            grad_norm=norm,
            learning_rate=self.learning_rate,
            counts=counts,
            applied=math.isfinite(loss) and not_finite == 0,
            stop=stops > 0,
            taught=None if self.told is None else _means(self.told, taught, by, tokens),
            cross_entropy=entropy / by if self.has_z_loss else None,
        )


# Loss, right ones, cross-entropy, what a teacher adds; not finite, asked to stop, norm.
_FIGURES = 3 + len(Taught._fields) + 3


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
) -> StartedStep:
    """Run forward and backward over this process's `batches`, clip, and step, unless loss or gradients are not finite.

    `sources` is how many sources rows come from; `stop` whether this process was asked to; `beat` is told how far the
    step is. All processes call it together. The optimizers must heed `found_inf`, as fused AdamW and our Muon do.
    """
    device = compute.device
    # The rows are counted by the first of those that share them.
    counted = counts_vector(batches, sources, shared=mesh["cp"].get_local_rank() > 0).to(device, non_blocking=True)
    speaks = mesh["tp"].get_local_rank() == 0  # the processes of the tp axis have the same tokens: one counts
    _sum_over_processes(counted.mul_(speaks), mesh)
    normaliser = counted[1].clamp_min(1)

    loss, entropy = torch.zeros((), device=device), torch.zeros((), device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    taught = torch.zeros(len(Taught._fields), dtype=torch.float64, device=device)
    told, has_z_loss = None, False
    for number, batch in enumerate(batches, 1):
        last_micro_batch(root, number == len(batches))
        sums = root(objective, batch.to(device), compute)
        (sums.loss / normaliser).backward()
        loss += sums.loss.detach()
        correct += sums.correct
        if sums.cross_entropy is not None:
            has_z_loss = True
            entropy += sums.cross_entropy
        if sums.taught is not None:
            told = sums.taught
            taught += torch.stack([loss.new_zeros(()).double() if each is None else each.double() for each in told])
        beat(f"micro-batch {number} of {len(batches)}")

    sum_vector_gradients(root, mesh)
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = clip_grad_norm(parameters, grad_clip)
    totals = torch.cat([torch.stack([loss.double(), correct.double(), entropy.double()]), taught]).mul_(speaks)
    flags = torch.stack([(~torch.isfinite(norm)).double(), torch.full_like(norm, float(stop)).double()])
    totals = _sum_over_processes(torch.cat([totals, flags]), mesh)
    broken = ~torch.isfinite(totals[0]) | (totals[-2] > 0)
    rate = set_learning_rate(optimizers, learning_rate_factor)
    for optimizer in optimizers:
        optimizer.found_inf = broken.float()  # type: ignore[attr-defined]  # 1: nothing is touched, not even moments
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    beat("optimizer step")
    figures = torch.cat([totals, norm.double()[None], counted.double()])
    copied = None
    if device.type == "cuda":
        here = torch.empty(figures.shape, dtype=figures.dtype, pin_memory=True)
        figures = here.copy_(figures, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return StartedStep(figures, copied, rate, batches[0].document_ids.shape[1], told, has_z_loss)


def _means(told: Taught, sums: list[float], by: int, tokens: int) -> MeansTaught:
    """Of the `sums` of a step; `told` says which of them there are."""
    divergence, cross_entropy, agreed, aligned = sums
    return MeansTaught(
        divergence=divergence / (by if told.aligned is None else aligned or 1.0),
        cross_entropy=cross_entropy / by,
        agreement=None if told.agreed is None else agreed / tokens,
        aligned=None if told.aligned is None else aligned / by,
    )


def _sum_over_processes(values: Tensor, mesh: DeviceMesh) -> Tensor:
    if mesh.size() > 1:
        dist.all_reduce(values)
    return values
