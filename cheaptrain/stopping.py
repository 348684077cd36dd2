"""Signals as requests: the first asks the process to stop when it can, the second one ends it at once.

Two traps. Counting deliveries instead of requests: a closing terminal sends SIGHUP from the kernel and again from the
shell, a launcher passes on what the process got already. So an echo is not a second request, and what whoever started
us told us to ignore (nohup does that with SIGHUP) stays ignored. And waiting for the interpreter: Python runs signal
handlers in the main thread only, between two instructions, so a process that hangs in a collective or trains a
tokenizer in Rust would not hear the second request either. Here the number of each signal goes through a pipe to a
thread that is free to take it.
"""

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)  # loaded here: between fork and exec a child may only call
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
ECHO_SECONDS = 1.0  # a second signal this soon is the same request: under load a launcher passes it on late


def end_with_parent(number: int) -> None:
    """Ask the kernel to send this process the signal `number` when its parent dies. Linux only; elsewhere nothing."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, number)


class SignalRequest:
    """Whether and by which signal this process was asked to stop."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._received: float | None = None

    def receive(self, number: int, _: FrameType | None = None) -> None:
        """Take a signal: remember the first, leave at once on the second. A second SIGHUP is never anybody's wish."""
        now = time.monotonic()
        if self._received is None:
            self._received = now
            self.name = self.name or signal.Signals(number).name
        elif number != signal.SIGHUP and now - self._received >= ECHO_SECONDS:
            os._exit(128 + number)  # no clean-up on purpose: a half-written checkpoint is never taken for one


@contextmanager
def heeded(request: SignalRequest, afterwards: Callable[[], None] | None = None) -> Iterator[None]:
    """Within the block `SIGNALS` go to `request.receive`, at once, whatever the main thread is doing; those that are
    ignored stay so. `afterwards` is called in the main thread as soon as it listens, and may raise.

    Outside the main thread, which alone may change handlers, nothing is heeded.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pipe, before = _Pipe(request), dict[int, Any]()

    def handle(*_: Any) -> None:
        pipe.drain()
        if afterwards is not None:
            afterwards()

    _open.append((pipe, before))
    previous = signal.set_wakeup_fd(pipe.writer, warn_on_full_buffer=False)
    try:
        for wanted in SIGNALS:
            if signal.getsignal(wanted) is not signal.SIG_IGN:
                before[wanted] = signal.signal(wanted, handle)
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is handle:  # nobody has set another one meanwhile
                signal.signal(number, handler)
        signal.set_wakeup_fd(previous)
        _open.remove((pipe, before))
        pipe.close()


class _Pipe:
    """The numbers of signals, from the handler in C to whoever reads them first; 0 is the end."""

    def __init__(self, request: SignalRequest) -> None:
        self._request = request
        self._reader, self.writer = os.pipe()
        self._lock = threading.RLock()  # a second signal may come while the main thread takes in the first
        self._ended = False
        for end in (self._reader, self.writer):
            os.set_blocking(end, False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()

    def drain(self) -> None:
        """Take in all there are."""
        with self._lock, contextlib.suppress(BlockingIOError):
            while numbers := os.read(self._reader, 64):
                for number in numbers:
                    if number in SIGNALS:
                        self._request.receive(number, None)
                    self._ended = self._ended or number == 0

    def close(self) -> None:
        """End the thread."""
        os.write(self.writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self.writer)

    def _listen(self) -> None:
        waiting = select.poll()
        waiting.register(self._reader, select.POLLIN)
        while not self._ended:
            waiting.poll()
            self.drain()


def _before_fork() -> None:
    """A forked child is not the one asked, and until it knows that, its signals would reach the pipe of its parent: so
    it is deaf from its first moment on."""
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS if _open else ())


def _after_fork_in_child() -> None:
    for _, before in _open:
        signal.set_wakeup_fd(-1)
        for number, handler in before.items():
            signal.signal(number, handler)
    _after_fork()


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


_open: list[tuple[_Pipe, dict[int, Any]]] = []
_fork = threading.local()
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child)
