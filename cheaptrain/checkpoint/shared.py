"""Is the run's folder one folder? Several nodes that each have a disk of their own would write a checkpoint in parts
that nobody can put together, and notice at the first save, or at the first resume."""

import secrets
import time
from pathlib import Path

from cheaptrain.checkpoint.paths import SHARED
from cheaptrain.errors import PreflightError
from cheaptrain.parallel.processes import Processes

_PATIENCE_SECONDS = 5.0  # network file systems show a new file to other nodes after a while


def check_shared(folder: Path, processes: Processes) -> None:
    """Raise PreflightError, on all processes, when not all of them see the same `folder`, which must be there on the
    main one. Collective."""
    if processes.size == 1:
        return
    token = processes.on_main(lambda: _leave_note(folder))
    note = folder / f"{SHARED}{token}"
    try:
        seen = processes.all_of(_reads(note, token))
    finally:
        if processes.is_main:
            note.unlink(missing_ok=True)
    blind = [str(rank) for rank, sees in enumerate(seen) if not sees]
    if blind:
        raise PreflightError(
            f"run.dir {folder}: process{'es' * (len(blind) > 1)} {', '.join(blind[:8])}"
            f"{' and more' if len(blind) > 8 else ''} of {processes.size} do not see the folder of the main process. "
            "All nodes write into one run.dir: put it on a file system that they share"
        )


def _leave_note(folder: Path) -> str:
    token = secrets.token_hex(8)
    try:
        (folder / f"{SHARED}{token}").write_text(token)
    except OSError as error:
        raise PreflightError(
            f"run.dir {folder} cannot be used: {error.strerror}: {error.filename or folder}"
        ) from error
    return token


def _reads(note: Path, token: str) -> bool:
    """Whether the note of the main process is here."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            if note.read_text() == token:
                return True
        except OSError:
            pass
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
