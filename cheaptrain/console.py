"""A console that a run outlives.

Whoever watches may go away: the terminal is closed, `tee` or `head` at the end of the pipe ends. Writing then raises,
and rich answers a broken pipe by ending the process: hours of training lost for a line nobody reads. Here the first
failure points the stream at /dev/null, once and for all that write to it, and the run goes on.
"""

import contextlib
import os
import sys
from typing import IO, Any, cast

from rich.console import Console


def lasting_console(*, stderr: bool = False, **options: Any) -> Console:
    """A rich console on stdout or stderr that never raises for a reader that went away; `options` are rich's."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=cast(IO[str], _Lasting(stream)), **options)


def flush_streams() -> None:
    """Write out what is buffered, or drop it when nobody reads: Python would fail on it at exit, with a code of its
    own."""
    for stream in (sys.stdout, sys.stderr):
        _Lasting(stream).flush()


class _Lasting:
    """A text stream whose `write` and `flush` do not raise OSError; everything else is the stream's own."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            self._give_up()
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            self._give_up()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        # The descriptor itself, so that what Python still holds for it at exit does not spoil the exit code either.
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
