"""Stages in a row: each starts, goes on, or is skipped as finished, and the end is one table.

All recipes are read and all prepared data is checked before the first step of the first stage, so that the third stage
does not fail at three in the morning over a typing error.
"""

import gc
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.text import Text

from cheaptrain.checkpoint.rundir import open_run
from cheaptrain.checkpoint.verify import verify_init_from
from cheaptrain.console import lasting_console
from cheaptrain.data.manifest import verify_manifest
from cheaptrain.durable import sha256_of
from cheaptrain.errors import CheaptrainError, PreflightError, StoppedError
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.schema import Recipe
from cheaptrain.report.plan import print_plan
from cheaptrain.say import say
from cheaptrain.train.beforehand import refuse_disorder, refuse_later_failures
from cheaptrain.train.loop import train
from cheaptrain.train.outcome import Outcome, outcome_of, print_outcomes
from cheaptrain.train.setup import refuse_without_space, set_up
from cheaptrain.train.signals import StopRequest, stop_on_signals
from cheaptrain.train.stage import Stage
from cheaptrain.train.survey import Survey, survey_all


def run_chain(paths: Sequence[str], overrides: Sequence[str]) -> list[Outcome]:
    """Run the recipes at `paths` in order and print what came of them."""
    console = lasting_console(emoji=False)
    _check_launcher()
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")
    _check_processes(accelerator)
    recipes = [load_recipe(path, overrides) for path in paths]
    refuse_disorder(recipes)
    surveys = survey_all(recipes, accelerator.num_processes)
    refuse_later_failures(surveys)
    for manifest in {m.directory: m for survey in surveys for m in survey.manifests.values()}.values():
        verify_manifest(manifest)
    outcomes = []
    with stop_on_signals() as stop:
        for survey in surveys:
            if stop:
                raise StoppedError(f"{stop.name}: stopped before {survey.loaded.name}. Run the same command to go on.")
            outcomes.append(_run_stage(survey, stop, console))
            gc.collect()
    print_outcomes(outcomes, console)
    return outcomes


def _run_stage(survey: Survey, stop: StopRequest, console: Console) -> Outcome:
    loaded, resolved = survey.loaded, survey.resolved
    recipe = loaded.recipe
    console.rule(Text(loaded.name, "bold"))
    inputs: dict[str, Any] = {
        "tokenizer": survey.tokenizer.fingerprint,
        "data": {name: manifest.fingerprint for name, manifest in survey.manifests.items()},
    }
    if recipe.model.config is not None:
        inputs["config"] = sha256_of(model_folder(recipe.model) / "config.json")
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
            return outcome_of(survey, "done before", 0.0, resolved.steps, partial(say, console))
        print_plan(survey, console)
        refuse_without_space(survey, opened)
        trackers = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=list(recipe.log.trackers) or None,
            project_dir=opened.directory.path,
        )
        with _memory_explained(recipe):
            stage = set_up(survey, opened, trackers, stop=stop, console=console)
        if opened.checkpoint is not None:
            say(console, f"going on from {opened.checkpoint.path} ({stage.ledger.tokens_seen:,} tokens seen)")
        began, from_step = time.perf_counter(), stage.ledger.step
        with _records_closed(stage), _memory_explained(recipe):
            train(stage)
        return outcome_of(survey, "trained", time.perf_counter() - began, from_step, partial(say, console))


@contextmanager
def _records_closed(stage: Stage) -> Iterator[None]:
    """Close metrics and samples in the end. What cannot be written any more never hides why the run ended."""
    try:
        yield
    except BaseException:
        for records in (stage.metrics, stage.samples):
            try:
                records.close()
            except CheaptrainError as error:
                say(stage.console, str(error), "yellow")
        raise
    try:
        stage.metrics.close()
    finally:
        stage.samples.close()


@contextmanager
def _memory_explained(recipe: Recipe) -> Iterator[None]:
    """Out of memory is a setting to change, and none that makes another run."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = " ".join(str(error).split())
        raise CheaptrainError(
            f"out of memory: {reason} Lower train.micro_batch_size (now {recipe.train.micro_batch_size}) or "
            f"train.loss_chunk_tokens (now {recipe.train.loss_chunk_tokens:,}), or set "
            "train.activation_checkpointing = true; a run goes on from its last checkpoint with any of them changed"
        ) from error


def _check_processes(accelerator: Accelerator) -> None:
    if accelerator.num_processes > 1:
        raise PreflightError(
            f"started as {accelerator.num_processes} processes; this version trains on one: "
            "accelerate launch --num_processes 1 launch/run.py …"
        )


def _check_launcher() -> None:
    """The launcher's word against what the recipe says; nothing of it is dropped silently."""
    for name, default in _LAUNCHER_SETTINGS.items():
        if os.environ.get(name, default).lower() not in (default, "auto"):
            raise PreflightError(
                f"the launcher asks for {name} = {os.environ[name]}, but precision, accumulation, compiling and "
                "sharding are the recipe's (train.precision, train.global_batch_tokens, train.compile): leave them out "
                "of `accelerate launch` and its file"
            )


_LAUNCHER_SETTINGS = {
    "ACCELERATE_MIXED_PRECISION": "no",
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
    "ACCELERATE_DYNAMO_BACKEND": "no",
    "ACCELERATE_USE_FSDP": "false",
    "ACCELERATE_USE_DEEPSPEED": "false",
    "ACCELERATE_USE_MEGATRON_LM": "false",
}
