"""Opening a run directory: start, go on, skip, or refuse.

A run is what its recipe says (its identity) applied to its inputs (prepared data, tokenizer, starting weights, each
by hash). The directory keeps both in recipe.json. The same two again mean the same run: finished ones are skipped,
unfinished ones go on from their newest whole checkpoint. Anything else would mix two runs in one folder, so it is
refused with a list of what changed. The trap is deciding by the folder's name or by what lies in it; only the hashes
decide.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from cheaptrain.checkpoint.lock import RunLock
from cheaptrain.checkpoint.paths import STACKS, RunDirectory, step_of
from cheaptrain.checkpoint.retention import finish, set_aside
from cheaptrain.checkpoint.shared import check_shared
from cheaptrain.checkpoint.verify import Checkpoint, Report, newest_good, seal
from cheaptrain.durable import canonical_json, fingerprint, replace_json
from cheaptrain.errors import PreflightError
from cheaptrain.parallel.processes import Processes
from cheaptrain.recipe.identity import BATCH, identity_difference

FORMAT_VERSION = 1
Decision = Literal["fresh", "resume", "done"]


@dataclass
class OpenedRun:
    """A run directory and what to do in it. The main process holds its lock."""

    directory: RunDirectory
    decision: Decision
    checkpoint: Checkpoint | None  # verified; None when fresh
    recipe: Mapping[str, Any]  # what recipe.json holds; the same goes into each checkpoint
    lineage: Mapping[str, Any]  # identity and input hashes, for each checkpoint's manifest
    lock: RunLock | None  # None on the other processes

    @property
    def resumed_step(self) -> int | None:
        """The step to go on from; None for a fresh run."""
        return self.checkpoint.step if self.checkpoint else None

    def close(self) -> None:
        """Give the lock back."""
        if self.lock is not None:
            self.lock.release()

    def __enter__(self) -> "OpenedRun":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_run(
    path: Path,
    *,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, str],
    identity: Mapping[str, Any],
    inputs: Mapping[str, Any],
    steps: Callable[[Checkpoint], int],
    report: Report,
) -> OpenedRun:
    """Take the lock on the run at `path` and decide what to do there.

    `identity` is the recipe without its operational keys, `inputs` names every input and its hash. `steps` says where
    the run ends when it goes on from that checkpoint. `report` is told of everything passed over, set aside or
    removed. Raises PreflightError when another process trains here, the recipe or an input changed, the folder holds
    something else, only damaged checkpoints are there, or it cannot be written.
    """
    run = RunDirectory(path)
    given = {"recipe": recipe, "provenance": provenance, "identity": identity, "inputs": inputs}
    # Through JSON and back, so that what is compared (tuples, say) is what a later process will read.
    content = seal(json.loads(canonical_json({"format_version": FORMAT_VERSION, **given})))
    try:
        _refuse_foreign_folder(run)
        path.mkdir(parents=True, exist_ok=True)
        lock = RunLock(run.lock)
    except OSError as error:
        raise PreflightError(f"run.dir {path} cannot be used: {error.strerror}: {error.filename or path}") from error
    try:
        if not lock.exclusive:
            report(f"{path}: this file system knows no locks; make sure that no second process trains this run")
        _clear_leftovers(run, lock, report)
        if run.recipe.exists():
            _refuse_changes(run, content)
        checkpoint, done = _latest(run, steps, report)
        if not done:
            replace_json(run.recipe, content)
    except OSError as error:
        lock.release()
        raise PreflightError(f"run.dir {path} cannot be used: {error.strerror}: {error.filename or path}") from error
    except BaseException:
        lock.release()
        raise
    decision: Decision = "done" if done else "resume" if checkpoint else "fresh"
    return OpenedRun(run, decision, checkpoint, content, lineage(identity, inputs), lock)


def open_run_together(path: Path, processes: Processes, **given: Any) -> OpenedRun:
    """`open_run` on the main process, which checks hashes for all; what it found, or its error, on every process.

    `given` are the other arguments of `open_run`. Raises PreflightError as well when not all processes see the folder.
    Collective.
    """
    locks: list[RunLock | None] = []

    def work() -> OpenedRun:
        opened = open_run(path, **given)
        locks.append(opened.lock)
        return replace(opened, lock=None)

    opened = replace(processes.on_main(work), lock=locks[0] if locks else None)
    try:
        check_shared(path, processes)
    except BaseException:
        opened.close()
        raise
    return opened


def read_run(run: RunDirectory) -> dict[str, Any]:
    """What recipe.json of a started run holds. Raises PreflightError when it is damaged, OSError when it is not
    there."""
    try:
        kept: dict[str, Any] = json.loads(run.recipe.read_text(encoding="utf-8"))
        if kept["format_version"] != FORMAT_VERSION:
            raise PreflightError(
                f"{run.recipe} is of format version {kept['format_version']}; this cheaptrain reads {FORMAT_VERSION}"
            )
        if seal({key: value for key, value in kept.items() if key != "sha256"}) != kept:
            raise ValueError("its content does not match its own sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise PreflightError(
            f"{run.recipe} is damaged ({error}); copy the recipe.json of a folder in {run.checkpoints} over it"
        ) from error
    return kept


def changes(kept: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What of identity and inputs is another than when the run was started, a line each; `now` also has the
    provenance."""
    lines = []
    for line in identity_difference(kept["identity"], now["identity"], BATCH):
        origin = now["provenance"].get(line.partition(": ")[0])
        lines.append(f"{line} ({origin})" if origin else line)
    before, after = _flat(kept["inputs"]), _flat(now["inputs"])
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            lines.append(f"input {name}: {_short(before.get(name))} -> {_short(after.get(name))}")
    return lines


