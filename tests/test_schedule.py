"""The learning rate, read at tokens: where it starts, peaks, falls and ends."""

import dataclasses
from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise

import pytest

from cheaptrain.recipe.length import Curve
from cheaptrain.recipe.resolve import Resolved
from cheaptrain.recipe.schema import Train
from cheaptrain.train.schedule import learning_rate

STEP, STEPS = 100, 50


def _factor(schedule: str, warmup_steps: int, decay_steps: int = 0, final: float = 0.1) -> Callable[[int], float]:
    values = {field.name: 0 for field in dataclasses.fields(Resolved)}
    ends = tuple((Fraction(tokens), Fraction(tokens)) for tokens in (0, STEP * STEPS))
    curve = Curve(STEP * STEPS, warmup_steps * STEP, decay_steps * STEP, ends)
    resolved = Resolved(**values | {"tokens_per_step": STEP, "curve": curve})
    keys = {"steps": STEPS, "global_batch_tokens": STEP, "lr": 1.0, "schedule": schedule, "final_lr_ratio": final}
    if schedule == "constant":
        del keys["final_lr_ratio"]
    return learning_rate(Train.model_validate(keys), resolved)


def test_warmup_wastes_no_step_at_zero_and_peaks_on_its_last() -> None:
    factor = _factor("linear", warmup_steps=10)
    assert [factor(step * STEP) for step in range(10)] == pytest.approx([(step + 1) / 10 for step in range(10)])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_starts_at_the_peak_and_ends_at_the_final_ratio(schedule: str) -> None:
    factor = _factor(schedule, warmup_steps=10)
    assert factor(10 * STEP) == 1.0
    assert factor(30 * STEP) == pytest.approx(0.1 + 0.9 * 0.5)
    assert factor(STEPS * STEP) == pytest.approx(0.1)
    assert factor(2 * STEPS * STEP) == pytest.approx(0.1)  # never below, should a run be longer
    rates = [factor(step * STEP) for step in range(10, STEPS)]
    assert all(later < earlier for earlier, later in pairwise(rates))


def test_wsd_holds_the_peak_until_the_last_stretch() -> None:
    factor = _factor("wsd", warmup_steps=5, decay_steps=10, final=0.0)
    assert {factor(step * STEP) for step in range(5, 41)} == {1.0}
    assert factor(45 * STEP) == pytest.approx(0.5)
    assert factor(49 * STEP) == pytest.approx(0.1)


def test_constant_stays() -> None:
    factor = _factor("constant", warmup_steps=0)
    assert {factor(step * STEP) for step in range(STEPS)} == {1.0}


def test_the_rate_follows_tokens_not_calls() -> None:
    factor = _factor("linear", warmup_steps=10)
    assert factor(3000) == factor(3000)
    assert factor(2050) == pytest.approx(0.1 + 0.9 * (1 - (2050 - 1000) / 4000))


@pytest.mark.parametrize("warmup_steps", [0, 7, 50])
def test_the_curve_of_a_run_of_one_batch_is_its_tokens_to_the_last_bit(warmup_steps: int) -> None:
    factor = _factor("linear", warmup_steps=warmup_steps)
    warmup = warmup_steps * STEP
    for tokens in range(0, STEP * STEPS, STEP):
        if tokens < warmup:
            assert factor(tokens) == min(1.0, (tokens + STEP) / warmup)
        else:
            assert factor(tokens) == 0.1 + (1 - 0.1) * (1 - (tokens - warmup) / (STEP * STEPS - warmup))
