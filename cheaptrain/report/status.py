"""Where the stages of a chain stand, read from what they left behind, while they run or long after.

Everything is only read: no folder is made, no lock taken, no damaged thing put right, so that it can be asked at any
moment, of a run that somebody else is training. What cannot be read becomes a note beside the stage. The trap is to
believe one file: a run is done when its `final` is whole, running when somebody holds its lock, and stale when what it
was made from is no more what lies there, whatever the rest says.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.launch_record import read_launch
from cheaptrain.checkpoint.lock import holder
from cheaptrain.checkpoint.paths import RunDirectory, step_of
from cheaptrain.checkpoint.rundir import read_run
from cheaptrain.checkpoint.verify import examine, stated_fingerprint
from cheaptrain.errors import EXIT_STOPPED, PreflightError
from cheaptrain.recipe.identity import BATCH, identity, identity_difference
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.parents import PARENT_KEYS
from cheaptrain.report.progress import Progress, read_progress
from cheaptrain.report.subjects import Subject, run_of
from cheaptrain.train.outlook import unprepared

DONE, RUNNING, STOPPED, FAILED, INTERRUPTED = "done", "running", "stopped", "failed", "interrupted"
STALE, DAMAGED, NOT_STARTED, NOT_PREPARED = "stale", "damaged", "not started", "not prepared"


@dataclass(frozen=True)
class StageStatus:
    """One stage. `steps` and `tokens_in_all`: what it sets out to do, where that is known; `notes`: why, and what is
    odd, a sentence each."""

    name: str
    state: str
    run: str
    recipe: str | None = None
    step: int | None = None
    steps: int | None = None
    tokens: int | None = None
    tokens_in_all: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    seconds_left: float | None = None
    checkpoint: str | None = None
    made_from: dict[str, str] = field(default_factory=dict)  # key of the recipe: folder
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For machines; numbers that are not finite become null."""
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in asdict(self).items()
        }


def status_of(subjects: Sequence[Subject]) -> list[StageStatus]:
    """The stages and the runs they come from, ancestors first, otherwise in the order given. Reads only."""
    stages = _by_ancestry(_with_ancestors(subjects))
    told: dict[str, StageStatus] = {}
    for stage in stages:
        above = [told[name] for name in _ancestors(stage, stages) if name in told]
        old = [other for other in above if other.state in (STALE, NOT_STARTED, NOT_PREPARED)]
        if old and stage.state not in (STALE, RUNNING, NOT_STARTED, NOT_PREPARED):
            why = "is stale itself" if old[0].state == STALE else "is gone and would be trained anew"
            note = f"made from {old[0].run}, which {why}"
            stage = replace(stage, state=STALE, notes=(note, *stage.notes))
        told[stage.run] = stage
    return [told[stage.run] for stage in stages]


def _with_ancestors(subjects: Sequence[Subject]) -> list[StageStatus]:
    """The status of each, and of each run that one of them was made from."""
    stages, pending = list[StageStatus](), list(subjects)
    seen = {subject.run.path.absolute() for subject in subjects}
    while pending:
        stage = _status(pending.pop(0))
        stages.append(stage)
        for path in stage.made_from.values():
            run = run_of(Path(path))
            if run is not None and run.absolute() not in seen:
                seen.add(run.absolute())
                pending.append(Subject(run.name, RunDirectory(run)))
    return stages


def _status(subject: Subject) -> StageStatus:
    run, notes = subject.run, list[str]()
    kept, loaded = _kept(run, notes), subject.loaded
    launch = _launch(run, notes)
    who = _holder(run, notes)
    progress = read_progress(run, notes.append)
    checkpoint, done = _checkpoint(run, notes)
    recipe = kept.get("recipe") or (loaded.recipe.model_dump(mode="json") if loaded else {})
    steps = launch.get("steps") or (recipe.get("train") or {}).get("steps")
    step = progress.step
    if step is None and checkpoint is not None:
        step = step_of(checkpoint)
    state = DONE if done else _state(run, who, kept, launch, bool(notes), notes)
    made_from = _made_from(recipe)
    if kept:
        changed = list(_changed(kept, made_from))
        if changed and state not in (RUNNING, DAMAGED):
            state = STALE
        notes = [*changed, *notes]
        notes += [*_gone(made_from), *_other_recipe(kept, loaded)]
    elif state == NOT_STARTED and loaded is not None and (missing := unprepared(loaded.recipe)):
        state, notes = NOT_PREPARED, [*missing, *notes]
    return StageStatus(
        name=subject.name,
        state=state,
        run=str(run.path),
        recipe=str(loaded.path) if loaded else None,
        step=step,
        steps=steps,
        tokens=progress.tokens,
        tokens_in_all=launch.get("tokens"),
        loss=progress.loss,
        validation_loss=progress.validation_loss,
        seconds_left=_seconds_left(progress, steps) if state == RUNNING else None,
        checkpoint=str(run.final if done else checkpoint) if checkpoint else None,
        made_from=made_from,
        notes=tuple(notes),
    )


