"""Scores over tokens: a picture for each way a task was asked, with bars of one standard error, over all stages; and
the light set.

Only what was asked alike stands in one picture: the same version of the task, the same questions and examples.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np

from cheaptrain.durable import fingerprint
from cheaptrain.evaluate.results import TaskResult
from cheaptrain.report.account import Account
from cheaptrain.report.formats import plain
from cheaptrain.report.pictures import Curve, Picture, errors_of
from cheaptrain.report.ways import Way, by_task, newest_by_way

_MOST_TOGETHER = 8  # curves of one picture, of tasks that were scored while training

_Points = list[tuple[int, TaskResult]]  # tokens of the stage at each checkpoint, oldest first, and what was scored


def score_pictures(accounts: Sequence[Account], starts: Sequence[float]) -> Iterator[Picture]:
    """What was scored while training, eight tasks together; then a picture for each way in which checkpoints were asked
    a task. Members of a group that has one have none."""
    yield from _light(accounts, starts)
    drawn = [_points(account) for account in accounts]
    results = [result for points in drawn for several in points.values() for _, result in several]
    members = {member for result in results for member in result.members}
    for task, ways in by_task(results).items():
        for way in ways if task not in members else ():
            stages = [(place, points[task, way]) for place, points in enumerate(drawn) if (task, way) in points]
            curves = [_curve(accounts[place], place, points) for place, points in stages]
            newest = stages[-1][1][-1][1]
            level = None if newest.baseline is None else (newest.baseline, "guessing")
            told, better = way.told(ways), "higher" if newest.metrics[0].higher_is_better else "lower"
            yield Picture(
                f"eval-{_file_name(task)}" + ("" if way == ways[0] else f"-{fingerprint(asdict(way))[:8]}"),
                f"{task}: {newest.metrics[0].name}" + (f", {told}" if told and len(ways) > 1 else ""),
                f"n = {newest.n:,}{', ' if told else ''}{told}, {better} is better; bars are one standard error."
                + ("" if level is None else f" Dashed: guessing gives {level[0]:.3g}."),
                curves,
                plain,
                starts=starts,
                level=level,
            )


def _points(account: Account) -> dict[tuple[str, Way], _Points]:
    found: dict[tuple[str, Way], _Points] = {}
    for evaluation in account.evaluations:
        if evaluation.checkpoint.tokens is not None:
            for asked, result in newest_by_way(evaluation).items():
                found.setdefault(asked, []).append((evaluation.checkpoint.tokens, result))
    return found


def _curve(account: Account, colour: int, points: _Points) -> Curve:
    metrics = [result.metrics[0] for _, result in points]
    return Curve(
        account.name,
        colour,
        np.array([account.offset + tokens for tokens, _ in points], dtype=np.float64),
        np.array([metric.value for metric in metrics]),
        error=errors_of([metric.stderr for metric in metrics]),
    )


def _light(accounts: Sequence[Account], starts: Sequence[float]) -> Iterator[Picture]:
    tasks: dict[str, list[tuple[Account, str]]] = {}
    for account in accounts:
        for name in account.metrics.columns:
            if name.startswith("eval/") and f"{name}/n" in account.metrics.columns:
                tasks.setdefault(name.removeprefix("eval/"), []).append((account, name))
    names = list(tasks)
    sheets = [names[first : first + _MOST_TOGETHER] for first in range(0, len(names), _MOST_TOGETHER)]
    for number, sheet in enumerate(sheets, 1):
        yield Picture(
            "scores-while-training" + (f"-{number}" if number > 1 else ""),
            "Scores while training" + (f", {number} of {len(sheets)}" if len(sheets) > 1 else ""),
            "The light set, of few questions each: see the bars of one standard error.",
            [_light_curve(task, colour, *place) for colour, task in enumerate(sheet) for place in tasks[task]],
            plain,
            starts=starts,
        )


def _light_curve(task: str, colour: int, account: Account, name: str) -> Curve:
    scores, errors = account.metrics[name], account.metrics[f"{name}/stderr"]
    known = dict(zip(errors.steps.tolist(), errors.values.tolist(), strict=True))
    bars = errors_of([known.get(step) for step in scores.steps.tolist()])
    return Curve(task, colour, account.position(scores), scores.values, error=bars)


def _file_name(task: str) -> str:
    """The name of a task where it can be that of a file, else what is left of it and a hash."""
    kept = "".join(sign if sign.isascii() and (sign.isalnum() or sign in "._-") else "_" for sign in task)[:60]
    return kept if kept == task else f"{kept}-{hashlib.sha256(task.encode()).hexdigest()[:8]}"
