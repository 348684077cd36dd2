"""The account of one stage: everything its run folder says of it, read once and told as plain values.

Whatever state the run is in, it has an account: finished, running, killed in the first second, damaged. What cannot be
read becomes a note. The trap is to count steps: a run that was stopped and gone on with, with another batch, has
read what its lines say it has, so tokens and seconds are taken from there.
"""

import json
import math
import os
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.checkpoint.launch_record import launches, read_launch
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.rundir import read_run
from cheaptrain.checkpoint.state_files import read_scalars
from cheaptrain.checkpoint.verify import STATE, stated_fingerprint
from cheaptrain.errors import CheaptrainError
from cheaptrain.evaluate.results import Evaluation, holding_evaluations
from cheaptrain.evaluate.sums import PROBE, Marks, read_marks
from cheaptrain.recipe.parents import PARENT_KEYS
from cheaptrain.report.series import Column, Metrics, Numbers, read_metrics, tokens_at
from cheaptrain.report.status import RUNNING, StageStatus

GPU_MEMORY, HOST_MEMORY = "system/gpu_memory", "system/memory"


@dataclass(frozen=True)
class Account:
    """One stage. `kept`: what recipe.json holds, empty where it cannot be read. `launches`: oldest first. `ledger`: of
    the newest checkpoint that has one. `evaluations`: those of the weights that lie there, or lay there when they were
    deleted; others become notes. `offset`: tokens that the stages it continues had read when it began."""

    status: StageStatus
    run: RunDirectory
    kept: Mapping[str, Any]
    launches: Sequence[Mapping[str, Any]]
    ledger: Mapping[str, Any]
    metrics: Metrics
    samples: Sequence[Mapping[str, Any]]
    marks: tuple[Marks | None, Marks | None]
    evaluations: Sequence[Evaluation]
    parameters: int | None
    checkpoint_bytes: int
    notes: tuple[str, ...]
    offset: int = 0

    @property
    def name(self) -> str:
        return self.status.name

    @property
    def recipe(self) -> Mapping[str, Any]:
        """The resolved recipe, empty where it is not known."""
        recipe: Mapping[str, Any] = self.kept.get("recipe") or {}
        return recipe

    @property
    def planned(self) -> Mapping[str, Any]:
        """The figures of the plan that the run was first started with; empty where none was written down."""
        return next((plan for launch in self.launches if (plan := launch.get("plan"))), {})

    @property
    def tokens(self) -> int:
        """Read so far, as the last line of the metrics says."""
        return int(self.metrics.last("train/tokens") or 0)

    @property
    def steps(self) -> int:
        steps = [column.steps[-1] for column in self.metrics.columns.values() if len(column)]
        return int(max(steps, default=0))

    @property
    def train_seconds(self) -> float | None:
        """Of all training steps, validation and saving not counted; where not every step was logged, those between two
        lines count as long as the one that was."""
        seconds = self.metrics["train/step_seconds"].finite
        if not len(seconds):
            return None
        counts = np.diff(seconds.steps, prepend=0)
        return float((seconds.values * np.maximum(counts, 1)).sum())

    @property
    def wall_seconds(self) -> float | None:
        """From the beginning to the end of each launch, together. A launch that wrote no end is taken to have lasted
        until now, if it runs, else until it last wrote a metric."""
        return sum(self._seconds(launch) for launch in self.launches) if self.launches else None

    @property
    def process_seconds(self) -> float | None:
        """The same, each launch as often as it had processes; one that does not say had as many as the last."""
        if not self.launches:
            return None
        last = self.processes or 1
        return sum(self._seconds(launch) * (launch.get("processes") or last) for launch in self.launches)

    def _seconds(self, launch: Mapping[str, Any]) -> float:
        return max(0.0, self._end(launch) - launch["began"]) if "began" in launch else 0.0

    def _end(self, launch: Mapping[str, Any]) -> float:
        if "ended" in launch:
            return float(launch["ended"])
        if launch is self.launches[-1] and self.status.state == RUNNING:
            return time.time()
        later = [float(other["began"]) for other in self.launches if other.get("began", 0) > launch["began"]]
        try:
            last_line = self.run.metrics.stat().st_mtime
        except OSError:
            last_line = float(launch["began"])
        return min([last_line, *later])

    @property
    def memory(self) -> tuple[str, float] | None:
        """The fullest that was logged, in bytes, and of which memory."""
        for name in (GPU_MEMORY, HOST_MEMORY):
            values = self.metrics[name].finite.values
            if len(values):
                return name, float(values.max())
        return None

    @property
    def processes(self) -> int | None:
        """Of the last launch."""
        return self.launches[-1].get("processes") if self.launches else None

    def position(self, column: Column) -> Numbers:
        """Tokens read by then since the beginning of the line of stages, for each value of a metric."""
        own = np.where(np.isfinite(column.tokens), column.tokens, tokens_at(self.metrics, column.steps))
        return own + self.offset

    def source_tokens(self) -> dict[str, int]:
        """Tokens read of each source, so far."""
        names = [name for name in self.metrics.columns if name.startswith("data/") and name.endswith("/tokens")]
        return {name.split("/", 1)[1].rsplit("/", 1)[0]: int(self.metrics.last(name) or 0) for name in names}


