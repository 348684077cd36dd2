"""What came of the stages of a launch: one table, what the model writes now, where it lies, and what to do next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.say import say
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
    samples: tuple[dict[str, Any], ...]
    run: RunDirectory


def outcome_of(survey: Survey, state: str, seconds: float, from_step: int, report: Callable[[str], None]) -> Outcome:
    """The outcome of a finished stage; `seconds` of this launch, 0 when it was done before. What cannot be read of its
    records goes to `report`: the table is no reason to fail."""
    run = RunDirectory(Path(survey.loaded.recipe.run.dir))
    return Outcome(
        name=survey.loaded.name,
        state=state,
        tokens=survey.resolved.tokens,
        seconds=seconds,
        from_step=from_step,
        validations=tuple(record for record in read_records(run.metrics, report) if "val/loss" in record),
        samples=tuple(read_records(run.samples, report)),
        run=run,
    )


def print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print what was trained, what the first and the last model write to the same prompts, and the next command."""
    table = Table(box=SIMPLE_HEAD, title="What was trained", title_justify="left", title_style="bold")
    table.add_column("stage")
    for column in ("tokens", "time", "validation loss", "bits per byte"):
        table.add_column(column, justify="right")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            human(outcome.tokens),
            _time(outcome),
            _first_to_last(outcome, "val/loss"),
            _first_to_last(outcome, "val/bpb"),
        )
    console.print(table)
    _print_samples(outcomes, console)
    for outcome in outcomes:
        say(console, f"{outcome.name}: {outcome.run.final}")
    last = outcomes[-1].run.final
    say(console, "Any tool that knows transformers reads these folders as they are. Next, for example:")
    say(console, f"  lm_eval --model hf --model_args pretrained={last} --tasks arc_easy")


def _time(outcome: Outcome) -> str:
    if outcome.state != "trained":
        return outcome.state
    resumed = f" from step {outcome.from_step:,}" if outcome.from_step else ""
    return f"{duration(outcome.seconds)}{resumed}"


def _first_to_last(outcome: Outcome, key: str) -> str:
    values = [record[key] for record in outcome.validations if record.get(key) is not None]
    return f"{values[0]:.3f} → {values[-1]:.3f}" if values else "–"


def _print_samples(outcomes: Sequence[Outcome], console: Console) -> None:
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
