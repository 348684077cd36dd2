"""Start the launcher's agent, pass signals to the processes it starts, and answer with their exit code.

The agent (`accelerate launch`, and torch's elastic agent in it) would answer a signal by ending its processes: SIGTERM,
30 seconds, SIGKILL, which cuts a large checkpoint in two; and it answers 1 for every exit code. So it is made deaf to
signals and only sees its processes end. Whoever is asked to stop is this process; it hands the request to each of them
once, when they can take it, and a second one when it is asked again.
"""

import contextlib
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from cheaptrain.errors import EXIT_DIVERGED, EXIT_DONE, EXIT_FAILURE, EXIT_PREFLIGHT, EXIT_RECIPE, EXIT_STOPPED
from cheaptrain.launched import ASKED, ENV_APPLIED, EXIT_DIR
from cheaptrain.stopping import ECHO_SECONDS, SIGNALS, end_with_parent

KILL_AFTER_SECONDS = 5.0  # from the second request, or the crash of one process, to the end of all
STRAGGLER_SECONDS = 15.0  # when one process left before training, the others have nothing to save either
_POLL_SECONDS = 0.1


@dataclass
class Job:
    """The processes of this machine, as far as they are known, and what was asked of them."""

    directory: Path
    report: Callable[[str], None]
    requests: list[int] = field(default_factory=list)
    asked_at: float = 0.0
    workers: dict[int, psutil.Process | None] = field(default_factory=dict)  # None: gone before it was seen
    delivered: dict[int, int] = field(default_factory=dict)
    left_at: float | None = None
    crashed_at: float | None = None

    def request(self, number: int) -> None:
        """Take a signal: the first asks for a checkpoint, the second for the end. A second SIGHUP is nobody's wish."""
        now, again = time.monotonic(), bool(self.requests)
        if len(self.requests) > 1 or (again and (number == signal.SIGHUP or now - self.asked_at < ECHO_SECONDS)):
            return
        self.requests.append(number)
        self.asked_at = now
        (self.directory / ASKED).touch()
        self.deliver()
        name = signal.Signals(number).name
        self.report(
            f"{name} again: leaving at once"
            if again
            else f"{name}: the processes were asked to save a checkpoint and stop. Once more to leave at once."
        )

    def deliver(self) -> None:
        """Send every process that can take them the requests it has not had yet."""
        self._look()
        for rank, worker in self.workers.items():
            while (count := self.delivered.get(rank, 0)) < len(self.requests):
                self.delivered[rank] = count + 1
                if worker is not None:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        worker.send_signal(self.requests[count])

    def running(self) -> set[psutil.Process]:
        """The known processes that have not ended."""
        return {worker for worker in self.workers.values() if worker is not None and _runs(worker)}

    def overdue(self) -> bool:
        """Whether it is time to end by force whatever is left."""
        now, texts = time.monotonic(), _read(self.directory, "code").values()
        if self.left_at is None and any(text.endswith("early") for text in texts):
            self.left_at = now
        if self.crashed_at is None and self.crashed():
            self.crashed_at = now
        return (
            any(text.endswith("alone") for text in texts)
            or (len(self.requests) > 1 and (now - self.asked_at > KILL_AFTER_SECONDS or not self.running()))
            or (self.crashed_at is not None and now - self.crashed_at > KILL_AFTER_SECONDS)
            or (self.left_at is not None and now - self.left_at > STRAGGLER_SECONDS)
        )

    def crashed(self) -> list[int]:
        """Processes that are gone and wrote no exit code."""
        self._look()
        gone = {rank for rank, worker in self.workers.items() if not _runs(worker)}
        return sorted(gone - set(self.codes()))

    def codes(self) -> dict[int, int]:
        """The exit codes that the processes wrote, by rank."""
        return {rank: int(text.split()[0]) for rank, text in _read(self.directory, "code").items()}

    def _look(self) -> None:
        for rank, text in _read(self.directory, "pid").items():
            if rank not in self.workers:
                try:
                    self.workers[rank] = psutil.Process(int(text))
                except psutil.NoSuchProcess:
                    self.workers[rank] = None


