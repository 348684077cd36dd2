"""A chunk of distillation by torch: logits in fp32, at most four `[chunk, columns]` tensors of them at once.

This is what a CPU runs, and what the Triton kernels (`distillation_triton.py`) are compared with.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cheaptrain_kernels.columns import Columns
from cheaptrain_kernels.divergence import (
    LEAST,
    DistillationLoss,
    TeacherHead,
    TopK,
    Word,
    compare,
    keep_top_k,
    log_of_rest,
)


def word_by_torch(
    states: Tensor,
    head: Tensor,
    teacher: TeacherHead | TopK,
    target: Tensor,
    factor: Tensor,
    loss: DistillationLoss,
    columns: Columns,
    wanted: bool,
) -> Word:
    """What student and teacher say of a chunk. `head` `[columns, hidden]` and that of the teacher are in the compute
    dtypes; `factor` `[chunk]` fp32 is what each row's loss is multiplied by; with `wanted` comes the gradient."""
    student = _log_softmax(states, head, loss.temperature, columns)
    taught = _teach(teacher, student.log, loss, columns)
    logit = columns.at(target, student.log)
    logit = ((logit + student.log_scaled) * loss.temperature).where(columns.has(target), 0.0)
    cross_entropy = student.log_total - columns.sum(logit)
    if not wanted:
        return Word(taught.divergence, cross_entropy, student.likeliest, taught.likeliest, None)
    plain = None
    if loss.alpha < 1:  # softmax at T = 1, less the label
        plain = student.log.add(student.log_scaled[:, None]).mul_(loss.temperature)
        plain = plain.sub_(student.log_total[:, None]).exp_()
        columns.less_one_at(target, plain)
    gradient = taught.pull(student.log).mul_((factor * (loss.alpha * loss.temperature)).unsqueeze(1))
    if plain is not None:
        gradient.add_(plain.mul_((factor * (1 - loss.alpha)).unsqueeze(1)))
    return Word(taught.divergence, cross_entropy, student.likeliest, taught.likeliest, gradient.to(states.dtype))


def top_k_by_torch(states: Tensor, head: Tensor, k: int, temperature: float, columns: Columns) -> TopK:
    """What a teacher's head says of a chunk, cut to its k likeliest tokens."""
    return keep_top_k(_log_softmax(states, head, temperature, columns).log, k)


class _LogSoftmax(NamedTuple):
    """Of logits z, less their row's largest: `log` = z / T - `log_scaled`, the columns here; `log_scaled` and
    `log_total` are the logarithms of the sums of exp(z / T) and exp(z); `likeliest`: the id of the largest."""

    log: Tensor  # [chunk, columns]
    log_scaled: Tensor  # [chunk]
    log_total: Tensor  # [chunk]
    likeliest: Tensor  # [chunk]


def _log_softmax(states: Tensor, head: Tensor, temperature: float, columns: Columns) -> _LogSoftmax:
    logits = functional.linear(states, head).float()  # [chunk, columns]
    if logits.shape[1]:
        largest, likeliest = columns.largest(*logits.max(-1))
    else:
        nothing = logits.new_full((len(logits),), -torch.inf)
        largest, likeliest = columns.largest(nothing, torch.zeros_like(nothing, dtype=torch.int64))
    logits.sub_(largest.unsqueeze(1))
    total = logits.exp().sum(-1)
    if temperature == 1:
        log_total = log_scaled = columns.sum(total).log()
    else:
        scaled = logits.div_(temperature).exp().sum(-1)
        log_total, log_scaled = columns.sum(torch.stack([total, scaled])).log().unbind()
    return _LogSoftmax(logits.sub_(log_scaled[:, None]), log_scaled, log_total, likeliest)


class _Taught(NamedTuple):
    """What a teacher says of a chunk. `h` of each token; or of the `kept` ones and, last, of all others."""

    divergence: Tensor  # [chunk]
    likeliest: Tensor  # [chunk]
    h: Tensor  # [chunk, columns], or [chunk, k + 1]
    total: Tensor  # [chunk]; the sum of h over all outcomes
    kept: Tensor | None = None  # [chunk, k] ids
    log_q: Tensor | None = None  # [chunk, k + 1], the student's

    def pull(self, log_q: Tensor) -> Tensor:
        """The gradient of the divergence over the student's logits / T, `[chunk, columns]`, in the place of
        `log_q`."""
        if self.kept is None or self.log_q is None:
            return log_q.exp_().mul_(-self.total[:, None]).add_(self.h)
        # A token among the others moves their sum: by its share of it.
        q = self.log_q.exp()
        pulled = log_q.exp_().mul_((self.h[:, -1] / q[:, -1] - self.total)[:, None])
        return pulled.scatter_(1, self.kept, (self.h - q * self.total[:, None])[:, :-1])


def _teach(teacher: TeacherHead | TopK, log_q: Tensor, loss: DistillationLoss, columns: Columns) -> _Taught:
    """The teacher's word on a chunk of which the student says `log_q` (left as it is)."""
    if isinstance(teacher, TeacherHead):
        said = _log_softmax(teacher.hidden, teacher.weight, loss.temperature, columns)
        if teacher.top_k is None:
            divergence, h = compare(said.log, log_q, loss)
            divergence, total = columns.sum(torch.stack([divergence, h.sum(-1)])).unbind()
            return _Taught(divergence, said.likeliest, h, total)
        top = keep_top_k(said.log, teacher.top_k)
        del said
    else:
        top = teacher
    ids = top.ids.long()
    kept = log_q.gather(1, ids)
    rest = log_of_rest(log_q, ids)
    log_q.scatter_(1, ids, kept)
    outcomes = torch.cat([kept, rest[:, None]], -1)  # [chunk, k + 1]
    log_p = torch.cat([top.log_probabilities, top.log_rest[:, None].clamp_min(LEAST)], -1)
    divergence, h = compare(log_p, outcomes, loss)
    return _Taught(divergence, ids[:, 0], h, h.sum(-1), ids, outcomes)
