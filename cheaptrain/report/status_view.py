"""`cheaptrain status`: the stages as a table for people, or as JSON for machines."""

import json
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cheaptrain.report.status import (
    DAMAGED,
    DONE,
    FAILED,
    INTERRUPTED,
    NOT_PREPARED,
    RUNNING,
    STALE,
    STOPPED,
    StageStatus,
    status_of,
)
from cheaptrain.report.subjects import OUTPUTS, subjects_of
from cheaptrain.say import say
from cheaptrain.units import duration, human

_STYLES = {DONE: "green", RUNNING: "bold cyan", STOPPED: "yellow", INTERRUPTED: "yellow", STALE: "bold red"}
_STYLES |= {FAILED: "bold red", DAMAGED: "bold red", NOT_PREPARED: "yellow"}


def print_status(what: Sequence[str], console: Console, *, as_json: bool) -> None:
    """Print where the stages stand that `what` names. Raises RecipeError for a path that is not there."""
    stages = status_of(subjects_of(what))
    if as_json:
        say(console, json.dumps([stage.to_json() for stage in stages], indent=2, ensure_ascii=False))
        return
    if not stages:
        say(console, f"no runs in {', '.join(what) or f'{OUTPUTS}/'}")
        return
    console.print(_table(stages))
    for stage in stages:
        for note in stage.notes:
            say(console, f"{stage.name}: {note}", _STYLES.get(stage.state))
    for stage in stages:
        if stage.checkpoint is not None:
            say(console, f"{stage.name}: {stage.checkpoint}")


def _table(stages: Sequence[StageStatus]) -> Table:
    table = Table(box=SIMPLE_HEAD)
    table.add_column("stage")
    table.add_column("state")
    for column in ("step", "tokens", "loss", "validation loss", "time left"):
        table.add_column(column, justify="right")
    for stage in stages:
        table.add_row(
            Text(stage.name),
            Text(stage.state, _STYLES.get(stage.state, "")),
            _of(stage.step, stage.steps, "{:,}".format),
            _of(stage.tokens, stage.tokens_in_all, human),
            _loss(stage.loss),
            _loss(stage.validation_loss),
            "–" if stage.seconds_left is None else duration(stage.seconds_left),
        )
    return table


def _of(count: int | None, in_all: int | None, shown: Callable[[float], str]) -> str:
    if count is None and in_all is None:
        return "–"
    done = shown(count or 0)
    return f"{done} of {shown(in_all)}" if in_all is not None and in_all != count else done


def _loss(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
