"""One run of preparing at a time in a folder, except the different shards of one division, which cooperate.

The lock is the kernel's (flock): it goes when the process goes, however it goes, so there is never a stale lock to
delete. A run of everything locks the folder for itself alone; a run of shard k of n shares the folder's lock with
other shards and holds a second lock of its own.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cheaptrain.errors import PreflightError


@contextmanager
def lock_directory(directory: Path, shard: tuple[int, int]) -> Iterator[None]:
    """Hold the folder for this run. Raises PreflightError when another run holds it."""
    k, n = shard
    alone = n == 1
    wanted = [(directory / ".lock", fcntl.LOCK_EX if alone else fcntl.LOCK_SH)]
    if not alone:
        wanted.append((directory / f".lock-{k}-of-{n}", fcntl.LOCK_EX))
    held: list[int] = []
    try:
        for path, kind in wanted:
            held.append(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666))
            try:
                fcntl.flock(held[-1], kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                what = "here" if alone or kind == fcntl.LOCK_SH else f"as shard {k}/{n}"
                raise PreflightError(
                    f"{directory}: another `cheaptrain prepare` is at work {what}; wait until it ends (several can "
                    "share the work as --shard 1/n, 2/n, ...)"
                ) from error
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)
