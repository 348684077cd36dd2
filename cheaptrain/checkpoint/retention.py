"""Which checkpoints stay, and under which name: retention, the `final` link, and damaged ones set aside.

Nothing here ever meets half a checkpoint, and leaves none behind: a folder loses its name before its files, a link is
replaced in one step, and what is damaged is renamed, never deleted.
"""

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from cheaptrain.checkpoint.paths import DELETING, RunDirectory, step_of
from cheaptrain.checkpoint.verify import Report, verify_checkpoint
from cheaptrain.durable import sync
from cheaptrain.errors import CheaptrainError

_log = logging.getLogger(__name__)


def prune(
    run: RunDirectory, *, keep_last: int, keeps: Callable[[int], bool], report: Report = _log.warning
) -> list[Path]:
    """Delete what the recipe does not keep, after a save that succeeded; returns what was deleted.

    Kept: the newest `keep_last`, those whose step it `keeps` for good, and the one that `final` points to. Nothing
    is deleted when the newest is not whole (by presence and size). A folder loses its name before its files, so no
    reader and no crash ever meets half of one.
    """
    folders = run.steps()
    if not folders:
        return []
    if problems := verify_checkpoint(folders[-1], hashes=False):
        report(f"no old checkpoint deleted, because the newest is damaged: {folders[-1]}: {problems[0]}")
        return []
    kept = set(folders[-max(1, keep_last) :])
    kept |= {folder for folder in folders if keeps(step_of(folder) or 0)}
    if run.final.is_symlink():
        kept.add(run.checkpoints / run.final.readlink().name)
    deleted = [folder for folder in folders if folder not in kept]
    for folder in deleted:
        doomed = run.checkpoints / f"{DELETING}{folder.name}-{os.getpid()}"
        try:
            os.rename(folder, doomed)
            sync(run.checkpoints)
            shutil.rmtree(doomed)
        except OSError as error:
            report(f"old checkpoint {folder} not deleted: {error}")
    return deleted


def finish(run: RunDirectory, step: int) -> Path:
    """Point `final` at the checkpoint of `step`, at once; returns the link. Raises CheaptrainError when it cannot."""
    target = run.step(step)
    if problems := verify_checkpoint(target, hashes=False):
        raise CheaptrainError(f"{target} cannot become {run.final}: {problems[0]}")
    temporary = run.path / f".final-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.relative_to(run.path), target_is_directory=True)
        os.replace(temporary, run.final)
        sync(run.path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheaptrainError(
            f"{run.final} cannot be pointed at {target}: {error}. "
            "The checkpoint itself is whole and can be used by its path"
        ) from error
    return run.final


def set_aside(folder: Path, report: Report) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; nothing is deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.bad-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    sync(folder.parent)
    report(f"damaged checkpoint {folder.name} set aside as {aside}")
    return aside
