"""Stages in a row: each starts, goes on, or is skipped as finished, and the end is one table.

All recipes are read and all prepared data is checked before the first step of the first stage, so that the third stage
does not fail at three in the morning over a typing error.
"""

import gc
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from cheaptrain.data.manifest import verify_manifest
from cheaptrain.errors import PreflightError
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.load import load_recipe
from cheaptrain.report.plan import print_plan
from cheaptrain.say import say
from cheaptrain.train.jsonl import read_records
from cheaptrain.train.loop import train
from cheaptrain.train.rundir import open_run
from cheaptrain.train.setup import refuse_without_space, set_up
from cheaptrain.train.signals import StopRequest, stop_on_signals
from cheaptrain.train.survey import Survey, survey_all
from cheaptrain.train.verify import verify_init_from
from cheaptrain.units import duration, human


@dataclass(frozen=True)
class Outcome:
    """What became of one stage."""

    name: str
    state: str
    tokens: int
    seconds: float
    before: float | None  # validation loss at step 0
    after: float | None
    bits_per_byte: float | None
    checkpoint: Path


def run_chain(paths: Sequence[str], overrides: Sequence[str]) -> list[Outcome]:
    """Run the recipes at `paths` in order and print what came of them."""
    console = Console(soft_wrap=True)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    _check_processes(accelerator)
    surveys = survey_all([load_recipe(path, overrides) for path in paths], accelerator.num_processes)
    for survey in surveys:
        for manifest in survey.manifests.values():
            verify_manifest(manifest)
    outcomes = []
    with stop_on_signals() as stop:
        for survey in surveys:
            outcomes.append(_run_stage(survey, stop, console))
            gc.collect()
    _print_outcomes(outcomes, console)
    return outcomes


def _run_stage(survey: Survey, stop: StopRequest, console: Console) -> Outcome:
    loaded, resolved = survey.loaded, survey.resolved
    recipe = loaded.recipe
    console.rule(f"[bold]{loaded.name}[/bold]")
    inputs: dict[str, Any] = {
        "tokenizer": survey.tokenizer.fingerprint,
        "data": {name: manifest.fingerprint for name, manifest in survey.manifests.items()},
    }
    if recipe.model.init_from is not None:
        inputs["init_from"] = verify_init_from(model_folder(recipe.model)).fingerprint
    with open_run(
        Path(recipe.run.dir),
        recipe=recipe.model_dump(mode="json"),
        provenance=loaded.provenance,
        identity=identity(recipe),
        inputs=inputs,
        steps=resolved.steps,
        report=partial(say, console),
    ) as opened:
        if opened.decision == "done":
            say(console, f"{loaded.name} is done already: {opened.directory.final}")
            return _outcome(survey, "done before", 0.0)
        print_plan(survey, console)
        refuse_without_space(survey, opened)
        trackers = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=list(recipe.log.trackers) or None,
            project_dir=opened.directory.path,
        )
        stage = set_up(
            survey,
            opened,
            trackers,
            stop=stop,
            console=console,
        )
        if opened.checkpoint is not None:
            say(console, f"going on from {opened.checkpoint.path} ({stage.ledger.tokens_seen:,} tokens seen)")
        began = time.perf_counter()
        try:
            train(stage)
        finally:
            stage.metrics.close()
            stage.samples.close()
        return _outcome(survey, "trained", time.perf_counter() - began)


def _check_processes(accelerator: Accelerator) -> None:
    """The launcher's word against what this version does and the recipe says; nothing of it is dropped silently."""
    if accelerator.num_processes > 1:
        raise PreflightError(
            f"started as {accelerator.num_processes} processes; this version trains on one: "
            "accelerate launch --num_processes 1 launch/run.py …"
        )
    for name, default in (("ACCELERATE_MIXED_PRECISION", "no"), ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")):
        if os.environ.get(name, default) not in (default, "auto"):
            raise PreflightError(
                f"the launcher asks for {name} = {os.environ[name]}, but precision and accumulation are the recipe's "
                "(train.precision, train.global_batch_tokens): leave them out of `accelerate launch` and its file"
            )


def _outcome(survey: Survey, state: str, seconds: float) -> Outcome:
    run = Path(survey.loaded.recipe.run.dir)
    validations = [record for record in read_records(run / "metrics.jsonl") if "val/loss" in record]
    first, last = (validations[0], validations[-1]) if validations else (None, None)
    return Outcome(
        name=survey.loaded.name,
        state=state,
        tokens=survey.resolved.tokens,
        seconds=seconds,
        before=first["val/loss"] if first else None,
        after=last["val/loss"] if last else None,
        bits_per_byte=last["val/bpb"] if last else None,
        checkpoint=run / "final",
    )


def _print_outcomes(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table(title="What was trained", title_justify="left")
    for column in ("stage", "", "tokens", "time", "validation loss", "bits per byte", "checkpoint"):
        table.add_column(column, justify="right" if column in ("tokens", "time") else "left", overflow="fold")
    for outcome in outcomes:
        table.add_row(
            outcome.name,
            outcome.state,
            human(outcome.tokens),
            duration(outcome.seconds) if outcome.seconds else "–",
            f"{outcome.before:.3f} → {outcome.after:.3f}" if outcome.before is not None else "–",
            f"{outcome.bits_per_byte:.3f}" if outcome.bits_per_byte is not None else "–",
            str(outcome.checkpoint),
        )
    console.print(table)
    last = outcomes[-1].checkpoint
    say(console, "Next, any tool that knows transformers reads the checkpoint, for example:")
    say(console, f"  lm_eval --model hf --model_args pretrained={last} --tasks arc_easy")
