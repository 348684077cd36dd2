"""Stages in a row: each starts, goes on, or is skipped as finished, and the end is one table.

All recipes are read and all prepared data is checked before the first step of the first stage, so that the third stage
does not fail at three in the morning over a typing error.
"""

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from rich.console import Console
from rich.text import Text

from cheaptrain.checkpoint.launch_record import Note, recorded_launch
from cheaptrain.checkpoint.paths import STACKS, RunDirectory
from cheaptrain.checkpoint.rundir import OpenedRun, open_run_together
from cheaptrain.checkpoint.state_files import read_scalars
from cheaptrain.checkpoint.verify import STATE, Checkpoint
from cheaptrain.console import lasting_console
from cheaptrain.data.manifest import verify_manifest
from cheaptrain.environment import environment_of
from cheaptrain.errors import CheaptrainError, DivergedError, PreflightError, StoppedError
from cheaptrain.launched import assert_started
from cheaptrain.parallel.processes import Processes, join, leave
from cheaptrain.parallel.recorder import record_collectives
from cheaptrain.parallel.watch import watch
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.length import Done
from cheaptrain.recipe.load import LoadedRecipe, load_recipes
from cheaptrain.recipe.schema import Recipe
from cheaptrain.report.plan import print_plan
from cheaptrain.report.subjects import Subject
from cheaptrain.report.write import report_at_the_end
from cheaptrain.say import say
from cheaptrain.train.beforehand import refuse_disorder, refuse_later_failures
from cheaptrain.train.evaluating import score_final
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.lineage import inputs_of
from cheaptrain.train.loop import train
from cheaptrain.train.outcome import Outcome, outcome_of, print_outcomes
from cheaptrain.train.probing import probe_after, probe_before
from cheaptrain.train.setup import refuse_without_space, set_up
from cheaptrain.train.signals import StopRequest, agreed_stop, stop_on_signals
from cheaptrain.train.stage import Stage
from cheaptrain.train.survey import Survey, going_on, survey_all

_LONG_SECONDS = 300  # a stage of minutes has a report of its own as it ends; the last report has them all


def run_chain(paths: Sequence[str], overrides: Sequence[str]) -> list[Outcome]:
    """Run the recipes at `paths` in order, this process as one of all that were started; print what came of them."""
    _check_launcher()
    recipes = load_recipes(paths, overrides)
    refuse_disorder(recipes)
    limits = [loaded.recipe.run.max_time for loaded in recipes if loaded.recipe.run.max_time is not None]
    with stop_on_signals(min(limits, default=None)) as stop:
        record_collectives(Path(recipes[0].recipe.run.dir) / STACKS)
        processes = join(max(loaded.recipe.parallel.start_timeout for loaded in recipes))
        assert_started(processes.size)
        try:
            outcomes = _run_stages(recipes, processes, stop)
        except CheaptrainError:
            stop.finished()  # how all processes end is decided; what a launcher sends them now changes nothing
            raise
        leave()
    return outcomes


def _run_stages(recipes: Sequence[LoadedRecipe], processes: Processes, stop: StopRequest) -> list[Outcome]:
    console = lasting_console(emoji=False) if processes.is_main else Console(quiet=True)
    surveys = survey_all(recipes, processes.size, lambda loaded: processes.on_main(lambda: _done_before(loaded)))
    processes.on_main(lambda: _check_all(surveys, console))
    outcomes = []
    for survey in surveys:
        if agreed_stop(stop, processes):
            raise StoppedError(f"{stop.name}: stopped before {survey.loaded.name}. Run the same command to go on.")
        try:
            outcomes.append(_run_stage(survey, processes, stop, console))
        except DivergedError:
            if processes.is_main:
                _report([survey], console, "What led to it, to be opened in a browser:")
            raise
        gc.collect()
        if survey is not surveys[-1] and outcomes[-1].seconds > _LONG_SECONDS:
            processes.on_main(partial(_report, [survey], console))
    if processes.is_main:
        print_outcomes(outcomes, console)
        _report(surveys, console, "What was asked and what happened, curves and scores, to be opened in a browser:")
    if unscored := [text for outcome in outcomes for text in outcome.unscored]:
        raise CheaptrainError("\n".join(["trained, and saved; but these tasks could not be scored:", *unscored]))
    return outcomes


def _report(surveys: Sequence[Survey], console: Console, saying: str | None = None) -> None:
    """Write the report of these stages, if the last of them wants one, and say where it lies after `saying`."""
    if not surveys[-1].loaded.recipe.log.report:
        return
    recipes = [survey.loaded for survey in surveys]
    subjects = [Subject(loaded.name, RunDirectory(Path(loaded.recipe.run.dir)), loaded) for loaded in recipes]
    page = report_at_the_end(subjects, lambda text: say(console, text, "yellow"))
    if page is not None and saying is not None:
        say(console, saying)
        say(console, f"  {page}")


