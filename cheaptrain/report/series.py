"""What a run logged, as columns of numbers, and the same with fewer points for a picture.

metrics.jsonl of a long run has hundreds of megabytes, so lines are read one at a time and only numbers are kept. The
trap is to draw every hundredth point: the spike that somebody looks for is between them. A thinned curve keeps the
lowest and the highest point of each stretch, so what stands out stays.
"""

import json
import math
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]
_STRETCHES = 240  # of a thinned curve; each keeps two points


@dataclass(frozen=True)
class Column:
    """One metric: steps, tokens read by then (NaN where the line does not say), values (NaN: not finite), all `[n]`."""

    steps: Numbers
    tokens: Numbers
    values: Numbers

    @property
    def finite(self) -> "Column":
        """Without what was not finite."""
        kept = np.isfinite(self.values)
        return Column(self.steps[kept], self.tokens[kept], self.values[kept])

    def __len__(self) -> int:
        return len(self.values)


@dataclass
class Metrics:
    """All metrics of a run by name, in the order in which they were logged. `broken`: lines that could not be read."""

    columns: dict[str, Column] = field(default_factory=dict)
    broken: int = 0

    def __getitem__(self, name: str) -> Column:
        """The column of a metric, empty when it was never logged."""
        nothing = np.empty(0)
        return self.columns.get(name, Column(nothing, nothing, nothing))

    def last(self, name: str) -> float | None:
        """The last finite value."""
        values = self[name].finite.values
        return float(values[-1]) if len(values) else None


def read_metrics(path: Path) -> Metrics:
    """Every number in a metrics file; of a run that is going on, was killed or never logged, what there is."""
    columns: dict[str, tuple[array[float], array[float], array[float]]] = {}
    found = Metrics()
    for record in _records(path, lambda: setattr(found, "broken", found.broken + 1)):
        tokens = record.get("train/tokens")
        tokens = tokens if isinstance(tokens, int | float) else math.nan
        for name, value in record.items():
            if value is None:
                value = math.nan  # written in place of what JSON has no number for
            elif isinstance(value, bool) or not isinstance(value, int | float):
                continue
            parts = columns.setdefault(name, (array("d"), array("d"), array("d")))
            for part, number in zip(parts, (record["step"], tokens, value), strict=True):
                part.append(number)
    found.columns = {name: Column(*(np.array(part, dtype=np.float64) for part in p)) for name, p in columns.items()}
    return found


def tokens_at(metrics: Metrics, steps: Numbers) -> Numbers:
    """Tokens read by the end of each step, from the lines that say it."""
    known = metrics["train/tokens"]
    if not len(known):
        return np.full(len(steps), np.nan)
    order = np.argsort(known.steps, kind="stable")
    found: Numbers = np.interp(steps, known.steps[order], known.values[order])
    return found


def thinned(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers]:
    """The curve with at most a few hundred points: of each stretch of it the lowest and the highest, and both ends."""
    if len(y) <= 2 * _STRETCHES:
        return x, y
    keep = {0, len(y) - 1}
    for start, stop in _stretches(len(y)):
        part = y[start:stop]
        keep |= {start + int(part.argmin()), start + int(part.argmax())}
    index = np.array(sorted(keep))
    return x[index], y[index]


def middle(x: Numbers, y: Numbers) -> tuple[Numbers, Numbers] | None:
    """The median of each short stretch of a noisy curve; None of a curve too short to need it."""
    stretches = min(60, len(y) // 8)
    if stretches < 4:
        return None
    parts = np.array_split(np.arange(len(y)), stretches)
    return np.array([x[part].mean() for part in parts]), np.array([np.median(y[part]) for part in parts])


def _stretches(count: int) -> Iterator[tuple[int, int]]:
    return pairwise(np.linspace(0, count, _STRETCHES + 1).astype(int).tolist())


def _records(path: Path, broken: Callable[[], None]) -> Iterator[dict[str, Any]]:
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    raise ValueError("no record")
            except ValueError:
                if line.endswith(b"\n"):  # else it is being written, or was when the process died
                    broken()
                continue
            yield record