def another_run(run: RunDirectory, lines: Sequence[str]) -> str:
    """Why the run folder is not gone on with."""
    return (
        f"{run.path} holds another run; since it was started this changed:\n  "
        + "\n  ".join(lines)
        + f"\ngive another run.dir, or move {run.path} away, or start a new stage from it with model.init_from = "
        f'"{run.final}"'
    )


def lineage(identity: Mapping[str, Any], inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What each checkpoint of a run says in its manifest about where it comes from."""
    return {"identity_sha256": fingerprint(identity), "inputs": dict(inputs)}


def _latest(
    run: RunDirectory, steps_from: Callable[[Checkpoint], int], report: Report
) -> tuple[Checkpoint | None, bool]:
    """The checkpoint to go on from, if any, and whether the run is already done."""
    checkpoint = newest_good(run, report)
    if checkpoint is None:
        return None, False
    steps = steps_from(checkpoint)
    if checkpoint.step > steps:
        raise PreflightError(f"{checkpoint.path} is beyond step {steps}, where this recipe ends; give another run.dir")
    if checkpoint.step == steps:
        # The last save is the last act of a run, so nothing is missing but, after a kill at the wrong moment, the link.
        if run.final.resolve() != checkpoint.path.resolve():
            report(f"{finish(run, steps)} now points at {checkpoint.path.name}, which a killed process had left undone")
        return checkpoint, True
    for folder in run.steps():
        # Newer than the newest good one, so damaged: the run will come to this step again and needs the name.
        if (step_of(folder) or 0) > checkpoint.step:
            set_aside(folder, report)
    return checkpoint, False


def _refuse_foreign_folder(run: RunDirectory) -> None:
    if run.path.exists() and not run.path.is_dir():
        raise PreflightError(f"run.dir {run.path} is a file; give a folder")
    if run.path.is_dir() and not run.recipe.exists():
        # The lock and a recipe.json half-written may be there of a run killed in its first second.
        ours = {run.lock.name, STACKS}
        other = [p.name for p in sorted(run.path.iterdir()) if p.name not in ours and not p.name.startswith(".")]
        if steps := run.steps():
            raise PreflightError(
                f"run.dir {run.path} holds checkpoints but has lost its recipe.json; "
                f"copy {steps[-1] / 'recipe.json'} there to go on, or give another run.dir"
            )
        if other:
            raise PreflightError(
                f"run.dir {run.path} holds files but no recipe.json, so it is not a run to go on with: "
                f"{', '.join(other[:5])}. Give another run.dir, or move them away"
            )


def _clear_leftovers(run: RunDirectory, lock: RunLock, report: Report) -> None:
    for path in run.leftovers():
        if lock.exclusive:
            # Whoever writes or deletes here holds the lock, and we hold it: that process is dead.
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
            report(f"removed {path.name}, left half-done by a process that was killed")
        else:
            report(f"{path} was left half-done by a killed process; delete it when no other process trains this run")


def _refuse_changes(run: RunDirectory, content: Mapping[str, Any]) -> None:
    if lines := changes(read_run(run), content):
        raise PreflightError(another_run(run, lines))


def _flat(inputs: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in inputs.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _short(value: Any) -> str:
    """A hash by its first 12 digits, other values as they are."""
    if value is None:
        return "none"
    text = str(value)
    return text[:12] if len(text) == 64 and set(text) <= set("0123456789abcdef") else text
