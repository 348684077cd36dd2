"""One save after another, in the background or not, and what came of each.

The loop starts a save and trains on; what came of it is taken up at a later point which all processes reach together,
so that a failure means the same on all of them. There is never more than one under way: two would share the copies they
are written from, and the disk. The trap is the exception in a thread, which nobody sees: here it waits, and is raised
by whoever asks.
"""

import atexit
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.retention import finish, prune
from cheaptrain.checkpoint.snapshot import Buffers
from cheaptrain.checkpoint.together import SaveFailed
from cheaptrain.checkpoint.write import Attempt, CheckpointParts, prepare, write_checkpoint
from cheaptrain.parallel.processes import Processes

_AT_EXIT_SECONDS = 60.0  # a save that waits for a process that is gone must not keep the others for ever


@dataclass
class Outcome:
    """What came of a save."""

    step: int
    final: bool
    path: Path | None = None  # None when it failed
    failure: SaveFailed | None = None
    nbytes: int = 0
    stall_seconds: float = 0.0  # that training waited for it
    seconds: float = 0.0  # from its start to the end of retention
    reports: list[str] = field(default_factory=list)  # for people


class Saver:
    """Saves the checkpoints of one run. Every method is called by all processes at the same point of training.

    `keeps` says of a step whether its checkpoint stays for good, beside the newest `keep_last`.
    """

    def __init__(
        self,
        run: RunDirectory,
        processes: Processes,
        *,
        asynchronous: bool,
        keep_last: int,
        keeps: Callable[[int], bool],
    ) -> None:
        self.run = run
        self.processes = processes
        self.asynchronous = asynchronous
        self._keep_last, self._keeps = keep_last, keeps
        self._buffers = Buffers() if asynchronous else None
        self._thread: threading.Thread | None = None
        self._outcome: Outcome | None = None
        self._unexpected: BaseException | None = None

    @property
    def step(self) -> int | None:
        """The step whose save is under way, or done and not asked for yet."""
        return self._outcome.step if self._outcome else None

    def start(self, step: int, parts: CheckpointParts, *, final: bool, began: float | None = None) -> bool:
        """Begin the save of `step`; `final` points the run's link at it. `began` is when training stopped for it
        (time.perf_counter), by default now. Ask for the earlier one first: RuntimeError otherwise.

        False when it has failed already (`wait` tells how); True when it is under way, or done if not asynchronous.
        """
        if self._outcome is not None:
            raise RuntimeError(f"the save of step {self._outcome.step} was not asked for yet")
        began = time.perf_counter() if began is None else began
        outcome = self._outcome = Outcome(step, final)
        try:
            attempt = prepare(
                self.run,
                step=step,
                parts=parts,
                processes=self.processes,
                buffers=self._buffers,
                report=outcome.reports.append,
            )
        except SaveFailed as error:
            outcome.failure = error
        except BaseException:
            self._outcome = None
            raise
        else:
            if self.asynchronous:
                # A daemon, so that training that ends with an error can leave; but see _at_exit.
                self._thread = threading.Thread(
                    target=self._write, args=(attempt, outcome, began), name=f"save-{step}", daemon=True
                )
                self._thread.start()
                atexit.register(self._at_exit)
                outcome.stall_seconds = time.perf_counter() - began
                return True
            self._write(attempt, outcome, began)
        outcome.stall_seconds = time.perf_counter() - began
        return outcome.failure is None

    def finished(self) -> bool:
        """Whether the save under way is done on every process: then `wait` will not. True when there is none.
        Collective while there is one."""
        if self._outcome is None:
            return True
        return not self.processes.any_of(self._thread is not None and self._thread.is_alive())

    def wait(self) -> Outcome | None:
        """What came of the save that was started, once it is done; None when there is none. Raises ProofFailed, and
        whatever else nobody expected, on all processes."""
        outcome, began = self._outcome, time.perf_counter()
        if outcome is None:
            return None
        if self._thread is not None:
            self._thread.join()
            outcome.stall_seconds += time.perf_counter() - began
        atexit.unregister(self._at_exit)
        unexpected = self._unexpected
        self._thread = self._outcome = self._unexpected = None
        if unexpected is not None:
            raise unexpected
        return outcome

    def _write(self, attempt: Attempt, outcome: Outcome, began: float) -> None:
        try:
            saved = write_checkpoint(attempt, self.processes, lambda _: self._afterwards(outcome))
            outcome.path, outcome.nbytes = saved.path, saved.nbytes
        except SaveFailed as error:
            outcome.failure = error
        except BaseException as error:
            if self._thread is None:
                self._outcome = None
                raise
            self._unexpected = error
        outcome.seconds = time.perf_counter() - began

    def _at_exit(self) -> None:
        """Nobody asked, so training ended with an error: what is nearly saved may be all there is of the last hours.
        And a process that ends while a thread of it is at work inside torch may abort with another exit code."""
        if self._thread is not None:
            self._thread.join(_AT_EXIT_SECONDS)

    def _afterwards(self, outcome: Outcome) -> None:
        if outcome.final:
            finish(self.run, outcome.step)
        prune(self.run, keep_last=self._keep_last, keeps=self._keeps, report=outcome.reports.append)
