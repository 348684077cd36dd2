"""The curves of all sides in one picture each: loss, held-out loss, speed, and what was scored.

Seeds of one side are thin lines with their mean over them; the mean is drawn where all of them are. Losses per token of
different tokenizers are not drawn beside each other. Points of a task are joined only where they were asked alike.
"""

import contextlib
from collections.abc import Callable, Sequence

import numpy as np

from cheaptrain.compare.held_out import one_tokenizer
from cheaptrain.compare.logged import AXES, Axis, Logged, along
from cheaptrain.compare.sides import Side
from cheaptrain.errors import CheaptrainError
from cheaptrain.evaluate.results import TaskResult, holding_evaluations
from cheaptrain.report.pictures import Curve, Picture
from cheaptrain.report.series import Numbers, middle
from cheaptrain.units import human

_POINTS = 400  # of the mean of several runs

Line = tuple[Numbers, Numbers]


def pictures_of(sides: Sequence[Side], logged: Sequence[Sequence[Logged]], axis: Axis) -> list[Picture]:
    """Those that would not be empty. `logged`: of each side its runs."""
    same = one_tokenizer(sides)
    wanted: list[tuple[str, str, str, bool, Callable[[float], str]]] = []
    if same:
        wanted.append(("train/loss", "Training loss", "Nats a token.", True, _plain))
        wanted.append(("val/loss", "Held-out loss", "Nats a token, on documents that no run has seen.", False, _plain))
    wanted.append(("val/bpb", "Held-out text", "Bits a byte, which do not depend on the tokenizer.", False, _plain))
    wanted.append(("train/tokens_per_second", "Throughput", "Tokens a second of all processes.", True, human))
    names = dict.fromkeys(name for side in logged for run in side for name in run.metrics.columns)
    for name in (name for name in names if name.startswith("eval/") and f"{name}/n" in names):
        wanted.append((name, name.removeprefix("eval/"), "While training.", False, _plain))
    found = [
        Picture(
            name.replace("/", "-"), title, caption, _logged_curves(name, noisy, sides, logged, axis), unit, AXES[axis]
        )
        for name, title, caption, noisy, unit in wanted
    ]
    return [picture for picture in (*found, *_scored(sides, logged, axis)) if picture.curves]


def _logged_curves(
    name: str, noisy: bool, sides: Sequence[Side], logged: Sequence[Sequence[Logged]], axis: Axis
) -> list[Curve]:
    curves = []
    for number, (side, runs) in enumerate(zip(sides, logged, strict=True)):
        columns = [(run, run.metrics[name].finite) for run in runs]
        lines = [(x, c.values) for run, c in columns if len(x := along(run, c.steps, axis))]
        curves += _of_side(side.name, number, lines, noisy)
    return curves


def _of_side(name: str, colour: int, lines: Sequence[Line], noisy: bool) -> list[Curve]:
    if len(lines) < 2:
        return [Curve(name, colour, x, y, noisy=noisy) for x, y in lines]
    smooth = [(noisy and middle(x, y)) or (x, y) for x, y in lines]
    mean = Curve(f"{name}, mean of {len(lines)}", colour, *_mean(smooth))
    return [*(Curve("", colour, x, y, thin=True) for x, y in smooth), mean]


def _mean(lines: Sequence[Line]) -> Line:
    start, stop = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    every = np.unique(np.concatenate([x for x, _ in lines]))
    at = every[(every >= start) & (every <= stop)]
    at = at if len(at) <= _POINTS else np.linspace(start, stop, _POINTS)
    mean: Numbers = np.mean([np.interp(at, x, y) for x, y in lines], axis=0)
    return at, mean


def _scored(sides: Sequence[Side], logged: Sequence[Sequence[Logged]], axis: Axis) -> list[Picture]:
    """A picture for each task, and each way of asking it, of which some run was scored at several checkpoints."""
    found: dict[tuple[str, str], list[list[_Points]]] = {}
    for number, runs in enumerate(logged):
        for run in runs:
            for asked, points in _points(run, axis).items():
                found.setdefault(asked, [[] for _ in sides])[number].append(points)
    drawn = []
    for (task, how), of_sides in found.items():
        if all(len(points) < 2 for runs in of_sides for points in runs):
            continue
        curves = list[Curve]()
        for number, (side, of_runs) in enumerate(zip(sides, of_sides, strict=True)):
            columns = [np.array(sorted(points)).T for points in of_runs]
            if len(columns) == 1:
                curves.append(Curve(side.name, number, columns[0][0], columns[0][1], error=columns[0][2]))
            else:
                curves += _of_side(side.name, number, [(x, y) for x, y, _ in columns], False)
        bars = "; bars are one standard error" if any(curve.error is not None for curve in curves) else ""
        drawn.append(Picture(f"task-{task}", task, f"{how}{bars}.", curves, _plain, AXES[axis]))
    return drawn


_Points = list[tuple[float, float, float]]  # place on the axis, score, standard error


def _points(run: Logged, axis: Axis) -> dict[tuple[str, str], _Points]:
    """(task, how it was asked) → the scores of the run's checkpoints."""
    found: dict[tuple[str, str], _Points] = {}
    assert run.member.run is not None
    with contextlib.suppress(CheaptrainError):  # it was told when the sides were read
        for evaluation in holding_evaluations(run.member.run)[0]:
            step = evaluation.checkpoint.step
            if step is None or (run.member.step is not None and step > run.member.step):
                continue
            place, seen = along(run, np.array([float(step)]), axis), set[tuple[str, str]]()
            for result in sorted(evaluation.results, key=lambda result: result.when, reverse=True):
                if result.shown or not result.metrics or not len(place):
                    continue
                metric, asked = result.metrics[0], (result.task, _asked(result))
                if asked not in seen:
                    found.setdefault(asked, []).append((float(place[0]), metric.value, metric.stderr or 0.0))
                seen.add(asked)
    return found


def _asked(result: TaskResult) -> str:
    shots, limit = result.settings.get("shots"), result.settings.get("limit")
    parts = [result.metrics[0].name.replace("_", " "), "" if shots is None else f"{shots}-shot"]
    return ", ".join(part for part in (*parts, f"the first {limit} questions" if limit else "") if part)


def _plain(value: float) -> str:
    return f"{value:.4g}"
