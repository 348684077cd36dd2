"""Nobody waits for ever: a process that hangs or dies ends the job, and is named.

The training thread says where it is (`beat`); two threads of each process do the rest. One exchanges pulses with the
other processes, over a connection of its own to the store that the process group was made with: a collective cannot
report that collectives hang. The other one judges (`verdict.py`) and, when something stands still for longer than the
time-out, has the stacks of all threads of all processes written down, names the one at fault and ends the process.

The trap: everything that reports can hang too, on the disk or the pipe that the run itself hangs on. So the thread that
ends the process only waits: writing and printing are done by others, within a few seconds or not at all.
"""

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path

import psutil
from torch.distributed import PrefixStore, Store, distributed_c10d

from cheaptrain.errors import EXIT_FAILURE
from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.recorder import record_collectives, write_collectives
from cheaptrain.parallel.stacks import (
    STACKS_SIGNAL,
    WATCH_THREADS,
    in_collective,
    python_stacks,
    stacks_on_signal,
    write_stacks,
)
from cheaptrain.parallel.verdict import Fault, Heard, Pulse, find_fault, others

COLLECTIVE_GRACE_SECONDS = 60.0  # a collective gives up this much later than the watch, which can say more
_PERIOD_SECONDS = 1.0
_RANKS_A_PERIOD = 64  # of more processes each speaks less often: all read what all say
_TELL_SECONDS = 3.0  # at the end, for the others to hear of it
_WRITE_SECONDS = 10.0  # at most, to write everything down
_HASTE_SECONDS = 0.1  # between pulses then
_HOLD_SECONDS = 1.0  # rank 0 stays longer: it may hold the store, and losing that is noisy
_LISTEN_SECONDS = 2.5  # at most, for the one that reports to hear the stacks of the others
_MOST_OTHERS = 16  # processes listed beside the one at fault
_incarnations = count()


@contextmanager
def watch(
    processes: Processes,
    start_timeout: float,
    step_timeout: float,
    directory: Path,
    *,
    period_seconds: float | None = None,
) -> Iterator["Watch"]:
    """Watch over the processes within the block; all of them must enter it, the same number of times.

    A process that beats no more ends the job with exit code 1: after `start_timeout` seconds, or after `step_timeout`
    once `tighten` was called. The stacks of all processes are then in `directory`. Collectives get the same time-outs
    and a minute (`set_timeouts`).
    """
    record_collectives(directory)
    set_timeouts(processes, start_timeout)
    watcher = Watch(processes, start_timeout, step_timeout, directory, period_seconds)
    with stacks_on_signal():
        watcher.start()
        try:
            yield watcher
        except BaseException as error:
            words = " ".join(str(error).split())
            watcher.stop(f"{type(error).__name__}: {words[:300]}")
            raise
        watcher.stop("")


