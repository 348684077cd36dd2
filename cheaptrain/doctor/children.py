"""Child processes with a deadline, none of which is ever left behind.

What may hang or crash (a collective, a GPU kernel, the start of CUDA itself) runs in children, never in the doctor.
They are started afresh, not forked: CUDA does not survive a fork. Each writes what it reaches, line by line, into a
report file, so that of one that hangs or dies it is known where. Three things end them: the parent when time is up
(each child and all its own children: one process group each), a timer inside the child that needs no working
interpreter, and on Linux the kernel when the parent is gone.
"""

import contextlib
import faulthandler
import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from cheaptrain import stopping

REPORT = "CHEAPTRAIN_DOCTOR_REPORT"  # tells a child where its report file is
STARTED = "started"  # the first thing a child reports: from here on its time counts

_POLL_SECONDS = 0.05
_GRACE_SECONDS = 3.0  # for the others to report, once one has failed
_OUTPUT_BYTES = 20_000

Report = dict[str, Any]


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code`: exit code, negative for a signal, None when it was killed because time was up.

    `reports`: what it reported, oldest first. `output`: the end of what it printed.
    """

    code: int | None
    reports: tuple[Report, ...]
    output: str

    @property
    def started(self) -> bool:
        """Whether it got as far as reporting anything."""
        return bool(self.reports)

    def last_lines(self, count: int) -> tuple[str, ...]:
        """The last lines it printed that say something."""
        lines = [line.strip() for line in self.output.splitlines()]
        return tuple([line for line in lines if line][-count:])


def run_children(
    commands: Sequence[Sequence[str]],
    environments: Sequence[Mapping[str, str]],
    *,
    start_seconds: float,
    seconds: float,
) -> list[Ended]:
    """Run one child a command and return how each ended, at most `start_seconds` + `seconds` and a moment later.

    `start_seconds`: for all of them to report `STARTED` (imports from a slow disk); `seconds`: from then on.
    When one fails, the others are given three more seconds. No child lives when this returns or raises.
    """
    with TemporaryDirectory(prefix="cheaptrain-doctor-") as name:
        children = [_Child(Path(name), rank) for rank in range(len(commands))]
        try:
            for child, command, environment in zip(children, commands, environments, strict=True):
                child.start(command, environment)
            out_of_time = _wait(children, start_seconds, seconds)
            for child in children:
                child.kill()
            return [child.ended(child in out_of_time) for child in children]
        finally:
            for child in children:
                child.kill()


def report(**what: Any) -> None:
    """In a child: add a line to its report; without a report file (started by hand) nothing is written."""
    if path := os.environ.get(REPORT):
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(what) + "\n")


def end_with_parent() -> None:
    """In a child of the doctor: the kernel kills this process when the one that started it is gone. Linux only."""
    if REPORT in os.environ:
        stopping.end_with_parent(signal.SIGKILL)


def end_after(seconds: float) -> None:
    """In a child: end this process, with the stacks of all threads on stderr, unless it is done by then.

    The timer is a thread of C that needs no interpreter lock, which a hung driver may hold for ever.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)


class _Child:
    def __init__(self, folder: Path, rank: int) -> None:
        self._report, self._output = folder / f"report-{rank}.jsonl", folder / f"output-{rank}.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        with open(self._output, "wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**environment, REPORT: str(self._report)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def code(self) -> int | None:
        assert self._process is not None
        return self._process.poll()

    @property
    def has_started(self) -> bool:
        return self._report.exists() and self._report.stat().st_size > 0

    def kill(self) -> None:
        """End it and whatever it started, and wait until it is gone."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):  # macOS refuses a group of the dead
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def ended(self, out_of_time: bool) -> Ended:
        reports = []
        for line in self._report.read_text(encoding="utf-8").splitlines() if self._report.exists() else ():
            with contextlib.suppress(ValueError):  # the torn last line of one that was killed
                reports.append(json.loads(line))
        with open(self._output, "rb") as file:
            file.seek(max(0, self._output.stat().st_size - _OUTPUT_BYTES))
            output = file.read().decode(errors="replace")
        return Ended(None if out_of_time else self.code, tuple(reports), output)


def _wait(children: Sequence[_Child], start_seconds: float, seconds: float) -> list[_Child]:
    """Wait for all to end; returns those that had not when time was up."""
    deadline, all_started, grace = time.monotonic() + start_seconds, False, False
    while running := [child for child in children if child.code is None]:
        now = time.monotonic()
        if now >= deadline:
            return running
        if not (all_started or grace) and all(child.has_started for child in children):
            all_started, deadline = True, now + seconds
        if not grace and any(child.code for child in children):
            grace, deadline = True, min(deadline, now + _GRACE_SECONDS)
        time.sleep(_POLL_SECONDS)
    return []
