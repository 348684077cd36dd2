"""Stopping when asked to: the first signal asks for a checkpoint at the next step, the second one ends the process.

Only a flag is set inside the handler: saving from within it could cut a step, or a save already under way, in two.
The trap is counting deliveries instead of requests: a closing terminal sends SIGHUP from the kernel and again from the
shell, a launcher passes on what the process got already. So an echo is not a second request, and what whoever started
us told us to ignore (nohup does that with SIGHUP) stays ignored.
"""

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ECHO_SECONDS = 0.25  # a second signal this soon is the same request, delivered twice
_PR_SET_PDEATHSIG = 1


class StopRequest:
    """Whether and by which signal the run was asked to stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._received = 0.0

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Signal handler: remember the first, leave at once on the second. A second SIGHUP is never anybody's wish."""
        now = time.monotonic()
        if self.name is None:
            self.name, self._received = signal.Signals(number).name, now
        elif number != signal.SIGHUP and now - self._received >= ECHO_SECONDS:
            os._exit(128 + number)  # no clean-up on purpose: a half-written checkpoint is never taken for one


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the signals of `SIGNALS` set the request instead of killing the process; those that are ignored
    stay so."""
    request = StopRequest()
    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, request.receive) for number in heeded}
    _stop_with_the_launcher()
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop_with_the_launcher() -> None:
    """Ask the kernel for a SIGTERM when `accelerate launch` dies: it does not pass on the one that killed it, and what
    it started would train on unseen. Linux only; started by anything else, nothing is asked."""
    parent = os.getppid()
    try:
        launched = b"accelerate" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return
    if launched and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died meanwhile
            os.kill(os.getpid(), signal.SIGTERM)
