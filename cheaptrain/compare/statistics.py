"""How much of a difference chance alone would have made: intervals, p-values, and how many of them were asked for.

The same questions are put to both sides, so what is examined is the difference of each question (and of each seed),
never two separate errors: an easy question is easy for both, and that much noise falls away. There are three cases:

- one run a side: the questions are drawn anew (bootstrap), and the p-value is that of flipping the sign of each
  question's difference. It speaks of these two checkpoints, on questions of this kind.
- several seeds, the same on both sides: Student's t of the differences of the seeds. It speaks of the two recipes.
- several seeds, not the same: Welch's t.

With seeds the spread between questions is added to that between seeds, as far as it is not in there already, so that
the answer holds for other seeds and other questions. The trap of the first case is a test with right and wrong answers
in which the two sides hardly differ: of no difference at all the bootstrap draws nothing but zeros and claims to know
it exactly. So two imagined questions, one won by either side, are drawn along (Bonett and Price, 2012).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import NormalDist

import numpy as np

from cheaptrain.compare import student

LEVEL = 0.95
RESAMPLES = 10_000
_SEED = 20_250_101  # of the resampling: the same answers give the same interval
_ALL_FLIPS = 14  # up to so many questions that differ, every way of flipping them is tried
_DRAWN_AT_ONCE = 2_000_000
_FEW_VALUES = 256

Array = np.ndarray


@dataclass(frozen=True)
class Block:
    """The scores of one task, `first` and `second` [runs, questions], the same questions in the same order.

    `weight`: what one point of this task's mean is worth in the score, 1 for a task by itself.
    """

    first: Array
    second: Array
    weight: float = 1.0

    @property
    def questions(self) -> int:
        return int(self.first.shape[1])

    @property
    def right_or_wrong(self) -> bool:
        """Whether all scores are 0 or 1."""
        return all(bool(np.isin(side, (0.0, 1.0)).all()) for side in (self.first, self.second))


@dataclass(frozen=True)
class Estimate:
    """Second side minus first, in the unit of the score. `p`: the chance of a difference at least as large if there
    were none; where that is drawn, at least 1 in `RESAMPLES` + 1. `df`: degrees of freedom, where t is used."""

    difference: float
    low: float
    high: float
    p: float
    method: str  # "questions", "paired seeds" or "seeds"
    df: float | None = None

    @property
    def shown(self) -> bool:
        """Whether there is a difference: by the test and by the interval, where the two are not one."""
        return self.p < 1 - LEVEL and not self.low <= 0 <= self.high

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def between_questions(blocks: Sequence[Block]) -> Estimate:
    """One run a side (of more the mean is taken). Needs at least one question."""
    rng = np.random.default_rng(_SEED)
    total, drawn, shares = 0.0, np.zeros(RESAMPLES), list[Array]()
    for block in blocks:
        differences = block.second.mean(axis=0) - block.first.mean(axis=0)
        total += block.weight * float(differences.mean())
        drawn += block.weight * _drawn_means(_with_imagined(differences, block), rng)
        shares.append(block.weight * differences / block.questions)
    outside = _outside(sum(block.questions for block in blocks))
    low, high = np.quantile(drawn, [outside, 1 - outside])
    return Estimate(total, float(low), float(high), _sign_flip(np.concatenate(shares), rng), "questions")


def between_paired_seeds(blocks: Sequence[Block]) -> Estimate:
    """Row i of both sides is of the same seed. Needs at least two rows."""
    differences = sum(block.weight * (block.second - block.first).mean(axis=1) for block in blocks)
    assert isinstance(differences, np.ndarray)
    seeds = len(differences)
    extra, questions = _of_questions(blocks, paired=True)
    return _by_t(float(differences.mean()), float(differences.var(ddof=1)) / seeds, seeds - 1, extra, questions, True)


def between_seeds(blocks: Sequence[Block]) -> Estimate:
    """The seeds of the two sides are not the same. One side may have one run: its spread is then taken to be that of
    the other, which must have two at least."""
    first = sum(block.weight * block.first.mean(axis=1) for block in blocks)
    second = sum(block.weight * block.second.mean(axis=1) for block in blocks)
    assert isinstance(first, np.ndarray) and isinstance(second, np.ndarray)
    spread, df = _welch(first, second)
    extra, questions = _of_questions(blocks, paired=False)
    return _by_t(float(second.mean() - first.mean()), spread, df, extra, questions, False)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values, each as it counts when all of them were asked for (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = highest
    return corrected


def _by_t(difference: float, spread: float, df: float, extra: float, questions: int, paired: bool) -> Estimate:
    """`spread` and `extra`: variances of the difference by seeds and by questions, the first known badly and the second
    well. So each has its own t, and the two reaches are added as variances are (Zou and Donner, 2008)."""

    def reach(level: float) -> float:
        by_questions = student.quantile(level, questions - 1) * math.sqrt(extra) if extra else 0.0
        return math.hypot(student.quantile(level, df) * math.sqrt(spread), by_questions)

    half = reach(LEVEL)
    if extra or not spread:
        p = _chance_of(abs(difference), reach)
    else:
        p = student.two_sided(difference / math.sqrt(spread), df)
    return Estimate(difference, difference - half, difference + half, p, "paired seeds" if paired else "seeds", df)


def _chance_of(distance: float, reach: Callable[[float], float]) -> float:
    """1 minus the level whose reach is just `distance`; 1 where there is no distance."""
    if distance == 0:
        return 1.0
    low, high = -14 * math.log(10), 0.0  # log of the chance; below 1e-14 nothing is told apart
    while high - low > 1e-5:
        middle = (low + high) / 2
        low, high = (middle, high) if reach(-math.expm1(middle)) > distance else (low, middle)
    return math.exp(high)


def _welch(first: Array, second: Array) -> tuple[float, float]:
    """Variance of the difference of the means, and its degrees of freedom."""
    if min(len(first), len(second)) == 1:
        many = first if len(first) > 1 else second
        return float(many.var(ddof=1)) * (1 + 1 / len(many)), len(many) - 1
    parts = [(float(side.var(ddof=1)) / len(side), len(side) - 1) for side in (first, second)]
    variance = sum(part for part, _ in parts)
    return variance, (variance**2 / sum(part**2 / df for part, df in parts) if variance else parts[0][1])


def _of_questions(blocks: Sequence[Block], *, paired: bool) -> tuple[float, int]:
    """What the choice of the questions adds to the variance of the difference, and how many questions there are.

    The means over the seeds of each question differ by the question itself and by what is left of the chance in each
    single answer. The latter is in the spread between the seeds too, and is taken off here.
    """
    variance, questions = 0.0, 0
    for block in blocks:
        if (n := block.questions) < 2:
            continue
        means = block.second.mean(axis=0) - block.first.mean(axis=0)
        within = _residual(block.second - block.first) if paired else _residual(block.first) + _residual(block.second)
        imagined = _with_imagined(means, block)
        variance += block.weight**2 * max(0.0, float(imagined.var(ddof=1)) / len(imagined) - within / n)
        questions += n
    return variance, questions


def _residual(scores: Array) -> float:
    """Variance of a question's mean over the runs that neither the runs nor the questions explain; 0 for one run."""
    runs, questions = scores.shape
    if runs < 2:
        return 0.0
    left = scores - scores.mean(axis=0) - scores.mean(axis=1, keepdims=True) + scores.mean()
    return float((left**2).sum()) / ((runs - 1) * (questions - 1)) / runs


