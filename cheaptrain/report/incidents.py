"""What was odd in a run, found in its metrics after the fact.

Spike: a loss far above those just before it. Far is said in robust units: by how many spreads (1.4826 x the median
distance from the median) it lies above the median of the 64 logged steps before it, where the spread counts as one per
cent of that median at least. The trap is the mean and the standard deviation, which one spike drags up so far that it,
and those after it, look usual.

Stall: a step that took more than three times the median of all steps. The first step of a launch compiles and fills
caches, and is none.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from cheaptrain.report.series import Column, Numbers

WINDOW, SPREADS, TIMES = 64, 8.0, 3.0
_NORMAL = 1.4826  # the spread of normal noise is so many median distances from its median
_LEAST_SPREAD = 0.01
_AT_ONCE = 20_000  # windows reckoned at a time


@dataclass(frozen=True)
class Spike:
    """Losses in a row that stood out: the first and the last step, the highest value and where, and what was usual."""

    first: int
    last: int
    step: int
    value: float
    usual: float


@dataclass(frozen=True)
class Stalls:
    """Slow steps: how many, the seconds they took beyond the usual ones together, the usual, and the longest."""

    count: int
    lost_seconds: float
    usual_seconds: float
    longest_seconds: float
    longest_step: int


def spikes(loss: Column) -> list[Spike]:
    """Where the loss stood out. The first 64 logged steps are only what later ones are held against."""
    loss = loss.finite
    if len(loss) <= WINDOW:
        return []
    usual, spread = _before(loss.values)
    steps, values = loss.steps[WINDOW:], loss.values[WINDOW:]
    high = np.flatnonzero(values - usual > SPREADS * np.maximum(_NORMAL * spread, _LEAST_SPREAD * np.abs(usual)))
    groups = np.split(high, np.flatnonzero(np.diff(high) > 1) + 1) if len(high) else []
    found = []
    for group in groups:
        top = group[values[group].argmax()]
        found.append(Spike(int(steps[group[0]]), int(steps[group[-1]]), int(steps[top]), values[top], usual[top]))
    return found


def stalls(step_seconds: Column, starts: Collection[int]) -> Stalls | None:
    """The slow steps, if there were any; `starts`: steps after which a launch began."""
    seconds = step_seconds.finite
    counted = ~np.isin(seconds.steps, [start + 1 for start in starts])
    steps, values = seconds.steps[counted], seconds.values[counted]
    if len(values) < 5:
        return None
    usual = float(np.median(values))
    slow = np.flatnonzero(values > TIMES * usual)
    if not len(slow):
        return None
    longest = slow[values[slow].argmax()]
    return Stalls(
        len(slow), float((values[slow] - usual).sum()), usual, float(values[longest]), int(steps[longest])
    )  # fmt: skip


def growth(memory: Column) -> float | None:
    """By what share memory grew from the second quarter of the run to its last; None for a short run."""
    values = memory.finite.values
    if len(values) < 40:
        return None
    quarter = len(values) // 4
    return float(np.median(values[-quarter:]) / np.median(values[quarter : 2 * quarter]) - 1)


def _before(values: Numbers) -> tuple[Numbers, Numbers]:
    """Median and median distance from it of the WINDOW values before each, from the first that has so many."""
    windows = sliding_window_view(values[:-1], WINDOW)  # [n - WINDOW, WINDOW]
    medians, spreads = [], []
    for start in range(0, len(windows), _AT_ONCE):
        part = windows[start : start + _AT_ONCE]
        median = np.median(part, axis=1)
        medians.append(median)
        spreads.append(np.median(np.abs(part - median[:, None]), axis=1))
    return np.concatenate(medians), np.concatenate(spreads)
