"""What the runs logged, and where each of its points lies on a common axis.

The axis is one on which the runs can be fair to each other: tokens read, arithmetic done (FLOPs, reckoned as the plan
and the MFU reckon them), or seconds of training. Steps are none: a step is another number of tokens in every recipe.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cheaptrain.checkpoint.launch_record import read_launch
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.compare.sides import Member, Side
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.report.series import Column, Metrics, Numbers, read_metrics

Axis = Literal["tokens", "flops", "time"]
AXES: dict[Axis, str] = {"tokens": "tokens", "flops": "FLOPs", "time": "seconds of training"}


@dataclass(frozen=True)
class Logged:
    """The metrics of a run up to what is compared of it, and the FLOPs of one of its tokens, where they are needed."""

    member: Member
    metrics: Metrics
    flops_per_token: float | None = None


def parse_axis(text: str) -> Axis:
    """Raises RecipeError for what is no axis."""
    for axis in AXES:
        if text == axis:
            return axis
    raise RecipeError(f"--axis {text}: write one of {', '.join(AXES)}")


def read_logged(sides: Sequence[Side], axis: Axis, report: Callable[[str], None]) -> list[list[Logged]]:
    """What every run of every side logged; a checkpoint without a run logged nothing. What is odd goes to `report`."""
    return [[_logged(member, axis, report) for member in side.members if member.run] for side in sides]


def along(run: Logged, steps: Numbers, axis: Axis) -> Numbers:
    """Where on the axis the ends of `steps` are; empty where that is not known."""
    known = run.metrics["train/tokens"]
    if not len(known):
        return np.empty(0)
    if axis == "time":
        return _seconds(run.metrics, steps)
    order = np.argsort(known.steps, kind="stable")
    tokens: Numbers = np.interp(steps, known.steps[order], known.values[order])
    if axis == "flops":
        return np.empty(0) if run.flops_per_token is None else tokens * run.flops_per_token
    return tokens


def _logged(member: Member, axis: Axis, report: Callable[[str], None]) -> Logged:
    assert member.run is not None
    metrics = read_metrics(member.run.metrics)
    if metrics.broken:
        report(f"{member.run.metrics}: {metrics.broken} broken line{'s' * (metrics.broken > 1)} left out")
    if not metrics.columns:
        report(f"{member.run.metrics}: nothing was logged")
    if member.step is not None:
        metrics.columns = {name: _until(column, member.step) for name, column in metrics.columns.items()}
    return Logged(member, metrics, _flops_per_token(member, report) if axis == "flops" else None)


def _until(column: Column, step: int) -> Column:
    kept = column.steps <= step
    return Column(column.steps[kept], column.tokens[kept], column.values[kept])


def _seconds(metrics: Metrics, steps: Numbers) -> Numbers:
    """Seconds of training by the end of each step: the tokens between two lines of the log by the speed of the latter,
    so that steps which were not logged count as well. Validation and saving are not in it."""
    speed = metrics["train/tokens_per_second"].finite
    moving = speed.values > 0
    if not moving.any():
        return np.empty(0)
    seconds = np.cumsum(np.diff(speed.tokens[moving], prepend=0) / speed.values[moving])
    found: Numbers = np.interp(steps, [0.0, *speed.steps[moving]], [0.0, *seconds])
    return found


def _flops_per_token(member: Member, report: Callable[[str], None]) -> float | None:
    """Forward and backward of one trained token: as the launch reckoned it, else from the newest checkpoint's config. A
    teacher's passes are not in it, and that is told."""
    assert member.run is not None
    recipe = (member.kept or {}).get("recipe", {})
    if recipe.get("distill"):
        report(f"{member.name}: the FLOPs are the student's; what the teacher took is not in them")
    try:
        planned = read_launch(member.run).get("plan", {}).get("flops_per_token")
        return float(planned) if planned else _from_checkpoint(member.run, recipe)
    except (OSError, ValueError, KeyError, IndexError, AttributeError, CheaptrainError) as error:
        report(f"{member.name}: neither launch record nor checkpoint says its FLOPs ({error}): no curves of it")
        return None


def _from_checkpoint(run: RunDirectory, recipe: dict[str, Any]) -> float:
    from cheaptrain.model.facts import model_facts  # takes seconds to import
    from cheaptrain.recipe.schema import Lora, Model

    folder = run.steps()[-1]
    vocabulary = json.loads((folder / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    lora = Lora.model_validate(recipe["lora"]) if recipe.get("lora") else None
    spec = Model(config=str(folder), vocab_multiple=1)
    return model_facts(spec, vocab_size=vocabulary, seq_len=recipe["data"]["seq_len"], lora=lora).flops_per_token
