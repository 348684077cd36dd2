"""The Triton kernel of distillation: a row of the student's logits and the same row of the teacher's, swept together.

What is computed is `divergence.compare` and the gradient it leads to, of the numbers that `row_statistics` found for
each of the two rows. Forward KL needs one sweep, because its h sums to -1 whatever the divergence is: measured and
written at once. The other two need their sum over the row, and over the processes that share it, before the first
number can be written: they are swept twice, by two launches.

The trap is rows of different widths: a padded vocabulary has its own stride, and only the first `vocab` columns of
either row are tokens. What is beyond them in the student's gets a gradient of zero, and is read by nobody.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cheaptrain_kernels.triton_rows import ONCE_SWEPT, block_of, clear_row, load_logits

_KINDS = {"forward_kl": 0, "reverse_kl": 1, "jsd": 2}
_REVERSE_KL, _JSD = tl.constexpr(1), tl.constexpr(2)


def divergence_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    facts: Tensor,
    vocab: int,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    measures: bool,
    writes: bool,
) -> Tensor:
    """See `row_ops.divergence_rows`."""
    rows = len(logits)
    results = logits.new_empty(2, rows, dtype=torch.float32)
    block, warps = block_of(logits.shape[1], ONCE_SWEPT)
    if rows:
        _divergence_rows[(rows,)](
            logits,
            logits.stride(0),
            teacher_logits,
            teacher_logits.stride(0),
            targets,
            facts,
            results,
            rows,
            1 / temperature,
            alpha * temperature,
            1 - alpha,
            beta,
            math.log(beta),
            math.log1p(-beta),
            VOCAB=vocab,
            COLUMNS=logits.shape[1],
            TEACHER_COLUMNS=teacher_logits.shape[1],
            KIND=_KINDS[divergence],
            MIXED=alpha < 1,
            MEASURES=measures,
            WRITES=writes,
            BLOCK=block,
            num_warps=warps,
        )
    return results


@triton.jit
def _divergence_rows(
    logits,
    row_stride,
    teacher_logits,
    teacher_stride,
    targets,
    facts,
    results,
    rows,
    over_temperature,
    of_divergence,
    of_entropy,
    beta,
    log_beta,
    log_other,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    MEASURES: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    teacher_row = teacher_logits + number * teacher_stride
    result = results + number
    factor = tl.load(facts + number + 5 * rows)
    if factor == 0.0:
        tl.store(result, 0.0)
        tl.store(result + rows, 0.0)
        if WRITES:
            clear_row(row, COLUMNS, BLOCK)
    else:
        _divergence_row(
            row,
            teacher_row,
            tl.load(targets + number).to(tl.int32),
            facts + number,
            result,
            rows,
            over_temperature,
            of_divergence * factor,
            of_entropy * factor,
            beta,
            log_beta,
            log_other,
            VOCAB,
            COLUMNS,
            TEACHER_COLUMNS,
            KIND,
            MIXED,
            MEASURES,
            WRITES,
            BLOCK,
        )


@triton.jit
def _divergence_row(
    row,
    teacher_row,
    target,
    fact,
    result,
    rows,
    over_temperature,
    of_divergence,
    of_entropy,
    beta,
    log_beta,
    log_other,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    TEACHER_COLUMNS: tl.constexpr,
    KIND: tl.constexpr,
    MIXED: tl.constexpr,
    MEASURES: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    largest = tl.load(fact)
    log_scaled = tl.load(fact + rows)
    log_total = tl.load(fact + 2 * rows)
    teacher_largest = tl.load(fact + 3 * rows)
    teacher_log_scaled = tl.load(fact + 4 * rows)
    centre = tl.load(fact + 6 * rows)  # what the pull of each token is measured from

    lanes = tl.arange(0, BLOCK)
    divergences = tl.zeros([BLOCK], dtype=tl.float32)
    totals = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        columns = first + lanes
        token = columns < VOCAB
        z = load_logits(row, columns, VOCAB, COLUMNS) - largest
        log_q = z * over_temperature - log_scaled
        said = load_logits(teacher_row, columns, VOCAB, TEACHER_COLUMNS)
        log_p = (said - teacher_largest) * over_temperature - teacher_log_scaled
        q = tl.exp(log_q)
        apart = tl.where(token, log_q - log_p, 0.0)  # outside both are -inf
        if KIND == _JSD:
            # log(b p + (1 - b) q), from the larger of the two
            of_p = log_p + log_beta
            of_q = log_q + log_other
            nearer = tl.maximum(of_p, of_q)
            log_mixed = nearer + tl.log(1.0 + tl.exp(tl.minimum(of_p, of_q) - nearer))
            from_q = tl.where(token, (1.0 - beta) * (log_q - log_mixed), 0.0)
            pull = q * (from_q - centre)
            if MEASURES:
                from_p = tl.where(token, beta * (log_p - log_mixed), 0.0)
                divergences += tl.exp(log_p) * from_p + q * from_q
                totals += q * from_q
        elif KIND == _REVERSE_KL:
            pull = q * (apart - centre)
            if MEASURES:
                divergences += q * apart
        else:
            p = tl.exp(log_p)
            pull = q - p
            if MEASURES:
                divergences -= p * apart
        if WRITES:
            gradient = pull * of_divergence
            if MIXED:
                gradient += (tl.exp(z - log_total) - tl.where(columns == target, 1.0, 0.0)) * of_entropy
            gradient = tl.where(token, gradient, 0.0)
            tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < COLUMNS)
    tl.store(result, tl.sum(divergences, 0))
    tl.store(result + rows, tl.sum(totals, 0))
