"""One process trains a run: the lock that keeps a second one out.

A POSIX record lock on `<run>/lock`: the kernel gives it back when the process dies, however it dies, so there is no
stale lock to clean up after kill -9, and (unlike flock) a forked child that outlives its parent does not keep it.
Its trap: it belongs to the process, and closing any handle of the file drops it. So only this module opens that
file, and a table keeps this process itself from opening a run twice.
"""

import errno
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

from cheaptrain.errors import PreflightError

_held: dict[Path, int] = {}
# C's struct flock, to ask with (F_GETLK): for a lock of the whole file that somebody else has.
_FLOCK = {"linux": ("hhqqi4x", ("type", "whence", "start", "len", "pid"))}
_FLOCK["darwin"] = ("qqihh", ("start", "len", "pid", "type", "whence"))
_UNSUPPORTED = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


def holder(path: Path) -> str | None:
    """Who holds the lock in the file `path`, as they wrote it there ("process 12 on host"); None when nobody does.

    Only asks (F_GETLK), so a run that starts at the same moment is not kept out. Raises OSError when the file system
    knows no locks or the file cannot be read.
    """
    if path.resolve() in _held:
        return f"process {os.getpid()}"  # opening and closing the file here would give the lock away
    layout, fields = _FLOCK.get(sys.platform, _FLOCK["linux"])
    asked = {"type": fcntl.F_WRLCK, "whence": os.SEEK_SET, "start": 0, "len": 0, "pid": 0}
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        answer = fcntl.fcntl(handle, fcntl.F_GETLK, struct.pack(layout, *(asked[field] for field in fields)))
        found = dict(zip(fields, struct.unpack(layout, answer), strict=True))
        if found["type"] == fcntl.F_UNLCK:
            return None
        return os.pread(handle, 200, 0).decode(errors="replace").strip() or f"process {found['pid']}"
    finally:
        os.close(handle)


class RunLock:
    """The lock on a run directory, held until `release` or the end of the process."""

    def __init__(self, path: Path) -> None:
        """Take the lock in the file `path`. Raises PreflightError when another process (or this one) has it.

        `exclusive` is False on a file system that knows no locks: then nobody else is kept out.
        """
        self.path = path.resolve()
        if self.path in _held:
            raise PreflightError(f"{path.parent}: this process is already training this run")
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.exclusive = True
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                holder = os.pread(handle, 200, 0).decode(errors="replace").strip() or "another process"
                os.close(handle)
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise PreflightError(
                    f"{path.parent}: {holder} is training this run. Wait for it, stop it, or give another run.dir"
                ) from None
            self.exclusive = False
        _held[self.path] = handle
        try:
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        except OSError:
            self.release()
            raise

    def release(self) -> None:
        """Give the lock back. The file stays: deleting it would let two processes lock two files of one name."""
        handle = _held.pop(self.path, None)
        if handle is not None:
            os.close(handle)