def supervise(
    command: Sequence[str], environment: Mapping[str, str], processes: int, report: Callable[[str], None]
) -> int:
    """Run `command`, the agent that starts `processes` processes here; returns the exit code for all of them.

    `report` is told what a user should know, a line at a time.
    """
    with tempfile.TemporaryDirectory(prefix="cheaptrain-") as name:
        job = Job(Path(name), report)
        environment = {**environment, EXIT_DIR: name, ENV_APPLIED: "1", "PET_SIGNALS_TO_HANDLE": "SIGQUIT"}
        with _signals() as received:
            agent = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C at a terminal goes to a whole process group: to this one only
                preexec_fn=_deaf,
            )
            try:
                while agent.poll() is None or job.running():
                    for number in received():
                        job.request(number)
                        if len(job.requests) > 1:
                            agent.send_signal(signal.SIGSTOP)  # it would report as a crash what was asked for
                    job.deliver()
                    if job.overdue():
                        break
                crashed = job.crashed()
                if crashed and len(job.requests) < 2:  # the agent says of what signal, when the others are gone
                    _kill(job.running())
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        agent.wait(KILL_AFTER_SECONDS)
            finally:
                _end_all(agent, job)
        return _answer(job, processes, agent.returncode, crashed)


def exit_code(codes: Mapping[int, int], processes: int, agent_status: int) -> int:
    """One exit code from those the processes wrote, by rank; one that wrote none crashed or was ended by the agent.

    0 only when all did. A refusal counts also from one process alone: what the others met was its end. 75 says that a
    checkpoint stands, so it counts only with no failure beside it.
    """
    failures = {code for code in codes.values() if code != EXIT_DONE}
    if not failures:
        return EXIT_DONE if len(codes) == processes and agent_status == 0 else EXIT_FAILURE
    refusals = failures & {EXIT_RECIPE, EXIT_PREFLIGHT, EXIT_DIVERGED}
    if refusals:
        return min(refusals)
    return EXIT_STOPPED if failures == {EXIT_STOPPED} else EXIT_FAILURE


def _answer(job: Job, processes: int, agent_status: int, crashed: Sequence[int]) -> int:
    codes = job.codes()
    answer = exit_code(codes, processes, agent_status)
    if len(job.requests) > 1:
        job.report("left at once, as asked; the last checkpoint stands")
    elif not job.workers and not codes:
        job.report(f"`accelerate launch` ended with status {agent_status} and no process came up")
    elif answer == EXIT_FAILURE and crashed:
        ranks = ", ".join(map(str, crashed))
        job.report(f"rank {ranks} ended without an exit code: crashed or killed (out of memory?)")
    elif answer == EXIT_FAILURE and not any(codes.values()):
        job.report(f"the processes were done, and did not end well (status {agent_status})")
    return answer


@contextmanager
def _signals() -> Iterator[Callable[[], list[int]]]:
    """A function that waits a moment and returns the signals received since its last call; within the block they do
    nothing else. What whoever started us told us to ignore (nohup does that with SIGHUP) stays ignored.

    They come through a pipe: a handler that did the work itself could interrupt the loop in the middle of the same.
    """
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def received() -> list[int]:
        ready, _, _ = select.select([reader], [], [], _POLL_SECONDS)
        return [number for number in os.read(reader, 1024) if number in before] if ready else []

    heeded = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, lambda *_: None) for number in heeded}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        os.close(reader)
        os.close(writer)


def _deaf() -> None:
    """In the agent, before it starts: no signal ends it but SIGKILL, which it gets when this process dies."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def _end_all(agent: "subprocess.Popen[bytes]", job: Job) -> None:
    """Nothing that was started outlives this, not even what the agent was just about to start."""
    left = job.running()
    if agent.poll() is None:
        agent.send_signal(signal.SIGSTOP)
        with contextlib.suppress(psutil.NoSuchProcess):
            left |= set(psutil.Process(agent.pid).children(recursive=True))
    for worker in list(left):
        with contextlib.suppress(psutil.NoSuchProcess):
            left |= set(worker.children(recursive=True))
    _kill(left)
    if agent.poll() is None:
        agent.kill()
    agent.wait()
    psutil.wait_procs(left, timeout=KILL_AFTER_SECONDS)


def _kill(processes: set[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _runs(process: psutil.Process | None) -> bool:
    try:
        return bool(process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _read(directory: Path, kind: str) -> dict[int, str]:
    """What the processes wrote as `<rank>.<kind>`, by rank."""
    texts = {int(path.stem): path.read_text(encoding="utf-8").strip() for path in directory.glob(f"*.{kind}")}
    return {rank: text for rank, text in texts.items() if text}  # one that is empty is being written
