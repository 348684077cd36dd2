"""Stopping when asked to: the first signal asks for a checkpoint at the next step, the second one ends the process.

Only a flag is set inside the handler: saving from within it could cut a step, or a save already under way, in two.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


class StopRequest:
    """Whether and by which signal the run was asked to stop."""

    def __init__(self) -> None:
        self.name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None

    def receive(self, number: int, _: FrameType | None) -> None:
        """Signal handler: remember the first, leave at once on the second."""
        if self.name is not None:
            os._exit(128 + number)  # no clean-up on purpose: a half-written checkpoint is never taken for one
        self.name = signal.Signals(number).name


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within the block, the signals of `SIGNALS` set the request instead of killing the process."""
    request = StopRequest()
    before = {number: signal.signal(number, request.receive) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
