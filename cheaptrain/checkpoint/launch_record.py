"""launch.json in a run folder: what the last launch set out to do, on what, and how it ended; and those before it.

Metrics say how far a run came, not how far it was to go, nor why it is not there. Whoever asks later (`cheaptrain
status`) may not start anything to find out, so the launch writes it down: once when it begins, once when it ends. The
trap is the launch that is killed and writes no end: a record without one, on a run that nobody holds the lock of, is
just that. A record that cannot be written is no reason to end a run.

A run that was stopped and gone on with has had several launches, perhaps on different machines: the records of the
earlier ones stay, under "earlier", oldest first.
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


Note = Callable[[Mapping[str, Any]], None]


@contextmanager
def recorded_launch(run: RunDirectory, facts: Mapping[str, Any], report: Callable[[str], None]) -> Iterator[Note]:
    """Write `facts`, this process and the time to the record of `run`, and in the end how the block ended. What becomes
    known in between is added by calling what is yielded. Whoever calls holds the lock of the run."""
    begun = {**facts, "process": os.getpid(), "host": socket.gethostname(), "began": time.time()}
    begun["earlier"] = _earlier(run, report)
    _write(run, begun, report)

    def note(more: Mapping[str, Any]) -> None:
        begun.update(more)
        _write(run, begun, report)

    try:
        yield note
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


def launches(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The launches that a record tells of, oldest first, each without those before it; none of an empty record."""
    if not record:
        return []
    last = {key: value for key, value in record.items() if key != "earlier"}
    return [*record.get("earlier", ()), last]


def _earlier(run: RunDirectory, report: Callable[[str], None]) -> list[dict[str, Any]]:
    try:
        return launches(read_launch(run))
    except (OSError, ValueError) as error:
        report(f"{run.launch} cannot be read ({error}): what it said of earlier launches is lost")
        return []


def _write(run: RunDirectory, content: Mapping[str, Any], report: Callable[[str], None]) -> None:
    try:
        replace_json(run.launch, dict(content))
    except (OSError, ValueError) as error:  # ValueError: a figure of the plan that is not finite
        reason = getattr(error, "strerror", None) or error
        report(f"{run.launch} not written: {reason}; `cheaptrain status` and `cheaptrain report` will know less")


def _code(error: BaseException) -> int:
    if isinstance(error, CheaptrainError):
        return error.exit_code
    return 130 if isinstance(error, KeyboardInterrupt) else EXIT_FAILURE


def _reason(error: BaseException) -> str:
    told = str(error) if isinstance(error, CheaptrainError) else f"{type(error).__name__}: {error}"
    return told if len(told) <= _LONGEST_REASON else f"{told[:_LONGEST_REASON]}…"
