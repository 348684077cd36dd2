"""Stages in a row: each starts, goes on, or is skipped as finished, and the end is one table.

All recipes are read and all prepared data is checked before the first step of the first stage, so that the third stage
does not fail at three in the morning over a typing error.
"""

import gc
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console

from cheaptrain.data.manifest import verify_manifest
from cheaptrain.errors import PreflightError
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.load import load_recipe
from cheaptrain.report.plan import print_plan
from cheaptrain.say import say
from cheaptrain.train.loop import train
from cheaptrain.train.outcome import Outcome, outcome_of, print_outcomes
from cheaptrain.train.rundir import open_run
from cheaptrain.train.setup import refuse_without_space, set_up
from cheaptrain.train.signals import StopRequest, stop_on_signals
from cheaptrain.train.survey import Survey, survey_all
from cheaptrain.train.verify import verify_init_from


def run_chain(paths: Sequence[str], overrides: Sequence[str]) -> list[Outcome]:
    """Run the recipes at `paths` in order and print what came of them."""
    console = Console()
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
    print_outcomes(outcomes, console)
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
            return outcome_of(survey, "done before", 0.0)
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
        return outcome_of(survey, "trained", time.perf_counter() - began)


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
