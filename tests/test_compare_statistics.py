"""Intervals that claim to know more than the answers say, differences found in noise, few seeds taken for many."""

import math

import numpy as np
import pytest

from cheaptrain.compare import statistics, student
from cheaptrain.compare.statistics import (
    Block,
    Estimate,
    between_paired_seeds,
    between_questions,
    between_seeds,
    holm,
)


def pair(first: np.ndarray, second: np.ndarray) -> Estimate:
    return between_questions([Block(first[None].astype(float), second[None].astype(float))])


@pytest.fixture
def fewer_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough for a simulation, where the draws of one estimate hardly matter beside the number of estimates."""
    monkeypatch.setattr(statistics, "RESAMPLES", 1000)


def within_chance(count: int, tries: int, chance: float) -> bool:
    """Whether `count` is what `chance` gives in all but 1 of 1,000 simulations (normal approximation)."""
    return abs(count - tries * chance) < 3.3 * math.sqrt(tries * chance * (1 - chance))


@pytest.mark.parametrize("df", [1, 2, 2.5, 7, 30, 199, 1e4])
def test_students_t_is_that_of_scipy(df: float) -> None:
    stats = pytest.importorskip("scipy.stats")
    for level in (0.5, 0.9, 0.95, 0.999):
        assert student.quantile(level, df) == pytest.approx(stats.t.ppf((1 + level) / 2, df), rel=1e-9)
    for t in (0.0, 0.1, 1.0, 3.0, 30.0):
        assert student.two_sided(t, df) == pytest.approx(2 * stats.t.sf(t, df), abs=1e-10)


def test_students_t_without_scipy() -> None:
    assert student.quantile(0.95, 2) == pytest.approx(4.302652729911275, rel=1e-10)
    assert student.two_sided(student.quantile(0.95, 2.5), 2.5) == pytest.approx(0.05, rel=1e-9)


@pytest.mark.usefixtures("fewer_draws")
@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.3, 0.4), (0.9, 0.95)])
def test_intervals_of_right_and_wrong_answers_hold_the_truth_as_often_as_they_say(before: float, after: float) -> None:
    rng, tries, held = np.random.default_rng(7), 400, 0
    for _ in range(tries):
        easy = rng.normal(size=200)  # the same questions for both, so the answers go together
        answers = [easy + rng.normal(size=200) for _ in range(2)]
        bounds = [np.sqrt(2) * _normal_quantile(chance) for chance in (before, after)]
        estimate = pair(*(one < bound for one, bound in zip(answers, bounds, strict=True)))
        held += estimate.low <= after - before <= estimate.high
    assert within_chance(held, tries, 0.95) or held > 0.95 * tries


@pytest.mark.usefixtures("fewer_draws")
def test_scores_between_right_and_wrong_are_covered_too() -> None:
    rng, tries, held = np.random.default_rng(8), 300, 0
    for _ in range(tries):
        first = rng.beta(2, 2, size=40)
        estimate = pair(first, first + rng.normal(0.02, 0.2, size=40))
        held += estimate.low <= 0.02 <= estimate.high
    assert within_chance(held, tries, 0.95)


@pytest.mark.usefixtures("fewer_draws")
def test_no_more_than_one_in_twenty_equal_models_is_called_different() -> None:
    rng, tries = np.random.default_rng(9), 400
    shown = sum(pair(rng.random(300) < 0.4, rng.random(300) < 0.4).shown for _ in range(tries))
    assert shown / tries < 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / tries)
    assert shown > 0  # a test that never speaks would pass as well


@pytest.mark.usefixtures("fewer_draws")
def test_a_few_seeds_are_not_taken_for_many_questions() -> None:
    """Three seeds that differ among themselves by 4 points: by questions alone a third of equal ones look different."""
    rng, tries, by_seeds, by_questions = np.random.default_rng(10), 150, 0, 0
    for _ in range(tries):
        easy = rng.normal(size=1000)
        sides = [easy + 0.15 * rng.normal(size=(3, 1)) + rng.normal(size=(3, 1000)) > 0 for _ in range(2)]
        block = Block(sides[0].astype(float), sides[1].astype(float))
        by_seeds += between_paired_seeds([block]).shown
        by_questions += between_questions([block]).shown
    assert by_seeds / tries < 0.05 + 3.3 * math.sqrt(0.05 * 0.95 / tries)
    assert by_questions / tries > 0.3


def test_answers_that_are_all_the_same_are_not_known_exactly() -> None:
    right = np.ones(200)
    estimate = pair(right, right)
    assert (estimate.difference, estimate.p, estimate.shown) == (0.0, 1.0, False)
    assert 0.01 < estimate.half_width < 0.02  # three in two hundred could differ unseen
    assert pair(np.ones(1000), np.ones(1000)).half_width < estimate.half_width / 3


def test_p_of_right_and_wrong_answers_is_the_exact_one() -> None:
    """Nine questions won, one lost: 22 of 1,024 ways of flipping them are as far apart."""
    first, second = np.zeros(50), np.zeros(50)
    first[0], second[1:10] = 1.0, 1.0
    assert pair(first, second).p == pytest.approx(22 / 1024, rel=1e-12)


def test_p_of_few_unlike_differences_counts_every_way_of_flipping() -> None:
    assert pair(np.zeros(4), np.array([1.0, 2.0, 4.0, 8.0])).p == pytest.approx(2 / 16)
    assert pair(np.zeros(4), np.array([-1.0, 2.0, 4.0, 8.0])).p == pytest.approx(4 / 16)


def test_p_of_many_unlike_differences_is_drawn_and_never_zero() -> None:
    rng = np.random.default_rng(11)
    first = rng.normal(size=300)
    assert pair(first, first + 1 + rng.normal(size=300)).p == pytest.approx(1 / 10_001)
    stats = pytest.importorskip("scipy.stats")
    second = first + rng.normal(0.1, 1.0, size=300)
    assert pair(first, second).p == pytest.approx(stats.ttest_rel(second, first).pvalue, abs=0.02)


def test_t_of_paired_seeds_is_that_of_their_differences() -> None:
    """A loss is one number a run, so there is nothing but the seeds."""
    first, second = np.array([[3.0], [3.2], [3.1]]), np.array([[2.9], [3.15], [2.95]])
    estimate = between_paired_seeds([Block(first, second)])
    assert (estimate.difference, estimate.df) == (pytest.approx(-0.1), 2)
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.ttest_rel(second[:, 0], first[:, 0])
    assert estimate.p == pytest.approx(wanted.pvalue, rel=1e-6)
    low, high = wanted.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == (pytest.approx(low), pytest.approx(high))


def test_t_of_other_seeds_is_welchs() -> None:
    first, second = np.array([[3.0], [3.2], [3.1], [3.3]]), np.array([[2.9], [2.95]])
    estimate = between_seeds([Block(first, second)])
    stats = pytest.importorskip("scipy.stats")
    wanted = stats.ttest_ind(second[:, 0], first[:, 0], equal_var=False)
    assert estimate.p == pytest.approx(wanted.pvalue, rel=1e-6)
    assert estimate.df == pytest.approx(wanted.df)


def test_questions_widen_the_interval_of_seeds_and_never_narrow_it() -> None:
    """Seeds that agree to a hair on fifty questions say little of other questions."""
    rng = np.random.default_rng(12)
    gain = rng.choice([0.0, 1.0], size=50, p=[0.8, 0.2])
    block = Block(np.zeros((3, 50)), np.tile(gain, (3, 1)))
    estimate = between_paired_seeds([block])
    assert estimate.half_width == pytest.approx(pair(np.zeros(50), gain).half_width, rel=0.15)
    alone = between_paired_seeds([Block(block.first[:, :1], block.second[:, :1])])
    assert (alone.low, alone.high) == (alone.difference, alone.difference)


def test_weights_of_a_group_are_those_of_its_score() -> None:
    small, large = np.array([1.0, 0.0]), np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    blocks = [Block(np.zeros((1, 2)), small[None], 0.5), Block(np.zeros((1, 6)), large[None], 0.5)]
    assert between_questions(blocks).difference == pytest.approx((1 / 2 + 2 / 6) / 2)
    assert between_questions(blocks).p == pytest.approx(2 / 8)  # three questions, all won


def test_holm_is_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_the_same_answers_give_the_same_interval() -> None:
    rng = np.random.default_rng(13)
    first, second = rng.random(100), rng.random(100)
    assert pair(first, second) == pair(first, second)


def _normal_quantile(chance: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(chance)
