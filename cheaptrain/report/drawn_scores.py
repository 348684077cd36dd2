"""Scores over tokens: a picture for each task, with bars of one standard error, over all stages; and the light set.

Only what was asked alike is joined by a line: the same version of the task, as many questions and examples.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from cheaptrain.evaluate.curves import LearningCurve, learning_curves
from cheaptrain.evaluate.results import TaskResult
from cheaptrain.report.account import Account
from cheaptrain.report.formats import plain
from cheaptrain.report.pictures import Curve, Picture, errors_of

_MOST_TOGETHER = 8  # curves of one picture, of tasks that were scored while training


def in_groups(results: Mapping[str, TaskResult]) -> list[str]:
    """Names of tasks: groups, then tasks that are in none, then members of groups."""
    members = {member for result in results.values() for member in result.members}
    return sorted(results, key=lambda task: (task in members, not results[task].members, task))


def score_pictures(accounts: Sequence[Account], starts: Sequence[float]) -> Iterator[Picture]:
    """What was scored while training, together; then a picture for each task that checkpoints were scored in."""
    yield Picture(
        "scores-while-training",
        "Scores while training",
        "The light set, of few questions each: see the bars of one standard error.",
        list(_light(accounts)),
        plain,
        starts=starts,
    )
    drawn: dict[str, list[tuple[int, LearningCurve]]] = {}
    results: dict[str, TaskResult] = {}
    for number, account in enumerate(accounts):
        for evaluation in account.evaluations:
            results |= evaluation.newest()
        for curve in learning_curves(account.run) if account.evaluations else ():
            drawn.setdefault(curve.task, []).append((number, curve))
    for task in in_groups({task: results[task] for task in drawn if task in results}):
        last = drawn[task][-1][1]
        better = "higher" if results[task].metrics[0].higher_is_better else "lower"
        level = None if last.baseline is None else (last.baseline, "guessing")
        guess = "" if level is None else f" Dashed: guessing gives {level[0]:.3g}."
        yield Picture(
            f"eval-{_file_name(task)}",
            f"{task}: {last.metric}",
            f"n = {last.points[-1].n:,}, {better} is better; bars are one standard error.{guess}",
            [_curve(accounts[number], number, curve) for number, curve in drawn[task]],
            plain,
            starts=starts,
            level=level,
        )


def _file_name(task: str) -> str:
    """The name of a task where it can be that of a file, else what is left of it and a hash."""
    kept = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "_" for sign in task)[:60]
    return kept if kept == task else f"{kept}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"


def _curve(account: Account, colour: int, curve: LearningCurve) -> Curve:
    points = curve.points
    return Curve(
        account.name,
        colour,
        np.array([account.offset + point.tokens for point in points], dtype=np.float64),
        np.array([point.value for point in points]),
        error=errors_of([point.stderr for point in points]),
    )


def _light(accounts: Sequence[Account]) -> Iterator[Curve]:
    colours: dict[str, int] = {}
    for account in accounts:
        for name in account.metrics.columns:
            task = name.removeprefix("eval/")
            if task == name or f"{name}/n" not in account.metrics.columns:
                continue
            scores, errors = account.metrics[name], account.metrics[f"{name}/stderr"]
            colour = colours.setdefault(task, len(colours))
            if colour < _MOST_TOGETHER:
                known = dict(zip(errors.steps.tolist(), errors.values.tolist(), strict=True))
                bars = errors_of([known.get(step) for step in scores.steps.tolist()])
                yield Curve(task, colour, account.position(scores), scores.values, error=bars)
