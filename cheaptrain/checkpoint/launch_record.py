"""launch.json in a run folder: what the last launch set out to do, and how it ended.

Metrics say how far a run came, not how far it was to go, nor why it is not there. Whoever asks later (`cheaptrain
status`) may not start anything to find out, so the launch writes it down: once when it begins, once when it ends. The
trap is the launch that is killed and writes no end: a record without one, on a run that nobody holds the lock of, is
just that. A record that cannot be written is no reason to end a run.
"""

import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.durable import replace_json
from cheaptrain.errors import EXIT_DONE, EXIT_FAILURE, CheaptrainError

_LONGEST_REASON = 500


@contextmanager
def recorded_launch(run: RunDirectory, facts: Mapping[str, Any], report: Callable[[str], None]) -> Iterator[None]:
    """Write `facts`, this process and the time to the record of `run`, and in the end how the block ended. Whoever
    calls holds the lock of the run."""
    begun = {**facts, "process": os.getpid(), "host": socket.gethostname(), "began": time.time()}
    _write(run, begun, report)
    try:
        yield
    except BaseException as error:
        _write(run, begun | {"ended": time.time(), "exit_code": _code(error), "reason": _reason(error)}, report)
        raise
    _write(run, begun | {"ended": time.time(), "exit_code": EXIT_DONE}, report)


def read_launch(run: RunDirectory) -> dict[str, Any]:
    """The record; empty when there is none. Raises ValueError when it is damaged, OSError when it cannot be read."""
    if not run.launch.exists():
        return {}
    content = json.loads(run.launch.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it is no table")
    return content


def _write(run: RunDirectory, content: Mapping[str, Any], report: Callable[[str], None]) -> None:
    try:
        replace_json(run.launch, dict(content))
    except OSError as error:
        report(f"{run.launch} not written: {error.strerror}; `cheaptrain status` will know less")


def _code(error: BaseException) -> int:
    if isinstance(error, CheaptrainError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE


def _reason(error: BaseException) -> str:
    told = str(error) if isinstance(error, CheaptrainError) else f"{type(error).__name__}: {error}"
    return told if len(told) <= _LONGEST_REASON else f"{told[:_LONGEST_REASON]}…"