def account_of(status: StageStatus) -> Account:
    """Read everything about one stage. Nothing is written, and nothing that is missing or damaged is an error."""
    run, notes = RunDirectory(Path(status.run)), list[str]()
    metrics = _or_note(lambda: read_metrics(run.metrics), Metrics(), run.metrics, notes)
    if metrics.broken:
        notes.append(f"{run.metrics}: {metrics.broken} broken line{'s' * (metrics.broken > 1)} left out")
    written = _or_note(lambda: read_records(run.samples, notes.append), [], run.samples, notes)
    checkpoints = run.steps() if run.checkpoints.is_dir() else []
    holding, stale = _or_note(lambda: holding_evaluations(run), ([], []), run.path / "eval", notes)
    notes.extend(
        f"{evaluation.folder} is left out: these are scores of other weights than lie in "
        f"{run.checkpoints / evaluation.folder.name} now, or that is damaged; score it again with `cheaptrain eval`"
        for evaluation in stale
    )
    newest = run.final if run.final.is_dir() else (checkpoints[-1] if checkpoints else None)
    return Account(
        status=status,
        run=run,
        kept=_or_note(lambda: read_run(run), {}, run.recipe, notes) if run.recipe.exists() else {},
        launches=_or_note(lambda: launches(read_launch(run)), [], run.launch, notes),
        ledger=_ledger(checkpoints),
        metrics=metrics,
        samples=[sample for sample in written if isinstance(sample, dict)],
        marks=_or_note(lambda: _marks(run), (None, None), run.path / PROBE, notes),
        evaluations=holding,
        parameters=_parameters(newest) if newest is not None else None,
        checkpoint_bytes=_bytes_below(run.checkpoints),
        notes=tuple(dict.fromkeys([*status.notes, *notes])),
    )


def in_line(accounts: Sequence[Account]) -> list[Account]:
    """The same, each with the tokens that the stages had read whose weights it began with. What starts afresh, or from
    something that is not among them, begins at 0."""
    placed: dict[str, Account] = {}
    for account in accounts:
        parent = next((other for other in placed.values() if made_from(account, other, ["init_from"])), None)
        offset = parent.offset + parent.tokens if parent else 0
        placed[account.status.run] = replace(account, offset=offset)
    return list(placed.values())


def made_from(account: Account, other: Account, keys: Collection[str] = tuple(PARENT_KEYS)) -> bool:
    """Whether the stage began with weights of `other`, or learned from them (`keys`: of `PARENT_KEYS`): by the path
    that the recipe names, or, where folders were moved or the command is run from elsewhere, by their hash."""
    if account is other:
        return False
    paths = [account.status.made_from.get(PARENT_KEYS[key]) for key in keys]
    if any(path and Path(path).absolute().is_relative_to(other.run.path.absolute()) for path in paths):
        return True
    hashes = {(account.kept.get("inputs") or {}).get(key) for key in keys} - {None}
    return any(stated_fingerprint(folder) in hashes for folder in other.run.steps()) if hashes else False


def _or_note(read: Any, otherwise: Any, path: Path, notes: list[str]) -> Any:
    try:
        return read()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, CheaptrainError) as error:
        told = str(error) if isinstance(error, CheaptrainError) else f"{path} cannot be read: {error}"
        notes.append(told)
        return otherwise


def _marks(run: RunDirectory) -> tuple[Marks | None, Marks | None]:
    if not (run.path / PROBE).exists():
        return None, None
    content = json.loads((run.path / PROBE).read_text(encoding="utf-8"))
    return read_marks(content, "before"), read_marks(content, "after")


def _ledger(checkpoints: Sequence[Path]) -> dict[str, Any]:
    for folder in reversed(checkpoints):
        try:
            ledger: dict[str, Any] = read_scalars(folder / STATE)["ledger"]
            return ledger
        except (OSError, ValueError, KeyError, TypeError):
            continue  # without state, or damaged: the status says so
    return {}


def _parameters(checkpoint: Path) -> int | None:
    """Numbers in the weights, from the headers of their files; tied ones lie there once."""
    try:
        return sum(math.prod(shape) for file in checkpoint.glob("*.safetensors") for shape in _shapes(file)) or None
    except Exception:  # damaged in whatever way: the status says so
        return None


def _shapes(file: Path) -> Iterator[list[int]]:
    with safe_open(file, framework="numpy") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - it is no mapping
            yield tensors.get_slice(name).get_shape()


def _bytes_below(folder: Path) -> int:
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += Path(place, name).lstat().st_size
            except OSError:
                continue  # gone since: a run that is going on deletes old checkpoints
    return total
