"""`cheaptrain eval`: from what was typed to tables; what can be refused is refused before a model is loaded."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console

from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.evaluate.curves import draw_learning_curves
from cheaptrain.evaluate.run import Failure, Job, collect, device_of, do_jobs, jobs_for, missing, share_of
from cheaptrain.evaluate.subjects import Asked, Subject, asked_for, subject_of
from cheaptrain.evaluate.suite import Suite, load_suite
from cheaptrain.evaluate.table import print_scores
from cheaptrain.launched import size
from cheaptrain.recipe.schema import ALL_TASKS, Eval
from cheaptrain.say import say


@dataclass(frozen=True)
class Options:
    """What the command line says besides what is to be scored; None: as the recipe says."""

    tasks: str | None = None
    shots: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)  # keys of [eval] and their values
    metadata: Mapping[str, str] = field(default_factory=dict)  # besides eval.metadata
    output: Path | None = None
    every_checkpoint: bool = False
    again: bool = False
    device: str | None = None
    processes: int = 1
    as_json: bool = False


def evaluate(arguments: Sequence[str], options: Options, console: Console) -> None:
    """Score what `arguments` name and print it. Raises RecipeError and PreflightError before anything is scored,
    CheaptrainError at the end when a task failed: the others stand."""
    if size() > 1:
        raise RecipeError("`cheaptrain eval` starts its processes itself: run it once, with --processes N")
    everything = [
        (asked, _settings(asked.settings, options)) for asked in asked_for(arguments, every=options.every_checkpoint)
    ]
    device = device_of(options.device)
    for _, settings in everything:
        if not settings.tasks:
            raise RecipeError("no task is named: give --tasks arc_easy,…, or eval.tasks in the recipe")
    planned = []
    for asked, settings in everything:
        # Shots of the recipe may be for tasks that the command line does not ask for.
        every = options.tasks is None or options.shots is not None
        suite = load_suite(settings, settings.tasks, asked.checkpoints[-1], complete=every)
        subjects = [subject_of(path, asked.name, options.output) for path in asked.checkpoints]
        planned.append((asked, settings, suite, subjects))
    if options.output is not None and sum(len(subjects) for *_, subjects in planned) > 1:
        raise RecipeError("--output is a folder for one checkpoint, and several are to be scored")
    failures: list[Failure] = []
    shown: list[dict[str, Any]] = []
    out = Console(quiet=True) if options.as_json else console
    for asked, settings, suite, subjects in planned:
        failures += _score(asked, settings, suite, subjects, options, device, out)
        for subject in subjects:
            shown.append(_show(subject, suite, settings, device, out))
        if asked.run is not None and options.every_checkpoint:
            pictures = draw_learning_curves(asked.run, asked.run.path / "eval")
            say(out, f"learning curves: {pictures[0]}, and {len(pictures) - 1} beside it" if pictures else "no score")
    if options.as_json:
        print(json.dumps(shown, indent=2, ensure_ascii=False))
    if failures:
        raise CheaptrainError(
            "\n".join([f"{len(failures)} of the tasks could not be scored; the others stand:", *map(str, failures)])
        )


def _settings(settings: Eval, options: Options) -> Eval:
    """[eval] with what the command line says."""
    values: dict[str, Any] = settings.model_dump()
    values |= options.changes
    values["metadata"] = {**values["metadata"], **options.metadata}
    values |= {"light": [], "every": None, "light_limit": None}
    if options.tasks is not None:
        values["tasks"] = [name.strip() for name in options.tasks.split(",") if name.strip()]
    if options.shots is not None:
        values["shots"] = {ALL_TASKS: options.shots}
    if values["task_folder"] is None:
        values["data_folder"] = None
    try:
        return Eval.model_validate(values)
    except ValidationError as error:
        wrong = [f"eval.{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise RecipeError("\n".join(wrong)) from error


def _score(
    asked: Asked,
    settings: Eval,
    suite: Suite,
    subjects: Sequence[Subject],
    options: Options,
    device: torch.device,
    console: Console,
) -> list[Failure]:
    jobs: list[Job] = []
    for subject in subjects:
        to_do, stands = jobs_for(subject, suite, settings, device, again=options.again)
        jobs += to_do
        if stands:
            say(console, f"{subject.folder}: {len(stands)} of {len(suite.tasks)} tasks stand already", "dim")
    if options.processes == 1 or len(jobs) < 2:
        return do_jobs(jobs, suite, settings, device, lambda text: say(console, text, "dim"))
    count = min(options.processes, len(jobs))
    say(console, f"{len(jobs)} tasks in {count} processes")
    failures: list[Failure] = []
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        parts = [share_of(jobs, rank, count) for rank in range(count)]
        running = [
            (part, pool.submit(_in_process, part, settings, asked.checkpoints[-1], _device_of(device, rank), count))
            for rank, part in enumerate(parts)
        ]
        for part, future in running:
            try:
                failures += future.result()
            except BrokenProcessPool:
                kept = {result.key for job in part for result in _stands(job, suite, settings, device)}
                reason = "a process of the evaluation died (out of memory?); run the command again to go on"
                failures += [
                    Failure(job.task, job.subject.name, f"{job.task}: {reason}") for job in part if job.key not in kept
                ]
    return failures


def _stands(job: Job, suite: Suite, settings: Eval, device: torch.device) -> list[Any]:
    return jobs_for(job.subject, suite, settings, device, again=False)[1]


def _in_process(
    jobs: Sequence[Job], settings: Eval, tokenizer: Path, device: torch.device, processes: int
) -> list[Failure]:
    """Work of one process: its whole tasks. Nothing is said from here; what failed is returned."""
    if device.type == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // processes))
    suite = load_suite(settings, settings.tasks, tokenizer, complete=False)
    return do_jobs(jobs, suite, settings, device, lambda _: None)


def _device_of(device: torch.device, rank: int) -> torch.device:
    """A GPU each, in turn, unless one was named."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", rank % torch.cuda.device_count())


def _show(subject: Subject, suite: Suite, settings: Eval, device: torch.device, console: Console) -> dict[str, Any]:
    tasks, groups = collect(subject, suite, settings, device)
    lacking = list(missing(suite, tasks))
    step = f", step {subject.scored.step:,}" if subject.scored.step is not None else ""
    title = f"{subject.name}{step} ({subject.scored.hash[:12]})"
    print_scores(title, [*groups, *tasks], console, missing=lacking)
    say(console, f"kept in {subject.folder}")
    return {
        "checkpoint": asdict(subject.scored),
        "folder": str(subject.folder),
        "results": [asdict(result) for result in (*groups, *tasks)],
        "missing": lacking,
    }
