"""What evaluations leave behind, and how it is read: one folder a checkpoint, one entry a task.

    RUN/eval/step-000200/eval.json                  what was scored, of which bytes, with how many items and what error
    RUN/eval/step-000200/TASK-KEY.json              the harness's own JSON of that task
    RUN/eval/step-000200/TASK-KEY.items.jsonl       one line an item, for paired comparisons

Nothing is written into a checkpoint: it is finished and hashed. A score stands for a checkpoint, a version of a task
and settings; KEY is the hash of the three, so another of any of them is another entry and never taken for this one.
The trap is a number alone: each carries its n and its standard error, and the hash of the checkpoint it is of.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory, step_of
from cheaptrain.checkpoint.verify import stated_fingerprint
from cheaptrain.durable import replace_json
from cheaptrain.errors import CheaptrainError

EVAL = "eval.json"
_FORMAT = "cheaptrain evaluation"
_VERSION = 1


@dataclass(frozen=True)
class Metric:
    """One number. `name` and `filter` as the harness calls them ("acc", "none"); `stderr` None where there is none."""

    name: str
    value: float
    stderr: float | None = None
    filter: str = "none"
    higher_is_better: bool = True


@dataclass(frozen=True)
class TaskResult:
    """One task, scored once. `key`: hash of checkpoint, task version and settings. `metrics`: the one to show first.

    `members`: the tasks a group is the mean of; a group has no items. `baseline`: what guessing gives, where known, in
    the unit of the first metric.
    """

    task: str
    key: str
    version: str
    n: int
    metrics: tuple[Metric, ...]
    settings: dict[str, Any]
    seconds: float
    harness: str  # "lm-eval 0.4.13"
    when: str  # ISO 8601, UTC
    members: tuple[str, ...] = ()
    baseline: float | None = None
    items: str | None = None  # file name beside eval.json
    results: str | None = None  # the harness's own JSON, beside it
    notes: tuple[str, ...] = ()  # what one should know of the number: prompts that were cut, say
    shown: bool = False  # there to be read; its metric is no score


@dataclass(frozen=True)
class Scored:
    """The checkpoint that was scored: `hash` of its weights, configuration and tokenizer; `step` and `tokens` seen in
    training where it belongs to a run."""

    path: str
    hash: str
    step: int | None = None
    tokens: int | None = None
    parameters: int | None = None


@dataclass(frozen=True)
class Evaluation:
    """All that is known of one checkpoint."""

    folder: Path
    checkpoint: Scored
    results: tuple[TaskResult, ...] = ()

    def newest(self) -> dict[str, TaskResult]:
        """One result of each task: the last, unless it is of fewer questions than one of the same version before it: a
        quick look at ten of them does not hide the whole."""
        found: dict[str, TaskResult] = {}
        for result in sorted(self.results, key=lambda result: result.when):
            before = found.get(result.task)
            if before is None or _kind(before) != _kind(result) or result.n >= before.n:
                found[result.task] = result
        return found


@dataclass(frozen=True)
class Item:
    """One question: `doc` is the hash of its content, the same in every evaluation of that task version."""

    index: int
    doc: str
    metrics: dict[str, float]
    filter: str = "none"
    answer: str | None = None  # what a generating model wrote, filtered
    extra: dict[str, Any] = field(default_factory=dict)


def evaluation_folder(checkpoint: Path) -> Path | None:
    """Where the results of a checkpoint of a run go; None for a folder that belongs to no run."""
    folder = checkpoint.resolve()
    if step_of(folder) is None or folder.parent.name != "checkpoints":
        return None
    return folder.parent.parent / "eval" / folder.name


def write_evaluation(evaluation: Evaluation) -> None:
    """Write eval.json, whole or not at all."""
    evaluation.folder.mkdir(parents=True, exist_ok=True)
    content = {
        "format": _FORMAT,
        "version": _VERSION,
        "checkpoint": asdict(evaluation.checkpoint),
        "results": [asdict(result) for result in evaluation.results],
    }
    replace_json(evaluation.folder / EVAL, content)


def read_evaluation(folder: Path) -> Evaluation:
    """Read eval.json of a folder. Raises CheaptrainError when it is missing or not what was written."""
    path = folder / EVAL
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if (content["format"], content["version"]) != (_FORMAT, _VERSION):
            raise ValueError(f"format {content['format']!r} version {content['version']!r}")
        return Evaluation(
            folder, Scored(**content["checkpoint"]), tuple(_task_result(entry) for entry in content["results"])
        )
    except OSError as error:
        raise CheaptrainError(f"{path}: {error.strerror}; score the checkpoint with `cheaptrain eval`") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheaptrainError(
            f"{path}: not an evaluation of this version ({error}); delete it and score again"
        ) from error


def evaluations_of(run: RunDirectory) -> Iterator[Evaluation]:
    """Every evaluation of a run's checkpoints, oldest step first, also of deleted ones. Raises as read_evaluation."""
    folders = [folder for folder in (run.path / "eval").glob("*") if (folder / EVAL).is_file()]
    found = [(step, folder) for folder in folders if (step := step_of(folder)) is not None]
    yield from (read_evaluation(folder) for _, folder in sorted(found))


def holding_evaluations(run: RunDirectory) -> tuple[list[Evaluation], list[Evaluation]]:
    """Those of `evaluations_of` that hold for the run as it stands, and the stale ones, each oldest step first.

    Stale is what was scored of other bytes than the manifest of the checkpoint states that lies there under its step
    now (a run that went on from an earlier step trains it anew), or of one that is damaged at a glance. Of a deleted
    checkpoint nothing can be compared, and its scores hold. Raises as read_evaluation.
    """
    holding, stale = list[Evaluation](), list[Evaluation]()
    for evaluation in evaluations_of(run):
        checkpoint = run.checkpoints / evaluation.folder.name
        same = not checkpoint.is_dir() or stated_fingerprint(checkpoint) == evaluation.checkpoint.hash
        (holding if same else stale).append(evaluation)
    return holding, stale


def write_items(path: Path, items: Sequence[Item]) -> None:
    """Write one line an item."""
    lines = (json.dumps(asdict(item), ensure_ascii=False) + "\n" for item in items)
    path.write_text("".join(lines), encoding="utf-8")


def read_items(evaluation: Evaluation, result: TaskResult) -> list[Item]:
    """The items of a result, in the task's order; empty for a group. Raises CheaptrainError for a damaged file."""
    if result.items is None:
        return []
    path = evaluation.folder / result.items
    try:
        return [Item(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise CheaptrainError(f"{path}: {error.strerror}; score the checkpoint again") from error
    except (ValueError, TypeError) as error:
        raise CheaptrainError(f"{path}: damaged ({error}); delete it and score the checkpoint again") from error


def _kind(result: TaskResult) -> tuple[Any, ...]:
    """What was asked, and by which program."""
    return result.version, result.settings.get("content"), result.harness


def _task_result(entry: Mapping[str, Any]) -> TaskResult:
    return TaskResult(
        **{
            **entry,
            "metrics": tuple(Metric(**metric) for metric in entry["metrics"]),
            "members": tuple(entry["members"]),
            "notes": tuple(entry.get("notes", ())),
        }
    )
