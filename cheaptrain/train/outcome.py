"""What came of the stages of a launch: one table, what the model writes now, where it lies, and what to do next."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.evaluate.sums import Marks
from cheaptrain.say import say
from cheaptrain.train.probing import marks_in
from cheaptrain.train.survey import Survey
from cheaptrain.units import duration, human


@dataclass(frozen=True)
class Outcome:
    """What became of one stage, read from what it left behind."""

    name: str
    state: str
    tokens: int
    seconds: float  # of this launch
    from_step: int  # where this launch took the stage up
    validations: tuple[dict[str, Any], ...]
    agreements: tuple[float, ...]  # with a teacher, of each step that was logged; empty without one
    samples: tuple[dict[str, Any], ...]
    marks: tuple[Marks | None, Marks | None]  # for sums it had never seen, before and after
    run: RunDirectory
    answers_only: bool  # whether only what the assistant says is learned, and scored
    talks: bool  # whether conversations are among what it learned
    unscored: tuple[str, ...] = ()  # tasks of [eval] that failed, and why


def outcome_of(survey: Survey, state: str, seconds: float, from_step: int, report: Callable[[str], None]) -> Outcome:
    """The outcome of a finished stage; `seconds` of this launch, 0 when it was done before. What cannot be read of its
    records goes to `report`: the table is no reason to fail."""
    recipe = survey.loaded.recipe
    run = RunDirectory(Path(recipe.run.dir))
    records = read_records(run.metrics, report)
    return Outcome(
        name=survey.loaded.name,
        state=state,
        tokens=survey.resolved.tokens,
        seconds=seconds,
        from_step=from_step,
        validations=tuple(record for record in records if "val/loss" in record),
        agreements=tuple(record["kd/agreement"] for record in records if record.get("kd/agreement") is not None),
        samples=tuple(read_records(run.samples, report)),
        marks=marks_in(run),
        run=run,
        answers_only=recipe.train.objective == "assistant_only",
        talks=recipe.chat is not None,
    )


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what was trained, what the first and the last model write to the same prompts, and the next command."""
    table = Table(
        box=SIMPLE_HEAD, title="What was trained, scored on held-out text", title_justify="left", title_style="bold"
    )
    table.add_column("stage")
    taught = any(outcome.agreements for outcome in outcomes)
    # Short headings: the table is made for a terminal of 80 columns.
    for column in ("tokens", "time", "loss", "bits a byte", *(["agreement"] if taught else [])):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        row = [
            f"{outcome.name}*" if outcome.answers_only else outcome.name,
            human(outcome.tokens),
            _time(outcome),
            _arrow(_validated(outcome, "val/loss"), "{:.3f}"),
            _arrow(_validated(outcome, "val/bpb"), "{:.3f}"),
        ]
        table.add_row(*row, *([_arrow(outcome.agreements, "{:.0%}")] if taught else []))
    console.print(table)
    if any(outcome.answers_only for outcome in outcomes):
        say(console, "* loss of what the assistant has to say, its end of turn included; no other token counts", "dim")
    if taught:
        say(
            console,
            "agreement: share of tokens of a step that teacher and student find likeliest; first and last step",
            "dim",
        )
    _print_samples([outcome for outcome in outcomes if outcome.samples], console)
    _print_marks([outcome for outcome in outcomes if outcome.marks[1]], console)
    for outcome in outcomes:
        say(console, f"{outcome.name}: {outcome.run.final}")
    say(console, "Any tool that knows transformers reads these folders as they are. Next, for example:")
    if talking := [outcome for outcome in outcomes if outcome.talks]:
        against = ["--against", str(talking[-2].run.final)] if len(talking) > 1 else []
        say(console, f"  {shlex.join(['cheaptrain', 'chat', str(talking[-1].run.final), *against])}")
    model = shlex.quote(f"pretrained={outcomes[-1].run.final}")
    say(console, f"  lm_eval --model hf --model_args {model} --tasks arc_easy")


def _time(outcome: Outcome) -> str:
    if outcome.state != "trained":
        return outcome.state
    resumed = f" from step {outcome.from_step:,}" if outcome.from_step else ""
    return f"{duration(outcome.seconds)}{resumed}"


def _validated(outcome: Outcome, key: str) -> list[float]:
    return [record[key] for record in outcome.validations if record.get(key) is not None]


def _arrow(values: Sequence[float], form: str) -> str:
    """The first and the last of `values`."""
    return f"{form.format(values[0])} → {form.format(values[-1])}" if values else "–"


def _print_marks(outcomes: Sequence[Outcome], console: Console) -> None:
    """The sums that were asked: how many were right, and how many answers ended by themselves."""
    if not outcomes:
        return
    table = Table(box=SIMPLE_HEAD, title="Sums it has never seen", title_justify="left", title_style="bold")
    table.add_column("stage")
    for column in ("right", "answers that end by themselves"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        before, after = outcome.marks
        assert after is not None
        known = [marks for marks in (before, after) if marks is not None]
        table.add_row(
            outcome.name,
            _of_asked([(marks.right, marks.asked) for marks in known]),
            _of_asked([(marks.ended, marks.asked) for marks in known]),
        )
    console.print(table)
    last = outcomes[-1].marks[1]
    assert last is not None
    say(console, f"“{last.question}”")
    for line in last.answer.splitlines():
        say(console, f"  {line}")
    say(console, "")


def _of_asked(counts: Sequence[tuple[int, int]]) -> str:
    """Counts of all that were asked; before and after may have been asked another number."""
    if len({asked for _, asked in counts}) == 1:
        return f"{' → '.join(str(count) for count, _ in counts)} of {counts[0][1]}"
    return " → ".join(f"{count} of {asked}" for count, asked in counts)


def _print_samples(outcomes: Sequence[Outcome], console: Console) -> None:
    if not outcomes:
        return
    before = {sample["prompt"]: sample["text"] for sample in reversed(outcomes[0].samples)}
    after = {sample["prompt"]: sample["text"] for sample in outcomes[-1].samples}
    for prompt in after:
        say(console, f"“{prompt}”")
        if prompt in before:
            say(console, f"  before  {_one_line(before[prompt])}", "dim")
        say(console, f"  after   {_one_line(after[prompt])}")
    if after:
        say(console, "")


def _one_line(text: str, width: int = 90) -> str:
    shown = text.replace("\n", "⏎")
    return shown if len(shown) <= width else shown[: width - 1] + "…"
