"""The CORE bundle: a folder with `core.yaml` and the questions of its tasks as JSON lines.

Two layouts are read: data beside `core.yaml` with the baselines in it, and the one of nanochat's download (data in
`eval_data/`, baselines in `eval_meta_data.csv`). What the bundle says of a task decides: shots, delimiter, baseline.
The trap is the order: questions are shuffled once, by a fixed generator, before anything else counts them, because in
the files they stand sorted, and the first hundred of them are no sample.
"""

import csv
import gzip
import hashlib
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cheaptrain.errors import RecipeError

KINDS = {
    "multiple_choice": ("query", "choices", "gold"),
    "schema": ("context_options", "continuation", "gold"),
    "language_modeling": ("context", "continuation"),
}
_SHUFFLE = 1337


@dataclass(frozen=True)
class CoreTask:
    """What the bundle says of one task. `baseline`: what guessing gets, from 0 to 1."""

    label: str
    kind: str
    file: Path
    shots: int
    delimiter: str
    baseline: float

    def centred(self, accuracy: float) -> float:
        """0 where guessing is, 1 where everything is right."""
        return (accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class Question:
    """One question; `index` is its place in the shuffled task, which decides its examples."""

    index: int
    row: dict[str, Any]


def read_bundle(folder: Path) -> dict[str, CoreTask]:
    """The tasks of the bundle in `folder`, by label. Raises RecipeError naming what is missing or malformed."""
    path = folder / "core.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        baselines = _baselines(folder)
        tasks = [_task(folder, entry, baselines) for entry in entries]
    except OSError as error:
        raise RecipeError(
            f"{path}: {error.strerror}; the CORE bundle is a folder with core.yaml and its data"
        ) from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError, IndexError) as error:
        raise RecipeError(f"{path}: not a list of CORE tasks ({type(error).__name__}: {error})") from error
    return {task.label: task for task in tasks}


def questions(task: CoreTask, rows: int | None = None) -> list[Question]:
    """All questions of a task, in the shuffled order; with `rows` only so many first ones, of which examples are then
    drawn too. Raises RecipeError for a damaged file or rows without the fields of their kind."""
    found = []
    with (
        gzip.open(task.file, "rt", encoding="utf-8")
        if task.file.suffix == ".gz"
        else task.file.open(encoding="utf-8") as lines
    ):
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                found.append({**row, **{key: row[key] for key in KINDS[task.kind]}})
            except (ValueError, KeyError, TypeError) as error:
                fields = ", ".join(KINDS[task.kind])
                raise RecipeError(
                    f"{task.file}, line {number}: not a {task.kind} question with {fields} ({error})"
                ) from error
    random.Random(_SHUFFLE).shuffle(found)
    chosen = found[:rows]
    if task.shots >= len(chosen):
        raise RecipeError(
            f"{task.file}: {task.shots} examples a question cannot be drawn from {len(chosen)} questions; use more rows"
        )
    return [Question(index, row) for index, row in enumerate(chosen)]


def digest(task: CoreTask) -> str:
    """Hash of everything in the bundle that decides a score of this task: eight hex digits."""
    settings = json.dumps([task.kind, task.shots, task.delimiter, task.baseline])
    return hashlib.sha256(settings.encode() + task.file.read_bytes()).hexdigest()[:8]


def _task(folder: Path, entry: dict[str, Any], baselines: dict[str, float]) -> CoreTask:
    label, kind, name = entry["label"], entry["icl_task_type"], entry["dataset_uri"]
    if kind not in KINDS:
        raise ValueError(f"{label}: icl_task_type {kind!r} is none of {', '.join(KINDS)}")
    baseline = entry.get("random_baseline", baselines.get(label))
    if baseline is None:
        raise ValueError(f"{label}: no random_baseline, here or in eval_meta_data.csv")
    places = [folder / part / name for part in (".", "eval_data")]
    file = next((place.with_name(place.name + end) for place in places for end in ("", ".gz") if _is(place, end)), None)
    if file is None:
        raise ValueError(f"{label}: {name} is neither in {folder} nor in {folder / 'eval_data'}")
    return CoreTask(
        label=label,
        kind=kind,
        file=file,
        shots=entry["num_fewshot"][0],
        delimiter=entry.get("continuation_delimiter", " "),
        baseline=0.01 * float(baseline),
    )


def _is(place: Path, end: str) -> bool:
    return place.with_name(place.name + end).is_file()


def _baselines(folder: Path) -> dict[str, float]:
    """Percentages of eval_meta_data.csv by label; none where it is not part of the bundle."""
    path = folder / "eval_meta_data.csv"
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8", newline="") as lines:
        return {row["Eval Task"]: float(row["Random baseline"]) for row in csv.DictReader(lines)}
