"""Scores for people: task, metric, value with its error, how many questions, how many examples, what guessing gives."""

from collections.abc import Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cheaptrain.evaluate.results import Metric, TaskResult
from cheaptrain.say import say

_MEMBERS_SHOWN = 24  # of a group


def print_scores(title: str, results: Sequence[TaskResult], console: Console, *, missing: Sequence[str] = ()) -> None:
    """Print the table, then what one should know of the numbers, and which tasks have none."""
    if results:
        table = Table(box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
        table.add_column("task", overflow="fold", min_width=16)
        table.add_column("metric", overflow="fold", min_width=16)
        for column in ("value ± stderr", "n", "shots", "guessing"):
            table.add_column(column, justify="right", no_wrap=True)
        hidden = _hidden(results)
        for result in results:
            if result.task in hidden:
                continue
            for number, metric in enumerate(result.metrics if not result.shown else ()):
                table.add_row(*_row(result, metric, first=number == 0))
        if table.row_count:
            console.print(table)
        if shown := [result.task for result in results if result.shown]:
            say(console, f"{title}: {', '.join(shown)}: to be read, in eval.json's folder and in the report", "dim")
        if hidden:
            say(console, f"and {len(hidden)} tasks of the groups, each in eval.json", "dim")
    for note, tasks in _by_note(results).items():
        more = f" and {len(tasks) - 4} more" if len(tasks) > 4 else ""
        say(console, f"{', '.join(tasks[:4])}{more}: {note}", "yellow")
    if missing:
        say(console, f"no score: {', '.join(missing)}", "red")


def number(value: float) -> str:
    """Four digits after the point, or as many as a large number has room for."""
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.4g}"


def with_error(metric: Metric) -> str:
    """`0.2500 ± 0.0090`; without an error where there is none."""
    return number(metric.value) + (f" ± {number(metric.stderr)}" if metric.stderr is not None else "")


def _row(result: TaskResult, metric: Metric, *, first: bool) -> list[str]:
    name = metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}"
    arrow = "" if metric.higher_is_better else " ↓"
    if not first:
        return ["", name + arrow, with_error(metric), "", "", ""]
    shots = result.settings.get("shots")
    return [
        f"{result.task} ({len(result.members)} tasks)" if result.members else result.task,
        name + arrow,
        with_error(metric),
        f"{result.n:,}",
        "–" if shots is None else str(shots),
        "–" if result.baseline is None else number(result.baseline),
    ]


def _hidden(results: Sequence[TaskResult]) -> set[str]:
    """Tasks of groups that are too large to be read in a terminal: the mean is shown."""
    return {name for result in results if len(result.members) > _MEMBERS_SHOWN for name in result.members}


def _by_note(results: Sequence[TaskResult]) -> Mapping[str, list[str]]:
    notes: dict[str, list[str]] = {}
    for result in results:
        for note in result.notes:
            notes.setdefault(note, []).append(result.task)
    return notes
