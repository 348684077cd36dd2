"""Which results stand already, and how a new one joins them.

A result stands for the very bytes of a checkpoint, what a task asks, how it was asked, and the version of lm-eval; the
hash of all of it is its key, so nothing that changed is ever taken for what it was. Each is written as soon as it is
there: whoever is killed goes on with the next task. Several processes write into one folder, so each reads and replaces
eval.json under a lock.
"""

import fcntl
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cheaptrain.durable import fingerprint, replace_json
from cheaptrain.errors import CheaptrainError
from cheaptrain.evaluate.harness import HARNESS, Answers, Asking
from cheaptrain.evaluate.results import (
    EVAL,
    Evaluation,
    Scored,
    TaskResult,
    read_evaluation,
    write_evaluation,
    write_items,
)
from cheaptrain.evaluate.suite import AskedTask


def key_of(scored: Scored, asked: AskedTask, how: Asking) -> str:
    """16 digits that stand for the checkpoint, the task with its data, how it is asked, and lm-eval's version."""
    parts = {"checkpoint": scored.hash, "task": asked.name, "version": asked.version, "content": asked.content}
    return fingerprint({**parts, "how": how.__dict__, "harness": HARNESS})[:16]


def result_of(asked: AskedTask, how: Asking, key: str, answers: Answers) -> TaskResult:
    """A scored task as it is kept."""
    stem = file_stem(asked.name, key)
    return TaskResult(
        task=asked.name,
        key=key,
        version=asked.version,
        n=answers.n,
        metrics=answers.metrics,
        settings={**how.__dict__, "content": asked.content},
        seconds=answers.seconds,
        harness=HARNESS,
        when=answers.when,
        baseline=answers.baseline,
        items=f"{stem}.items.jsonl",
        results=f"{stem}.json",
        notes=answers.notes,
        shown=asked.shown,
    )


def file_stem(task: str, key: str) -> str:
    """TASK-KEY, with nothing in it that is no file name."""
    return "".join(sign if sign.isalnum() or sign in "._-" else "_" for sign in task) + f"-{key}"


def standing(folder: Path, scored: Scored) -> Evaluation:
    """What is kept of this checkpoint in `folder`, or set aside from it; nothing where both hold none of it."""
    for place in (folder, _aside(folder, scored.hash)):
        if (place / EVAL).is_file() and (kept := read_evaluation(place)).checkpoint.hash == scored.hash:
            return kept
    return Evaluation(folder, scored)


def keep(folder: Path, scored: Scored, result: TaskResult, answers: Answers | None = None) -> None:
    """Add one result, in the place of one with its key. What another checkpoint left in the folder is set aside, into
    a folder of its own. Raises CheaptrainError when it cannot be written."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            _set_aside_others(folder, scored)
            folder.mkdir(exist_ok=True)
            if answers is not None and result.items and result.results:
                write_items(folder / result.items, answers.items)
                replace_json(folder / result.results, _finite(answers.results))
            kept = standing(folder, scored).results
            others = tuple(other for other in kept if other.key != result.key)
            write_evaluation(Evaluation(folder, scored, (*others, result)))
    except OSError as error:
        raise CheaptrainError(f"{folder}: results cannot be written: {error.strerror}: {error.filename}") from error


def _set_aside_others(folder: Path, scored: Scored) -> None:
    """Give the folder to `scored`: what it holds of another goes to a folder beside it, and what lies there of this one
    comes back."""
    if (folder / EVAL).is_file() and (other := read_evaluation(folder).checkpoint.hash) != scored.hash:
        folder.rename(_aside(folder, other))
        if (before := _aside(folder, scored.hash)).is_dir():
            before.rename(folder)


def _aside(folder: Path, checkpoint: str) -> Path:
    return folder.with_name(f"{folder.name}.of-{checkpoint[:12]}")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time. The file lies outside the folder, which may be renamed."""
    with (folder.parent / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing gives the lock back


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they become text."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list) else value
