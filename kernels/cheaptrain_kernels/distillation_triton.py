"""A chunk of distillation by Triton kernels: logits of both models as the matrix products made them, in bf16, and the
gradient in the place of the student's.

Each kernel is a sweep over rows of logits (`triton_rows.py`, `triton_divergence.py`); between two of them there are
numbers a row, which torch puts together and, where the heads are spread over processes, sends around.

Of a top-k teacher no kernel knows anything. The k tokens are taken out of the student's rows (their logits become
-inf), so that a sweep sees "any other token" and nothing else, and the logarithm of the others' mass is summed as one,
not left over by a subtraction. The k logits and their gradients are small matrices for torch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cheaptrain_kernels.columns import Columns
from cheaptrain_kernels.divergence import LEAST, DistillationLoss, TeacherHead, TopK, Word, compare
from cheaptrain_kernels.row_ops import divergence_rows, row_statistics, softmax_gradient


def word_by_triton(
    states: Tensor,
    head: Tensor,
    teacher: TeacherHead | TopK,
    target: Tensor,
    factor: Tensor,
    loss: DistillationLoss,
    columns: Columns,
    wanted: bool,
) -> Word:
    """As `distillation_torch.word_by_torch`; heads may have more rows than there are columns here."""
    logits = functional.linear(states, head)  # [chunk, columns], in the compute dtype
    if isinstance(teacher, TeacherHead) and teacher.top_k is None:
        return _of_all(logits, teacher, target, factor, loss, columns, wanted)
    if isinstance(teacher, TeacherHead):
        assert teacher.top_k is not None
        teacher = top_k_by_triton(teacher.hidden, teacher.weight, teacher.top_k, loss.temperature, columns)
    return _of_top_k(logits, teacher, target, factor, loss, columns, wanted)


def top_k_by_triton(states: Tensor, head: Tensor, k: int, temperature: float, columns: Columns) -> TopK:
    """As `distillation_torch.top_k_by_torch`."""
    logits = functional.linear(states, head)
    kept, ids = logits[:, : columns.count].topk(k)
    said = _kept_and_rest(logits, ids, kept, None, temperature, columns)
    return TopK(ids.int(), said.log_kept, said.log_rest)


class _Row(NamedTuple):
    """Of each row of logits, `[chunk]` each: the largest of all, the logarithms of the sums of exp((z - largest) / T)
    and of exp(z - largest), and the id of the largest."""

    largest: Tensor
    log_scaled: Tensor
    log_total: Tensor
    likeliest: Tensor


def _of_all(
    logits: Tensor,
    teacher: TeacherHead,
    target: Tensor,
    factor: Tensor,
    loss: DistillationLoss,
    columns: Columns,
    wanted: bool,
) -> Word:
    student = _look_at(logits, target, loss.temperature, columns)
    cross_entropy = _cross_entropy(student, columns.at(target, logits), target, columns)
    said = functional.linear(teacher.hidden, teacher.weight)
    taught = _look_at(said, target, loss.temperature, columns)
    facts = [student.largest, student.log_scaled, student.log_total, taught.largest, taught.log_scaled, factor]
    place = target - columns.first

    def sweep(centre: Tensor, measures: bool, writes: bool) -> Tensor:
        return divergence_rows(
            logits,
            said,
            place,
            torch.stack([*facts, centre]),
            columns.count,
            loss.divergence,
            loss.beta,
            loss.temperature,
            loss.alpha,
            measures,
            writes,
        )

    at_once = wanted and loss.divergence == "forward_kl"
    found = columns.sum(sweep(torch.zeros_like(factor), True, at_once))
    if wanted and not at_once:
        sweep(found[1] if loss.divergence == "jsd" else found[0], False, True)
    return Word(found[0], cross_entropy, student.likeliest, taught.likeliest, logits if wanted else None)


def _of_top_k(
    logits: Tensor,
    top: TopK,
    target: Tensor,
    factor: Tensor,
    loss: DistillationLoss,
    columns: Columns,
    wanted: bool,
) -> Word:
    ids, temperature = top.ids.long(), loss.temperature
    target_logit = columns.at(target, logits)
    said = _kept_and_rest(logits, ids, logits.gather(1, ids), target, temperature, columns)
    row = said.row
    cross_entropy = _cross_entropy(row, target_logit, target, columns)
    log_q = torch.cat([said.log_kept, said.log_rest[:, None]], -1)  # [chunk, k + 1]
    log_p = torch.cat([top.log_probabilities, top.log_rest[:, None].clamp_min(LEAST)], -1)
    divergence, h = compare(log_p, log_q, loss)
    if wanted:
        q, total = log_q.exp(), h.sum(-1)
        of_divergence, of_entropy = factor * (loss.alpha * temperature), factor * (1 - loss.alpha)
        shift = row.largest + row.log_total
        others = of_divergence * (h[:, -1] / q[:, -1] - total)  # a token among the others has its share of their pull
        shares = [shift, of_entropy, of_entropy, row.largest / temperature + row.log_scaled, others]
        softmax_gradient(logits, target, torch.stack(shares), columns.count, temperature, 0.0)
        gradient = (h[:, :-1] - q[:, :-1] * total[:, None]) * of_divergence[:, None]
        if loss.alpha < 1:
            plain = (said.logits - shift[:, None]).exp() - (ids == target[:, None]).float()
            gradient += plain * of_entropy[:, None]
        logits.scatter_(1, ids, gradient.to(logits.dtype))
    return Word(divergence, cross_entropy, row.likeliest, ids[:, 0], logits if wanted else None)


def _look_at(logits: Tensor, target: Tensor, temperature: float, columns: Columns) -> _Row:
    """The whole row, of the columns here; three messages where heads are spread."""
    (here, total, scaled), column = row_statistics(logits, target, columns.count, temperature, 0.0)
    largest, likeliest = columns.largest(here, column)
    if columns.group is not None:
        less = here - largest
        total, scaled = columns.sum(torch.stack([total * less.exp(), scaled * (less / temperature).exp()])).unbind()
    return _Row(largest, scaled.log(), total.log(), likeliest)


class _KeptAndRest(NamedTuple):
    """A row cut to k tokens and one outcome for all others; probabilities are those at the temperature."""

    row: _Row
    logits: Tensor  # [chunk, k] fp32, of the k tokens
    log_kept: Tensor  # [chunk, k]
    log_rest: Tensor  # [chunk]


def _kept_and_rest(
    logits: Tensor, ids: Tensor, kept: Tensor, target: Tensor | None, temperature: float, columns: Columns
) -> _KeptAndRest:
    """Of rows of logits, which become -inf at `ids` `[chunk, k]`, where they were `kept`."""
    logits.scatter_(1, ids, -torch.inf)
    (rest, total, scaled), column = row_statistics(logits, target, columns.count, temperature, 0.0)
    own = kept.float()
    best = own.amax(1)
    largest = torch.maximum(best, rest)
    total = (own - largest[:, None]).exp().sum(1) + total * (rest - largest).exp()
    log_rest = (rest - largest) / temperature + scaled.log()
    log_kept = (own - largest[:, None]) / temperature
    log_scaled = (log_kept.exp().sum(1) + log_rest.exp()).log()
    likeliest = torch.where(own == largest[:, None], ids, columns.vocab).amin(1)
    likeliest = torch.where(rest == largest, torch.minimum(likeliest, column), likeliest)
    return _KeptAndRest(
        _Row(largest, log_scaled, total.log(), likeliest),
        own,
        log_kept - log_scaled[:, None],
        (log_rest - log_scaled).clamp_min(LEAST),
    )


def _cross_entropy(row: _Row, target_logit: Tensor, target: Tensor, columns: Columns) -> Tensor:
    """At T = 1, `[chunk]`; of what is not supervised anything."""
    return row.log_total - columns.sum((target_logit - row.largest).where(columns.has(target), 0.0))
