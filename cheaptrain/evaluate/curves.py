"""Learning curves: what each task gave at every checkpoint that was ever scored, against the tokens it had seen.

They are drawn from the kept results alone, so a checkpoint that retention has deleted stays on its curve. A curve joins
only points that were asked alike: another limit or another number of shots is another curve.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.evaluate.results import TaskResult, holding_evaluations
from cheaptrain.evaluate.standing import file_stem
from cheaptrain.units import human

SHEET = "learning-curves.png"
_PLACE = ("limit", "shots", "chat_template", "system", "seed", "dtype", "content")


@dataclass(frozen=True)
class Point:
    """The main metric of a task at one checkpoint."""

    step: int
    tokens: int
    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class LearningCurve:
    """One task, asked alike at every point, oldest first."""

    task: str
    metric: str
    baseline: float | None
    shots: int | None
    limit: int | None
    points: tuple[Point, ...]


def learning_curves(run: RunDirectory) -> list[LearningCurve]:
    """A curve for each task of the run's checkpoints, in the order of their names. Tasks whose group has one, and those
    that are only there to be read, have none."""
    found: dict[tuple[str, str], list[tuple[Point, TaskResult]]] = {}
    for evaluation in holding_evaluations(run)[0]:
        step, tokens = evaluation.checkpoint.step, evaluation.checkpoint.tokens
        if step is None or tokens is None:
            continue
        for result in sorted(evaluation.results, key=lambda result: result.when):
            if result.shown or not result.metrics:
                continue
            main = result.metrics[0]
            alike = json.dumps([result.version, *(result.settings.get(name) for name in _PLACE)], sort_keys=True)
            points = found.setdefault((result.task, alike), [])
            points[:] = [(point, other) for point, other in points if point.step != step]
            points.append((Point(step, tokens, main.value, main.stderr, result.n), result))
    of_groups = {name for points in found.values() for _, result in points for name in result.members}
    return [
        LearningCurve(
            task,
            points[-1][1].metrics[0].name,
            points[-1][1].baseline,
            points[-1][1].settings.get("shots"),
            points[-1][1].settings.get("limit"),
            tuple(point for point, _ in points),
        )
        for (task, _), points in sorted(found.items())
        if task not in of_groups
    ]


def draw_learning_curves(run: RunDirectory, folder: Path) -> list[Path]:
    """Write a PNG for each curve, and one sheet of all, into `folder`; returns them, the sheet first. Empty without a
    scored checkpoint."""
    curves = learning_curves(run)
    if not curves:
        return []
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    sheet = Figure(figsize=(4.6 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(sheet)
    for place, curve in enumerate(curves, 1):
        _draw(sheet.add_subplot(rows, columns, place), curve)
    written = [folder / SHEET]
    sheet.savefig(written[0], dpi=110)
    names = [curve.task for curve in curves]
    for number, curve in enumerate(curves):
        alone = Figure(figsize=(6.4, 4.2), layout="constrained")
        FigureCanvasAgg(alone)
        _draw(alone.add_subplot(), curve)
        ending = "curve" if names.count(curve.task) == 1 else f"curve-{names[:number].count(curve.task) + 1}"
        written.append(folder / f"{file_stem(curve.task, ending)}.png")
        alone.savefig(written[-1], dpi=110)
    return written


def _draw(axes: Any, curve: LearningCurve) -> None:
    tokens = [point.tokens for point in curve.points]
    values = [point.value for point in curve.points]
    (line,) = axes.plot(tokens, values, marker="o", markersize=3.5, linewidth=1.4)
    if all(point.stderr is not None for point in curve.points):
        low = [point.value - (point.stderr or 0.0) for point in curve.points]
        high = [point.value + (point.stderr or 0.0) for point in curve.points]
        if len(tokens) > 1:
            axes.fill_between(tokens, low, high, alpha=0.2, color=line.get_color(), linewidth=0)
        else:
            axes.errorbar(tokens, values, [point.stderr for point in curve.points], color=line.get_color(), capsize=3)
    if curve.baseline is not None:
        axes.axhline(curve.baseline, color="0.5", linestyle=":", linewidth=1)
        axes.annotate("guessing", (tokens[0], curve.baseline), fontsize=7, color="0.4", va="bottom")
    axes.set_title(f"{curve.task}{_asked(curve)}", fontsize=9)
    axes.set_xlabel("tokens seen", fontsize=8)
    axes.set_ylabel(f"{curve.metric} ± standard error", fontsize=8)
    axes.xaxis.set_major_formatter(lambda value, _: human(round(value)))
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.25)


def _asked(curve: LearningCurve) -> str:
    counts: Sequence[int] = sorted({point.n for point in curve.points})
    shots = f", {curve.shots}-shot" if curve.shots is not None else ""
    return f" (n = {counts[0]:,}{shots})"
