"""A comparison in the terminal: the verdicts as a table, then what differs, then what one should know."""

import json
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cheaptrain.compare.comparison import Pair, Report, compare, to_json, write
from cheaptrain.compare.logged import Axis
from cheaptrain.compare.tasks import BETTER, NOT_COMPARED, ONE_SIDE, WORSE, Comparison
from cheaptrain.say import say

_STYLES = {BETTER: "bold green", WORSE: "bold red", NOT_COMPARED: "yellow"}
_NAMED = 3  # tasks that one note is for
_MOST = 12  # differences of the recipes, tasks of one side alone: the page has all


def print_comparison(what: Sequence[str], axis: Axis, output: Path | None, console: Console, *, as_json: bool) -> None:
    """Compare, write page and JSON, print. Raises RecipeError for what cannot be compared."""
    report = compare(what, axis)
    page = write(report, output)
    if as_json:
        say(console, json.dumps(to_json(report), indent=2, ensure_ascii=False))
        return
    for pair in report.pairs:
        _print_pair(report, pair, console)
    meant = [difference for difference in report.differences if difference.kind != "how it is run"]
    names = " | ".join(side.name for side in report.sides)
    say(console, f"what differs ({names}):" if meant else "the recipes do not differ, as far as they are known")
    for difference in meant[:_MOST]:
        say(console, f"  {difference.key}: {' | '.join(difference.values)}")
    if len(meant) > _MOST:
        say(console, f"  and {len(meant) - _MOST} more")
    for note in report.notes:
        say(console, f"note: {note}", "yellow")
    say(console, f"{page}")


def _print_pair(report: Report, pair: Pair, console: Console) -> None:
    first = report.sides[0].name
    top = [comparison for comparison in (*pair.tasks, *pair.held_out) if comparison.within is None]
    rows = [comparison for comparison in top if comparison.outcome != ONE_SIDE]
    table = Table(box=SIMPLE_HEAD, title=Text(f"{pair.second} against {first}"), title_justify="left")
    table.add_column("task", overflow="fold")
    table.add_column(Text(first), justify="right", overflow="fold")
    table.add_column(Text(pair.second), justify="right", overflow="fold")
    table.add_column("verdict", overflow="fold", ratio=1)
    for row in rows:
        verdict = Text(row.verdict, _STYLES.get(row.outcome, ""))
        table.add_row(Text(row.task), shown_score(row, row.first), shown_score(row, row.second), verdict)
    if rows:
        console.print(table)
    if alone := [comparison.task for comparison in top if comparison.outcome == ONE_SIDE]:
        more = f" and {len(alone) - _MOST} more" if len(alone) > _MOST else ""
        say(console, f"scored on one side alone: {', '.join(alone[:_MOST])}{more}", "yellow")
    inside = sum(comparison.within is not None for comparison in pair.tasks)
    if inside:
        say(console, f"{inside} tasks that are parts of groups stand on the page and in the JSON")
    told: dict[str, list[str]] = {}
    for row in rows:
        for note in row.notes:
            told.setdefault(note, []).append(row.task)
    for note, tasks in told.items():
        more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
        say(console, f"{'; '.join(tasks[:_NAMED])}{more}: {note}", "dim")


def shown_score(row: Comparison, value: float | None) -> str:
    """As it is compared: points where differences are points."""
    if value is None:
        return "–"
    return f"{value * row.scale:.1f}" if row.scale == 100 else f"{value:.4g}"
