"""What counts as odd in a run: alarms at every noise, spikes hidden behind others, first steps taken for stalls."""

import numpy as np
import pytest

from cheaptrain.report.incidents import growth, spikes, stalls
from cheaptrain.report.series import Column


def column(values: np.ndarray) -> Column:
    steps = np.arange(1.0, len(values) + 1)
    return Column(steps, steps * 10, np.asarray(values, dtype=np.float64))


@pytest.mark.parametrize("seed", range(4))
def test_noise_falling_loss_and_a_new_level_below_are_no_spikes(seed: int) -> None:
    draw = np.random.default_rng(seed)
    steps = np.arange(5000)
    assert spikes(column(3 + 0.1 * draw.standard_normal(5000))) == []
    assert spikes(column(2 + 6 * np.exp(-steps / 300) + 0.1 * draw.standard_normal(5000))) == []
    assert spikes(column(np.where(steps < 2500, 3.0, 1.0) + 0.1 * draw.standard_normal(5000))) == []
    assert spikes(column(np.full(500, 2.0))) == []  # no spread at all


def test_spikes_are_found_where_they_are_also_after_others_and_in_a_row_they_are_one() -> None:
    values = 3 + 0.05 * np.random.default_rng(1).standard_normal(1000)
    values[200] = 30.0
    values[230] = 5.0  # the mean and deviation of the 64 before it would be dragged up by the first
    values[500:504] = [4.0, 6.0, 7.0, 5.0]
    values[700] = np.nan  # a skipped step is told as one, and is no number to compare with
    values[10] = 30.0  # among the first 64
    found = spikes(column(values))
    assert [(spike.first, spike.last, spike.step, spike.value) for spike in found] == [
        (201, 201, 201, 30.0), (231, 231, 231, 5.0), (501, 504, 503, 7.0),
    ]  # fmt: skip
    assert all(abs(spike.usual - 3) < 0.05 for spike in found)


def test_a_very_long_run_is_reckoned_in_parts_to_the_same_end() -> None:
    values = 3 + 0.05 * np.random.default_rng(2).standard_normal(45_000)
    for at in (19_999, 20_000, 20_063, 20_064, 44_999):
        values[at] = 9.0
    assert [spike.step for spike in spikes(column(values))] == [20_000, 20_064, 45_000]
    assert [(spike.first, spike.last) for spike in spikes(column(values))][:2] == [(20_000, 20_001), (20_064, 20_065)]


def test_slow_steps_are_stalls_and_the_first_step_of_a_launch_is_none() -> None:
    seconds = np.full(100, 0.5)
    seconds[0], seconds[40], seconds[60], seconds[70] = 30.0, 20.0, 1.4, 2.5
    found = stalls(column(seconds), [0, 40])
    assert found is not None
    assert (found.count, found.longest_step, found.longest_seconds, found.usual_seconds) == (1, 71, 2.5, 0.5)
    assert found.lost_seconds == pytest.approx(2.0)
    again = stalls(column(seconds), [0])
    assert again is not None and (again.count, again.longest_step) == (2, 41)
    assert stalls(column(np.full(100, 0.5)), [0]) is None
    assert stalls(column(np.array([9.0, 0.5, 0.5])), [0]) is None  # too few to say what is usual


def test_memory_that_creeps_up_is_seen_and_the_first_steps_are_not_compared_with() -> None:
    steady = np.concatenate([np.linspace(0.1, 1.0, 25), np.ones(75)])
    assert growth(column(steady)) == pytest.approx(0.0)
    assert growth(column(np.linspace(1.0, 2.0, 100))) == pytest.approx(0.36, abs=0.02)
    assert growth(column(np.linspace(1.0, 2.0, 20))) is None
