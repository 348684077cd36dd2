"""Being stopped while preparing: what is finished is kept, what is under way is dropped, and nothing is left running.

Units are done or not done, so there is nothing to save; stopping only has to be orderly. The first signal raises
`Interrupted` wherever the command is, the second one ends the process at once. Workers end when they lose their parent
and hear no such signal themselves: a terminal or a scheduler sends it to them as well, and a worker that died of it
would look like a failure.
"""

import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cheaptrain.stopping import SIGNALS, SignalRequest, heeded


class Interrupted(BaseException):
    """A signal asked to stop; its text is the signal's name. No Exception: nobody must take it for an error."""


class Interruption(SignalRequest):
    """Whether a signal came."""

    _raised = False

    def check(self, once_more: bool = True) -> None:
        """Raise Interrupted after a signal. `once_more`: again, since Python drops what is raised in a finaliser."""
        if self.name is not None and (once_more or not self._raised):
            self._raised = True
            raise Interrupted(self.name)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Within the block the first signal raises Interrupted and the second one ends the process."""
    interruption = Interruption()
    with heeded(interruption, lambda: interruption.check(once_more=False)):
        yield interruption


@contextmanager
def deaf_children() -> Iterator[None]:
    """Processes started within the block hear none of the signals, from their first instruction on."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def same_command() -> str:
    """How to go on: the command, where it is known."""
    program = Path(sys.argv[0]).name
    command = f": {shlex.join([program, *sys.argv[1:]])}" if program == "cheaptrain" else ""
    return f"run the same command again to go on{command}"