def _state(
    run: RunDirectory, who: str | None, kept: dict[str, Any], launch: dict[str, Any], odd: bool, notes: list[str]
) -> str:
    """The state of a run that has no whole `final`; why goes to `notes`."""
    if who is not None:
        notes.insert(0, who)
        return RUNNING
    if run.final.is_symlink() or (not kept and (odd or run.steps())):
        if not odd:
            notes.append(f"{run.recipe} is not there, and checkpoints are")
        return DAMAGED
    if not kept:
        return NOT_STARTED
    if "exit_code" not in launch:
        notes.insert(0, "killed, or the machine went down: its launch wrote no end")
        return INTERRUPTED
    code = launch["exit_code"]
    notes.insert(0, f"exit code {code}: {launch.get('reason', 'no reason given')}")
    return STOPPED if code == EXIT_STOPPED else FAILED


def _kept(run: RunDirectory, notes: list[str]) -> dict[str, Any]:
    try:
        return read_run(run)
    except FileNotFoundError:
        return {}
    except PreflightError as error:
        notes.append(str(error))
    except (OSError, UnicodeDecodeError) as error:
        notes.append(f"{run.recipe} cannot be read: {error}")
    return {}


def _launch(run: RunDirectory, notes: list[str]) -> dict[str, Any]:
    try:
        return read_launch(run)
    except (OSError, ValueError) as error:
        notes.append(f"{run.launch} cannot be read: {error}")
        return {}


def _holder(run: RunDirectory, notes: list[str]) -> str | None:
    try:
        return holder(run.lock)
    except OSError as error:
        notes.append(f"whether it runs cannot be told: {run.lock}: {error.strerror}")
        return None


def _checkpoint(run: RunDirectory, notes: list[str]) -> tuple[Path | None, bool]:
    """The newest checkpoint that looks whole (by presence and sizes), and whether it is the last one of all."""
    try:
        folders = list(reversed(run.steps()))
    except OSError as error:
        notes.append(f"{run.checkpoints} cannot be read: {error.strerror}")
        return None, False
    for folder in folders:
        manifest, problems = examine(folder, hashes=False)
        if manifest is not None and not problems:
            return folder, run.final.is_symlink() and run.final.resolve() == folder.resolve()
        notes.append(f"{folder} is damaged: {problems[0]}")
    if run.final.is_symlink():
        notes.append(f"{run.final} points at {run.final.readlink()}, which is not there or not whole")
    return None, False


def _made_from(recipe: dict[str, Any]) -> dict[str, str]:
    model, distill = recipe.get("model") or {}, recipe.get("distill") or {}
    found = {"init_from": model.get("init_from"), "teacher": distill.get("teacher")}
    if distill.get("cache") and not Path(str(found["teacher"])).exists():
        del found["teacher"]  # it was read from the cache, and need not be anywhere
    return {PARENT_KEYS[name]: str(path) for name, path in found.items() if path}


def _changed(kept: dict[str, Any], made_from: dict[str, str]) -> Iterator[str]:
    """What of the run's ancestors is no more what it was trained from. Folders that are no checkpoints of ours are not
    hashed for a question: they are when a stage is opened."""
    for name, key in PARENT_KEYS.items():
        path, before = made_from.get(key), (kept.get("inputs") or {}).get(name)
        now = stated_fingerprint(Path(path)) if path is not None and Path(path).is_dir() else None
        if before is not None and now is not None and now != before:
            yield f"{key} = {path!r} holds other weights than it was trained from"


def _gone(made_from: dict[str, str]) -> Iterator[str]:
    """Folders, not hub ids, that a stage was made from and that are no more."""
    for key, path in made_from.items():
        if not Path(path).exists() and (path.count("/") > 1 or path.startswith(("/", "."))):
            yield f"{key} = {path!r} is not there any more"


def _other_recipe(kept: dict[str, Any], loaded: LoadedRecipe | None) -> list[str]:
    if loaded is None:
        return []
    lines = identity_difference(kept.get("identity") or {}, identity(loaded.recipe), BATCH)
    return (
        [f"{loaded.path} says something else than this run was started with: {'; '.join(lines[:3])}"] if lines else []
    )


def _seconds_left(progress: Progress, steps: int | None) -> float | None:
    if progress.seconds_a_step is None or progress.step is None or steps is None:
        return None
    return max(0, steps - progress.step) * progress.seconds_a_step


def _ancestors(stage: StageStatus, stages: Sequence[StageStatus]) -> list[str]:
    """Runs of `stages` in whose folders lies what the stage is made from."""
    return [
        other.run
        for other in stages
        for path in stage.made_from.values()
        if other.run != stage.run and Path(path).absolute().is_relative_to(Path(other.run).absolute())
    ]


def _by_ancestry(stages: Sequence[StageStatus]) -> list[StageStatus]:
    placed: dict[str, StageStatus] = {}
    by_run = {stage.run: stage for stage in stages}

    def place(stage: StageStatus, above: frozenset[str]) -> None:
        for run in _ancestors(stage, stages):
            if run not in above:  # a circle is somebody's mistake, told where it is run
                place(by_run[run], above | {stage.run})
        placed.setdefault(stage.run, stage)

    for stage in stages:
        place(stage, frozenset({stage.run}))
    return list(placed.values())
