"""Triton kernels over rows of logits, one program a row: cross-entropy and its gradient, and the parts of it.

Logits stay in the dtype the matrix product made them in; all arithmetic is fp32. A row of 128,256 bf16 logits is 256 KB
and does not fit into registers, so it is swept in blocks: once for the largest logit and the sum of exponentials, which
is rescaled whenever a larger logit comes, and, where a gradient is wanted, a second time to write it over the logits.
The second sweep goes backwards, because what was read last is still in the cache.

The traps. Offsets are int64: 20,000 rows of 128,256 logits are more than 2^31. The running maximum begins at a finite
number, so that a block of -inf does not make the sum NaN, while a NaN or +inf logit does: a loss that is not finite is
what stops a run that has broken. The number of columns is a constant of the program, one for each vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Of a row that is swept twice few should be under way at once, or 50 MB of cache do not hold them: 16 warps, and at 16
# numbers a thread (two loads of 16 bytes in bf16) two rows a multiprocessor, one loading while the other reduces. What
# is swept once is better off with more and smaller programs. Neither figure has been tuned on a GPU.
TWICE_SWEPT = 8192  # columns of a block
ONCE_SWEPT = 4096
_EACH_THREAD = 16

_IGNORED = tl.constexpr(-100)
_NOTHING = tl.constexpr(-3.0e38)  # below any logit that a model makes, and finite


def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    vocab: int,
    z_loss: float,
    soft_cap: float,
    writes: bool,
) -> Tensor:
    """See `row_ops.cross_entropy_rows`."""
    results = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    block, warps = block_of(logits.shape[1], TWICE_SWEPT)
    if len(logits):
        _cross_entropy_rows[(len(logits),)](
            logits,
            logits.stride(0),
            labels,
            weights,
            results,
            len(logits),
            z_loss,
            soft_cap,
            VOCAB=vocab,
            COLUMNS=logits.shape[1],
            WEIGHTED=weights is not None,
            CAPPED=soft_cap > 0,
            WRITES=writes,
            BLOCK=block,
            num_warps=warps,
        )
    return results


def row_statistics(
    logits: Tensor, labels: Tensor | None, vocab: int, temperature: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """See `row_ops.row_statistics`."""
    results = logits.new_empty(3, logits.shape[0], dtype=torch.float32)
    likeliest = logits.new_empty(logits.shape[0], dtype=torch.int64)
    block, warps = block_of(vocab, ONCE_SWEPT)
    if len(logits):
        _row_statistics[(len(logits),)](
            logits,
            logits.stride(0),
            labels,
            results,
            likeliest,
            len(logits),
            1 / temperature,
            soft_cap,
            VOCAB=vocab,
            COLUMNS=logits.shape[1],
            MASKED=labels is not None,
            SCALED=temperature != 1,
            CAPPED=soft_cap > 0,
            BLOCK=block,
            num_warps=warps,
        )
    return results, likeliest


def softmax_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, vocab: int, temperature: float, soft_cap: float
) -> None:
    """See `row_ops.softmax_gradient`."""
    block, warps = block_of(logits.shape[1], ONCE_SWEPT)
    if logits.numel():
        _softmax_gradient[(len(logits),)](
            logits,
            logits.stride(0),
            targets,
            factors,
            len(logits),
            1 / temperature,
            soft_cap,
            VOCAB=vocab,
            COLUMNS=logits.shape[1],
            SCALED=factors.shape[0] == 5,
            CAPPED=soft_cap > 0,
            BLOCK=block,
            num_warps=warps,
        )


def block_of(columns: int, most: int) -> tuple[int, int]:
    """Columns of a block, a power of two, and warps, for rows of so many columns."""
    block = min(triton.next_power_of_2(max(columns, 16)), most)
    return block, min(16, max(4, block // (32 * _EACH_THREAD)))


@triton.jit
def load_logits(row, columns, VOCAB: tl.constexpr, COLUMNS: tl.constexpr):
    """A block of a row in fp32; -inf where there is no token.

    What there is beside tokens is read all the same: a mask that ends amid 16 bytes would split every load of a block
    into single numbers.
    """
    logits = tl.load(row + columns, mask=columns < COLUMNS, other=-float("inf")).to(tl.float32)
    if COLUMNS > VOCAB:
        logits = tl.where(columns < VOCAB, logits, -float("inf"))
    return logits


@triton.jit
def clear_row(row, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Zeros over all columns of a row."""
    zeros = tl.zeros([BLOCK], dtype=row.dtype.element_ty)
    for first in range(0, COLUMNS, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        tl.store(row + columns, zeros, mask=columns < COLUMNS)


@triton.jit
def _capped(logits, soft_cap, CAPPED: tl.constexpr):
    """cap x tanh(logits / cap), as a sigmoid, which has no overflow at either end."""
    if CAPPED:
        logits = soft_cap * (2.0 * tl.sigmoid(2.0 * logits / soft_cap) - 1.0)
    return logits


@triton.jit
def _cross_entropy_rows(
    logits,
    row_stride,
    labels,
    weights,
    results,
    rows,
    z_loss,
    soft_cap,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    CAPPED: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    result = results + number
    label = tl.load(labels + number)
    if label == _IGNORED:
        tl.store(result, 0.0)
        tl.store(result + rows, 0.0)
        tl.store(result + 2 * rows, 0.0)
        if WRITES:
            clear_row(row, COLUMNS, BLOCK)
    else:
        weight = 1.0
        if WEIGHTED:
            weight = tl.load(weights + number)
        _cross_entropy_row(
            row, label.to(tl.int32), weight, result, rows, z_loss, soft_cap, VOCAB, COLUMNS, CAPPED, WRITES, BLOCK
        )


@triton.jit
def _cross_entropy_row(
    row,
    label,
    weight,
    result,
    rows,
    z_loss,
    soft_cap,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    CAPPED: tl.constexpr,
    WRITES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    # A label that is no token has no logit to read: the loss becomes NaN.
    known = (label >= 0) & (label < VOCAB)
    target = tl.load(row + label, mask=known, other=float("nan")).to(tl.float32)
    target = _capped(target, soft_cap, CAPPED)

    largest = -3.0e38  # as _NOTHING; a loop needs a plain number to begin with
    total = 0.0
    beaten = tl.zeros([BLOCK], dtype=tl.int32)  # whether a lane has met a likelier token, or an equal of a lower id
    for first in range(0, VOCAB, BLOCK):
        columns = first + lanes
        logits = _capped(load_logits(row, columns, VOCAB, COLUMNS), soft_cap, CAPPED)
        if CAPPED:
            logits = tl.where(columns < VOCAB, logits, -float("inf"))
        beats = (logits > target) | ((logits == target) & (columns < label))
        beaten = beaten | beats.to(tl.int32)
        larger = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), 0)
        largest = larger

    log_total = tl.log(total)
    log_sum = largest + log_total
    entropy = (largest - target) + log_total  # in this order: differences of large logits are exact
    tl.store(result, (entropy + z_loss * log_sum * log_sum) * weight)
    tl.store(result + rows, entropy * weight)
    tl.store(result + 2 * rows, tl.where(tl.max(beaten, 0) == 0, 1.0, 0.0))

    if WRITES:
        scale = weight * (1.0 + 2.0 * z_loss * log_sum)
        last: tl.constexpr = (COLUMNS - 1) // BLOCK
        for step in range(last + 1):
            places = (last - step) * BLOCK + lanes
            again = _capped(load_logits(row, places, VOCAB, COLUMNS), soft_cap, CAPPED)
            # Less the largest first and the logarithm then: the sum of both has lost digits where logits are large.
            gradient = tl.exp((again - largest) - log_total) * scale - tl.where(places == label, weight, 0.0)
            if CAPPED:
                slope = again / soft_cap
                gradient = gradient * (1.0 - slope * slope)
            gradient = tl.where(places < VOCAB, gradient, 0.0)
            tl.store(row + places, gradient.to(row.dtype.element_ty), mask=places < COLUMNS)


@triton.jit
def _row_statistics(
    logits,
    row_stride,
    labels,
    results,
    likeliest,
    rows,
    over_temperature,
    soft_cap,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    MASKED: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    result = results + number
    label = 0
    if MASKED:
        label = tl.load(labels + number).to(tl.int32)
    if label == _IGNORED:
        tl.store(result, 0.0)
        tl.store(result + rows, 1.0)
        tl.store(result + 2 * rows, 1.0)
        tl.store(likeliest + number, 0)
    else:
        _statistics_of_row(
            row, result, likeliest + number, rows, over_temperature, soft_cap, VOCAB, COLUMNS, SCALED, CAPPED, BLOCK
        )


@triton.jit
def _statistics_of_row(
    row,
    result,
    likeliest,
    rows,
    over_temperature,
    soft_cap,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    largest = -3.0e38  # as _NOTHING; a loop needs a plain number to begin with
    total = 0.0
    scaled = 0.0
    best = tl.full([BLOCK], _NOTHING, dtype=tl.float32)  # of each lane, and its column: the first of equal ones
    at = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, VOCAB, BLOCK):
        columns = first + lanes
        logits = _capped(load_logits(row, columns, VOCAB, COLUMNS), soft_cap, CAPPED)
        if CAPPED:
            logits = tl.where(columns < VOCAB, logits, -float("inf"))
        better = logits > best
        best = tl.where(better, logits, best)
        at = tl.where(better, columns, at)
        larger = tl.maximum(largest, tl.max(logits, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(logits - larger), 0)
        if SCALED:
            shrunk = tl.sum(tl.exp((logits - larger) * over_temperature), 0)
            scaled = scaled * tl.exp((largest - larger) * over_temperature) + shrunk
        largest = larger
    tl.store(result, largest)
    tl.store(result + rows, total)
    tl.store(result + 2 * rows, scaled if SCALED else total)
    first_best = tl.min(tl.where(best == tl.max(best, 0), at, 2147483647), 0)
    tl.store(likeliest, first_best.to(tl.int64))


@triton.jit
def _softmax_gradient(
    logits,
    row_stride,
    targets,
    factors,
    rows,
    over_temperature,
    soft_cap,
    VOCAB: tl.constexpr,
    COLUMNS: tl.constexpr,
    SCALED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = logits + number * row_stride
    factor = factors + number
    shift = tl.load(factor)
    share = tl.load(factor + rows)
    taken = tl.load(factor + 2 * rows)
    scaled_shift = 0.0
    scaled_share = 0.0
    if SCALED:
        scaled_shift = tl.load(factor + 3 * rows)
        scaled_share = tl.load(factor + 4 * rows)
    target = tl.load(targets + number).to(tl.int32)
    if (share == 0.0) & (taken == 0.0) & (scaled_share == 0.0):
        clear_row(row, COLUMNS, BLOCK)
    else:
        for first in range(0, COLUMNS, BLOCK):
            columns = first + tl.arange(0, BLOCK)
            z = _capped(load_logits(row, columns, VOCAB, COLUMNS), soft_cap, CAPPED)
            gradient = tl.exp(z - shift) * share - tl.where(columns == target, taken, 0.0)
            if SCALED:
                gradient += tl.exp(z * over_temperature - scaled_shift) * scaled_share
            if CAPPED:
                slope = z / soft_cap
                gradient = gradient * (1.0 - slope * slope)
            gradient = tl.where(columns < VOCAB, gradient, 0.0)
            tl.store(row + columns, gradient.to(row.dtype.element_ty), mask=columns < COLUMNS)