class Watch:
    """What the training thread holds of the watch: `beat` and `tighten`."""

    def __init__(
        self,
        processes: Processes,
        start_timeout: float,
        step_timeout: float,
        directory: Path,
        period_seconds: float | None = None,
    ) -> None:
        self._processes, self._directory = processes, directory
        self._limit, self._step_timeout = start_timeout, step_timeout
        self._period = (period_seconds or _PERIOD_SECONDS) * max(1.0, processes.size / _RANKS_A_PERIOD)
        self._lost = 0.0  # seconds in which this process did not run at all
        self._last = ("starting", 0, 0, self._clock(), 0.0)  # replaced as a whole, see `beat`
        self._thread = threading.get_ident()
        process = psutil.Process()
        self._self = (socket.gethostname(), process.pid, process.create_time())
        self._pulses: dict[int, tuple[Pulse | None, float]] = dict.fromkeys(
            range(processes.size), (None, self._clock())
        )
        self._answered, self._trouble = self._clock(), ""  # the store: when it last did, and what it said instead
        self._left: str | None = None
        self._fault: Fault | None = None
        self._stacks = ""
        self._stopping, self._awake, self._nudged = threading.Event(), threading.Event(), threading.Event()
        self._messages = count()
        self._store = _own_connection() if processes.size > 1 else None
        self._judge = threading.Thread(target=self._judge_all, name=WATCH_THREADS, daemon=True)
        self._exchange = threading.Thread(target=self._exchange_all, name=f"{WATCH_THREADS}-exchange", daemon=True)

    def beat(self, phase: str, step: int, allow_seconds: float = 0.0) -> None:
        """This process has got on and begins `phase` of `step`: "waiting for data", "forward", "saving weights".

        Call it after each micro-batch, validation batch and part of a save; it costs a microsecond. Never call it by
        the clock while waiting: what hangs would look alive. A phase that may go without a beat for longer than the
        time-out, like waiting for a checkpoint, says for how long in `allow_seconds`.
        """
        beats = self._last[2] + 1 if step == self._last[1] else 0
        self._last = (phase, step, beats, self._clock(), allow_seconds)

    def tighten(self) -> None:
        """The first step is done, nothing is compiled any more: from now on the shorter time-out holds."""
        self.beat(*self._last[:2])
        self._limit = self._step_timeout
        set_timeouts(self._processes, self._step_timeout)

    def start(self) -> None:
        """Start the threads."""
        if self._store is not None:
            self._exchange.start()
        self._judge.start()

    def stop(self, left: str) -> None:
        """End the threads; `left` is the error this process leaves with, empty when there is none."""
        self._left = left
        self._stopping.set()
        self._nudged.set()
        self._awake.set()
        if self._store is not None:
            self._exchange.join(self._period + 1.0)
        # When it is ending the process, it does not return.
        self._judge.join(None if self._fault else self._period + 1.0)

    def _clock(self) -> float:
        """Seconds in which this process ran: those of a Ctrl-Z, or of a machine that slept, do not count."""
        return time.monotonic() - self._lost

    # --- the thread that exchanges pulses ---

    def _exchange_all(self) -> None:
        assert self._store is not None
        while not self._trouble:
            last = self._stopping.is_set()
            try:
                self._post(self._store)
                if not last:
                    self._hear(self._store)
            except (RuntimeError, OSError) as error:  # the connection is gone for good; the judge says so in time
                self._trouble = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            else:
                self._answered = self._clock()
            if last:
                return
            self._awake.wait(_HASTE_SECONDS if self._fault else self._period)
            self._awake.clear()

    def _post(self, store: Store) -> None:
        pulse = self._pulse()
        store.set(str(pulse.rank), pulse.to_json())

    def _hear(self, store: Store) -> None:
        known = [rank for rank, (pulse, _) in self._pulses.items() if pulse or store.check([str(rank)])]
        for rank, content in zip(known, store.multi_get([str(rank) for rank in known]), strict=True):
            pulse, before = Pulse.from_json(content), self._pulses[rank][0]
            if before is None or pulse.count != before.count:
                self._pulses[rank] = (pulse, self._clock())
                if pulse.fault:
                    self._nudged.set()

    def _pulse(self) -> Pulse:
        phase, step, beats, when, allowed = self._last
        host, pid, born = self._self
        age = max(0.0, self._clock() - when)
        return Pulse(
            rank=self._processes.rank, host=host, pid=pid, born=born, count=next(self._messages), step=step,
            phase=phase, beats=beats, age_seconds=age, limit_seconds=max(self._limit, allowed),
            waiting=in_collective(self._thread), left=self._left, fault=self._fault, stacks=self._stacks,
        )  # fmt: skip

    # --- the thread that judges ---

    def _judge_all(self) -> None:
        before = time.monotonic()
        while not self._stopping.is_set():
            self._nudged.wait(self._period)
            now = time.monotonic()
            if now - before > 2 * self._period:
                self._lost += now - before - self._period
            before = now
            if not self._stopping.is_set() and (fault := self._find_fault()):
                self._end(fault)

    def _find_fault(self) -> Fault | None:
        now = self._clock()
        if self._store is None:
            return find_fault({0: Heard(self._pulse(), 0.0)}, self._limit)
        if now - self._answered > self._limit:
            return self._without_store(now - self._answered)
        return find_fault(self._heard(), self._limit)

    def _heard(self) -> dict[int, Heard]:
        # As of when we last listened: that we did not is nobody else's silence.
        heard = self._answered
        return {rank: Heard(pulse, max(0.0, heard - when)) for rank, (pulse, when) in self._pulses.items()}

    def _without_store(self, seconds: float) -> Fault:
        pulse = self._pulses[0][0]
        held_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        where = "the launcher on the first machine" if held_by_launcher else "rank 0"
        if pulse and not held_by_launcher:
            where += f" (last seen in {pulse.place}, pid {pulse.pid} on {pulse.host})"
        said = f" ({self._trouble})" if self._trouble else ""
        words = f"the store, which {where} holds, has not answered for {seconds:.0f} s{said}: it died or was stopped"
        return Fault(() if held_by_launcher else (0,), (words,), True)

    def _end(self, fault: Fault) -> None:
        """Tell everybody, have everything written down, end the process. Does not return."""
        self._fault = fault
        self._awake.set()
        until = time.monotonic() + _WRITE_SECONDS
        works = [
            threading.Thread(target=work, args=(fault,), name=f"{WATCH_THREADS}-report", daemon=True)
            for work in (self._report, self._write)
        ]
        for thread in works:
            thread.start()
        self._signal_silent(fault, STACKS_SIGNAL)
        time.sleep(_TELL_SECONDS + 2 * max(0.0, self._period - _PERIOD_SECONDS))
        for thread in works:
            thread.join(max(0.0, until - time.monotonic()))
        if self._processes.is_main:
            time.sleep(_HOLD_SECONDS)
        self._signal_silent(fault, signal.SIGKILL)  # it cannot end itself, and holds its GPU
        os._exit(EXIT_FAILURE)

    def _write(self, fault: Fault) -> None:
        rank = self._processes.rank
        write_stacks(self._directory / f"rank-{rank}.txt", f"rank {rank}, {self._pulse().place}: {fault.words[0]}")
        write_collectives(self._directory, rank)

    def _report(self, fault: Fault) -> None:
        """Say on stderr and in `report.txt` what is wrong: the first process that can speaks for all."""
        self._stacks = python_stacks(self._thread)
        self._awake.set()
        rank = self._processes.rank
        lost = self._store is not None and self._clock() - self._answered > self._limit
        alone = self._store is None or lost
        if not alone and not self._first_to_speak():
            return
        until = time.monotonic() + _LISTEN_SECONDS
        while not fault.silent and time.monotonic() < until and not all(map(self._stacks_of, fault.ranks)):
            time.sleep(0.05)
        lines = [f"rank {rank} ends the job: nothing goes on" if not lost else f"rank {rank} ends:", *fault.words]
        lines += [] if alone else others(self._heard(), fault)[:_MOST_OTHERS]
        for guilty in fault.ranks or (rank,):
            stacks = self._stacks_of(guilty)
            lines += [f"stacks of rank {guilty}:", stacks] if stacks else []
        lines.append(f"stacks of all threads: {self._directory}/rank-*.txt")
        text = "\n".join(lines) + "\n"
        os.write(2, text.encode())
        if not lost:
            self._directory.mkdir(parents=True, exist_ok=True)
            (self._directory / "report.txt").write_text(text, encoding="utf-8")

    def _first_to_speak(self) -> bool:
        """Whether no other process reports yet."""
        assert self._store is not None
        try:
            return self._store.add("speakers", 1) == 1
        except (RuntimeError, OSError):
            return True

    def _stacks_of(self, rank: int) -> str:
        if rank == self._processes.rank:
            return self._stacks
        pulse = self._pulses[rank][0]
        return pulse.stacks if pulse else ""

    def _signal_silent(self, fault: Fault, number: int) -> None:
        """Send a signal to those of the guilty that have gone silent on this machine."""
        for rank in fault.ranks if fault.silent else ():
            pulse = self._pulses[rank][0]
            if rank == self._processes.rank or pulse is None or pulse.host != self._self[0]:
                continue
            with contextlib.suppress(psutil.Error):  # it is gone already
                process = psutil.Process(pulse.pid)
                if process.create_time() == pulse.born:  # the same, not a later one with its pid
                    process.send_signal(number)


def set_timeouts(processes: Processes, seconds: float) -> None:
    """Let the collectives of every process group made so far fail after `seconds` and a minute.

    Two groups keep the patience that `join` gave them: `saving`, because disks are slow, and `control`, over which all
    wait while the main process works alone. A collective cannot know that who it waits for is alive; the watch does.
    """
    patience = timedelta(seconds=seconds + COLLECTIVE_GRACE_SECONDS)
    for group in list(distributed_c10d._world.pg_map):
        if group not in (processes.control, processes.saving):
            distributed_c10d._set_pg_timeout(patience, group)


def _own_connection() -> Store:
    """A connection of our own to the store of the process group: one connection does one thing at a time."""
    clone = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
    return PrefixStore(f"watch/{next(_incarnations)}", clone)


__all__ = ["COLLECTIVE_GRACE_SECONDS", "Watch", "set_timeouts", "watch"]