def _with_imagined(differences: Array, block: Block) -> Array:
    return np.concatenate([differences, [1.0, -1.0]]) if block.right_or_wrong else differences


def _drawn_means(values: Array, rng: np.random.Generator) -> Array:
    """Means of `RESAMPLES` draws of as many of the values, with replacement."""
    n = len(values)
    distinct, counts = np.unique(values, return_counts=True)
    if len(distinct) <= _FEW_VALUES:
        return rng.multinomial(n, counts / n, size=RESAMPLES) @ distinct / n  # the same draws, counted by their value
    means, at_once = np.empty(RESAMPLES), max(1, _DRAWN_AT_ONCE // n)
    for start in range(0, RESAMPLES, at_once):
        stop = min(start + at_once, RESAMPLES)
        means[start:stop] = values[rng.integers(0, n, size=(stop - start, n))].mean(axis=1)
    return means


def _outside(questions: int) -> float:
    """The share of the draws to leave out at each end. Draws from few questions lie too close together, so less is left
    out of them than of many: as much as makes it Student's interval where the draws are normal (Hesterberg, 2015)."""
    df = max(1, questions - 1)
    return NormalDist().cdf(-student.quantile(LEVEL, df) * math.sqrt((df + 1) / df))


def _sign_flip(values: Array, rng: np.random.Generator) -> float:
    """Share of all ways of giving the values other signs in which their sum is at least as far from 0.

    All of them where the values are of one size (then it is the binomial distribution) or few; else `RESAMPLES` at
    random and the one that was seen.
    """
    sizes = np.abs(values[values != 0])
    if len(sizes) == 0:
        return 1.0
    seen = abs(float(values.sum())) - 1e-9 * float(sizes.sum())
    if np.allclose(sizes, sizes[0], rtol=1e-12, atol=0):
        return _binomial(round(seen / sizes[0]), len(sizes))
    if len(sizes) <= _ALL_FLIPS:
        signs = np.array(list(product((-1.0, 1.0), repeat=len(sizes))))
        return float((np.abs(signs @ sizes) >= seen).mean())
    distinct, counts = np.unique(np.round(sizes / sizes.max(), 12), return_counts=True)
    if len(distinct) <= _FEW_VALUES:  # of values of one size only how many stay positive matters
        sums = (2 * rng.binomial(counts, 0.5, size=(RESAMPLES, len(counts))) - counts) @ distinct * sizes.max()
        return (int((np.abs(sums) >= seen).sum()) + 1) / (RESAMPLES + 1)
    reached, at_once = 0, max(1, _DRAWN_AT_ONCE // len(sizes))
    for start in range(0, RESAMPLES, at_once):
        plus = rng.integers(0, 2, size=(min(at_once, RESAMPLES - start), len(sizes)), dtype=np.int8)
        reached += int((np.abs(2 * (plus @ sizes) - sizes.sum()) >= seen).sum())
    return (reached + 1) / (RESAMPLES + 1)


def _binomial(excess: int, n: int) -> float:
    """The chance that of n fair coins heads and tails are at least `excess` apart."""
    if excess <= 0:
        return 1.0
    fewer = (n - excess) // 2
    log_chances = [math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)]
    return min(1.0, 2 * sum(math.exp(chance - n * math.log(2)) for chance in log_chances))
