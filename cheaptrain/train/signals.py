"""Stopping when asked to: a checkpoint at the next step, whoever asked and for whatever reason.

Only a flag is set when a signal comes (`cheaptrain/stopping.py`): saving from within a handler could cut a step, or a
save already under way, in two.

Of many processes any one may be asked, and all must stop after the same step, or those that go on wait for ever for
the one that stopped: the flag becomes a stop only where all have agreed on it (`agreed_stop`, or the sum they exchange
after each step). The other trap is the end: when the first process ends, the launcher sends SIGTERM to the rest, which
must not turn their "stopped, with a checkpoint" into "killed". After `finished` no signal counts.
"""

import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from cheaptrain.parallel.processes import Processes
from cheaptrain.stopping import ECHO_SECONDS, SIGNALS, SignalRequest, end_with_parent, heeded

MAX_TIME = "run.max_time"
_SAVE_SECONDS = 60.0  # thought of a save until one was seen
_RECENT_STEPS = 20
_LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed.run")
__all__ = ["ECHO_SECONDS", "MAX_TIME", "SIGNALS", "StopRequest", "agreed_stop", "launch_started", "stop_on_signals"]


class StopRequest(SignalRequest):
    """Whether and why the run was asked to stop: by a signal, or because its time is nearly over.

    `max_time_seconds` may be set anew for each stage. Only the clock of rank 0 counts: two processes' clocks never
    agree, and would stop after different steps.
    """

    def __init__(self, max_time_seconds: float | None = None, started: float | None = None) -> None:
        super().__init__()
        self.agreed = False
        self.max_time_seconds = max_time_seconds
        self.steps_ahead = 0  # that are handed to the device before the last one's figures are read
        self._started = launch_started() if started is None else started
        self._steps: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._save_seconds: float | None = None
        self._keeps_time = os.environ.get("RANK", "0") == "0"

    def __bool__(self) -> bool:
        """Whether this process wants to stop. Once true it stays so."""
        if self.name is None and time.monotonic() > self.deadline:
            self.name = MAX_TIME
        return self.name is not None

    @property
    def deadline(self) -> float:
        """When to ask for a stop, on the clock of time.monotonic(): so that one more step, as long as the longest of
        the last twenty, and two saves, as long as the last one, end before `max_time_seconds` are over.

        Each step handed over ahead makes it two steps more: one was under way when the request went out with the next,
        and another had been handed over when the answer was read. Before the first save one is taken to last a minute,
        or a tenth of the time if that is less.
        """
        if self.max_time_seconds is None or not self._keeps_time:
            return math.inf
        save = self._save_seconds
        if save is None:
            save = min(_SAVE_SECONDS, self.max_time_seconds / 10)
        steps = (1 + 2 * self.steps_ahead) * max(self._steps, default=0.0)
        return self._started + self.max_time_seconds - steps - 2 * save

    def note_step(self, seconds: float) -> None:
        """A step took so long, with everything due after it but a save."""
        self._steps.append(seconds)

    def note_save(self, seconds: float) -> None:
        """A save took so long, from its beginning until the checkpoint stood."""
        self._save_seconds = seconds

    def adopt(self, name: str) -> None:
        """All processes have agreed to stop, for the reason `name`."""
        self.name, self.agreed = name, True

    def finished(self) -> None:
        """The stop was agreed and its checkpoint stands: from here to the end of the process no signal counts."""
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextmanager
def stop_on_signals(max_time_seconds: float | None = None, started: float | None = None) -> Iterator[StopRequest]:
    """Within the block, the signals of `SIGNALS` set the request instead of killing the process; those that are ignored
    stay so. So does the time: `max_time_seconds` from `started` on, by default from when the launcher started."""
    request = StopRequest(max_time_seconds, started)
    with heeded(request):
        _stop_with_the_launcher()
        yield request


def agreed_stop(stop: StopRequest, processes: Processes) -> bool:
    """Whether any process was asked to stop; then all know by whom, as in "SIGTERM on rank 1".

    All processes must ask, at the same point: between validation batches, parts of a save, units of preparing.
    """
    if stop.agreed:
        return True
    if not processes.any_of(bool(stop)):
        return False
    names = processes.all_of(stop.name)
    rank, name = next((rank, name) for rank, name in enumerate(names) if name is not None)
    stop.adopt(name if name == MAX_TIME or processes.size == 1 else f"{name} on rank {rank}")
    return True


def launch_started() -> float:
    """When the launcher of this process was started, or the process itself when there is none, on the clock of
    time.monotonic()."""
    process = psutil.Process()
    launcher = process.parent() if _is_launched() else None
    age = time.time() - (launcher or process).create_time()
    return time.monotonic() - max(0.0, age)


def _is_launched() -> bool:
    try:
        command = Path(f"/proc/{os.getppid()}/cmdline").read_bytes()
    except OSError:
        return False
    return any(name in command for name in _LAUNCHERS)


def _stop_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when the launcher dies: it does not pass on the one that killed it, and what it
    started would train on unseen. Linux only; started by anything else, nothing is asked."""
    parent = os.getppid()
    if _is_launched() and sys.platform == "linux":
        end_with_parent(signal.SIGTERM)
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
