"""Worker processes that do units, and what becomes of them when something goes wrong.

The parent hands each worker one task at a time over a socket pair and waits for any of them to answer. A worker that
dies closes its socket, which ends the wait at once: the command stops with the worker's name, its signal and its unit,
and never hangs on an answer that cannot come. Workers hear no signals that ask to stop (`interrupt.py`): they end when
the parent does, or when it kills them.
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from cheaptrain.data.interrupt import deaf_children
from cheaptrain.data.worker import Setup, Task
from cheaptrain.errors import CheaptrainError

_GRACE_SECONDS = 5


class Pool:
    """A context manager around `count` workers."""

    def __init__(self, count: int, setup: Setup) -> None:
        self._workers: list[_Worker] = []
        try:
            for number in range(1, count + 1):
                self._workers.append(_Worker(f"prepare-{number}"))
            for worker in self._workers:  # only now: they start side by side, and reading the setup waits for that
                worker.send(setup)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def idle(self) -> bool:
        """Is there a worker without a task?"""
        return any(worker.task is None for worker in self._workers)

    @property
    def busy(self) -> bool:
        """Is there a worker with a task?"""
        return any(worker.task is not None for worker in self._workers)

    def submit(self, task: Task) -> None:
        """Give a task to a worker that has none."""
        next(worker for worker in self._workers if worker.task is None).give(task)

    def messages(self, timeout_seconds: float) -> Iterator[tuple[Task, tuple[Any, ...]]]:
        """What workers have to say, each with its task. Raises CheaptrainError for a failed task or a dead worker."""
        ready = wait([worker.connection for worker in self._workers], timeout_seconds)
        for worker in self._workers:
            if worker.connection in ready:
                yield worker.hear()

    def close(self) -> None:
        """End all workers, also in the middle of a unit: what is half-written has another name and is cleared away."""
        for worker in self._workers:
            worker.connection.close()
            worker.process.kill()
        for worker in self._workers:
            worker.process.wait()


class _Worker:
    def __init__(self, name: str) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # one core a worker; there are as many workers as cores
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        }
        with theirs, deaf_children():
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "cheaptrain.data.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=environment,
            )
        self.connection = Connection(ours.detach())
        self.name = name
        self.task: Task | None = None

    def give(self, task: Task) -> None:
        self.task = task
        self.send(task)

    def send(self, message: Any) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise CheaptrainError(self._obituary()) from error

    def hear(self) -> tuple[Task, tuple[Any, ...]]:
        try:
            message = self.connection.recv()
        except (EOFError, OSError) as error:
            raise CheaptrainError(self._obituary()) from error
        task = self.task
        assert task is not None
        if message[0] == "failed":
            raise message[1]
        if message[0] == "done":
            self.task = None
        return task, message

    def _obituary(self) -> str:
        try:
            code = self.process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            code = None
        if code is not None and code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (the system does this when memory runs out)" if -code == signal.SIGKILL else ""
        else:
            how = "closed its connection" if code is None else f"ended with exit code {code}"
        where = "before its first unit"
        if self.task is not None:
            where = (
                f"while on source {self.task.job.source.name!r}, unit {self.task.unit.index} ({self.task.unit.label})"
            )
        return (
            f"worker {self.name} (pid {self.process.pid}) {how} {where}; finished units are kept: run the same command "
            "again, with fewer data.workers or a smaller data.unit_bytes if memory ran out"
        )