def _check_all(surveys: Sequence[Survey], console: Console) -> None:
    refuse_later_failures(surveys, lambda text: say(console, text, "yellow"))
    for manifest in {m.directory: m for survey in surveys for m in survey.manifests.values()}.values():
        verify_manifest(manifest)


def _done_before(loaded: LoadedRecipe) -> Done | None:
    """What the newest checkpoint of the run says is behind it, at a glance; it is verified when the run is opened."""
    for folder in reversed(RunDirectory(Path(loaded.recipe.run.dir)).steps()):
        try:
            return _done_in(folder)
        except (OSError, ValueError, KeyError, TypeError):
            continue  # damaged or without state: whether that matters is found out when the run is opened
    return None


def _run_stage(survey: Survey, processes: Processes, stop: StopRequest, console: Console) -> Outcome:
    loaded = survey.loaded
    recipe = loaded.recipe
    console.rule(Text(loaded.name, "bold"))
    report = partial(say, console)
    with open_run_together(
        Path(recipe.run.dir),
        processes,
        recipe=recipe.model_dump(mode="json"),
        provenance=loaded.provenance,
        identity=identity(recipe),
        inputs=processes.on_main(lambda: inputs_of(survey)),
        steps=partial(_last_step, survey),
        report=report,
    ) as opened:
        if opened.checkpoint is not None:
            survey = going_on(survey, _done_at(opened.checkpoint))
        if opened.decision == "done":
            say(console, f"{loaded.name} is done already: {opened.directory.final}")
            processes.on_main(lambda: probe_after(survey, opened.directory))
            outcome = outcome_of(survey, "done before", 0.0, survey.resolved.steps, report)
            return _examined(outcome, recipe, processes, stop, console)
        with _recorded(survey, opened, processes, report) as note:
            outcome = _train_stage(survey, opened, processes, stop, console, note)
            return _examined(outcome, recipe, processes, stop, console)


def _recorded(
    survey: Survey, opened: OpenedRun, processes: Processes, report: Callable[[str], None]
) -> AbstractContextManager[Note]:
    """The record of this launch, on the main process."""
    if not processes.is_main:
        return nullcontext(lambda more: None)
    facts = {
        "name": survey.loaded.name,
        "recipe": str(survey.loaded.path),
        "steps": survey.resolved.steps,
        "tokens": survey.resolved.tokens,
        "processes": processes.size,
        "from_step": opened.resumed_step or 0,
        "environment": environment_of(processes.device),
    }
    return recorded_launch(opened.directory, facts, report)


def _train_stage(
    survey: Survey, opened: OpenedRun, processes: Processes, stop: StopRequest, console: Console, note: Note
) -> Outcome:
    recipe, began = survey.loaded.recipe, time.perf_counter()
    processes.on_main(lambda: note({"plan": print_plan(survey, console)}))  # it may refuse, too
    processes.on_main(lambda: refuse_without_space(survey, opened))
    trackers = Accelerator(
        cpu=processes.device.type == "cpu",
        mixed_precision="no",
        log_with=list(recipe.log.trackers) or None,
        project_dir=opened.directory.path,
    )
    if opened.checkpoint is None:
        processes.on_main(lambda: probe_before(survey, opened.directory))
    limits = recipe.parallel
    with watch(processes, limits.start_timeout, limits.step_timeout, opened.directory.path / STACKS) as watcher:
        with _memory_explained(recipe):
            stage = set_up(
                survey,
                opened,
                trackers,
                processes,
                watch=watcher,
                stop=stop,
                console=console,
                note=note,
                began=began,
            )
        if opened.checkpoint is not None:
            say(console, f"going on from {opened.checkpoint.path} ({stage.ledger.tokens_seen:,} tokens seen)")
        ready, from_step = time.perf_counter(), stage.ledger.step
        with _records_closed(stage), _memory_explained(recipe):
            train(stage)
    processes.on_main(lambda: probe_after(survey, opened.directory))
    return outcome_of(survey, "trained", time.perf_counter() - ready, from_step, partial(say, console))


def _examined(outcome: Outcome, recipe: Recipe, processes: Processes, stop: StopRequest, console: Console) -> Outcome:
    """The outcome of a finished stage once its tasks are scored, with nothing of training in memory any more."""
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    failed = score_final(recipe, outcome.name, outcome.run, processes, stop, console)
    return replace(outcome, unscored=tuple(failed))


def _last_step(survey: Survey, checkpoint: Checkpoint | None) -> int:
    """Where the run ends when it goes on from `checkpoint`: another batch makes other steps."""
    return going_on(survey, _done_at(checkpoint)).resolved.steps if checkpoint else survey.resolved.steps


def _done_at(checkpoint: Checkpoint) -> Done | None:
    return _done_in(checkpoint.path) if checkpoint.has_state else None


def _done_in(folder: Path) -> Done | None:
    """What the ledger of the checkpoint in `folder` says."""
    return Ledger.from_json(read_scalars(folder / STATE)["ledger"]).done()


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

    def close() -> None:
        try:
            stage.metrics.close()
        finally:
            stage.samples.close()

    stage.processes.on_main(close)


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
