"""Being asked to stop: by whom, by when, once or twice, in every process and in `cheaptrain prepare`."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from prepare_helpers import prepare, recipe, write_jsonl
from ranks import run_ranks
from small_runs import in_child, run_child, tail

from cheaptrain.errors import StoppedError
from cheaptrain.parallel.processes import join
from cheaptrain.stopping import ECHO_SECONDS, SIGNALS
from cheaptrain.train.signals import StopRequest, agreed_stop, stop_on_signals

LATER = ECHO_SECONDS + 0.3
UNIT = 30_000


def _await(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def test_a_signal_on_one_rank_stops_it_alone() -> None:
    outcomes = run_ranks(_asked, 3)
    assert outcomes == [([False, False, True, True], "SIGTERM on rank 1")] * 3


def _asked(rank: int, size: int) -> tuple[list[bool], str | None]:
    processes = join(60)
    with stop_on_signals() as stop:
        answers = []
        for step in range(4):
            if step == 2 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(agreed_stop(stop, processes))
        return answers, stop.name


def test_a_request_that_reached_all_ranks_is_named_after_each_of_them() -> None:
    assert run_ranks(_all_asked, 2) == ["SIGUSR1 on rank 0"] * 2


def _all_asked(rank: int, size: int) -> str | None:
    processes = join(60)
    with stop_on_signals() as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert agreed_stop(stop, processes)
        return stop.name


def test_the_signal_of_a_rank_that_had_agreed_already_counts_as_the_second(tmp_path: Path) -> None:
    def work() -> None:
        with stop_on_signals() as stop:
            stop.adopt("SIGTERM on rank 3")
            time.sleep(LATER)
            os.kill(os.getpid(), signal.SIGTERM)
            print(f"asked by {stop.name}", flush=True)
            time.sleep(LATER)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)

    assert run_child(work, tmp_path / "log") == 128 + signal.SIGTERM
    assert "asked by SIGTERM on rank 3" in tail(tmp_path / "log")


def test_signals_after_the_end_was_agreed_change_the_exit_code(tmp_path: Path) -> None:
    """The launcher ends the other processes when the first one has ended."""

    def work() -> None:
        with stop_on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop
            stop.finished()
            time.sleep(LATER)
            os.kill(os.getpid(), signal.SIGTERM)
        for number in SIGNALS:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        raise StoppedError("stopped")

    assert run_child(work, tmp_path / "log") == 75, tail(tmp_path / "log")


def test_a_second_signal_waits_for_a_main_thread_that_hangs_in_c(tmp_path: Path) -> None:
    def work() -> None:
        with stop_on_signals():
            print("hanging", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)  # minutes, without the interpreter

    pid = in_child(work, tmp_path / "log")
    try:
        _await(lambda: (tmp_path / "log").exists() and "hanging" in tail(tmp_path / "log"))
        os.kill(pid, signal.SIGTERM)
        time.sleep(LATER)
        os.kill(pid, signal.SIGTERM)
        _await(lambda: psutil.Process(pid).status() == psutil.STATUS_ZOMBIE, 30)
    finally:
        os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 128 + signal.SIGTERM


@pytest.mark.slow
def test_a_signal_to_a_forked_child_stops_its_parent(tmp_path: Path) -> None:
    def work() -> None:
        with stop_on_signals() as stop:
            for number in range(100):
                child = os.fork()
                if child == 0:
                    time.sleep(20)
                    os._exit(0)
                time.sleep(number / 50_000)
                os.kill(child, signal.SIGTERM)
                assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM, number
            time.sleep(0.2)
            assert not stop

    assert run_child(work, tmp_path / "log") == 0, tail(tmp_path / "log")


def test_handlers_and_threads_stay_behind() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    files = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        with stop_on_signals():
            pass
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert len(os.listdir("/proc/self/fd")) == files
    assert signal.set_wakeup_fd(-1) == -1


def test_max_time_leaves_no_room_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    stop = StopRequest(1000.0, started=5.0)
    assert stop.deadline == 1005 - 2 * 60
    stop.note_step(30.0)
    stop.note_step(2.0)
    stop.note_save(100.0)
    stop.note_save(10.0)
    assert stop.deadline == 1005 - 30 - 2 * 10
    for _ in range(20):
        stop.note_step(3.0)
    assert stop.deadline == 1005 - 3 - 2 * 10  # compiling is long ago
    stop.steps_ahead = 1  # one is under way when the request goes out, one was handed over when the answer is read
    assert stop.deadline == 1005 - 3 * 3 - 2 * 10
    assert StopRequest(50.0, started=5.0).deadline == 55 - 2 * 5  # a short time is not all kept for a save
    assert StopRequest(None, started=5.0).deadline == float("inf")


def test_max_time_is_forgotten_or_asks_on_several_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    now = time.monotonic()
    assert not StopRequest(1000.0, started=now) and not StopRequest(None, started=now - 10**6)
    late = StopRequest(1000.0, started=now - 900)
    assert late and late.name == "run.max_time"
    late.max_time_seconds = 10**6
    assert late  # a stop is not taken back
    monkeypatch.setenv("RANK", "1")
    assert not StopRequest(1000.0, started=now - 10**6)


@pytest.mark.slow
def test_max_time_begins_when_the_second_attempt_of_a_launcher_does() -> None:
    child = (
        "import time, psutil\nfrom cheaptrain.train.signals import launch_started\n"
        "print(time.monotonic() - launch_started(), time.time() - psutil.Process().create_time())"
    )
    launcher = f"import subprocess, sys, time; time.sleep(2); subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for arguments, waited in (["accelerate", "launch"], 2), ([], 0):
        command = [sys.executable, "-c", launcher, *arguments]
        printed = subprocess.run(command, env=environment, check=True, capture_output=True).stdout
        of_launch, of_process = map(float, printed.split())
        # The clock of processes ticks a hundred times a second.
        assert (of_launch - of_process > waited - 0.02) if waited else abs(of_launch - of_process) < 0.02


PREPARE = """
import os, sys, time
from cheaptrain.data import prepare as preparing
from cheaptrain.errors import CheaptrainError
from cheaptrain.recipe.schema import Recipe
sys.argv = ["/usr/bin/cheaptrain", "prepare", "my recipe.toml", *sys.argv[1:]]
if "slow" in sys.argv:
    preparing.Pool.close = lambda self: time.sleep(60)
try:
    preparing.prepare_recipe(Recipe.model_validate_json(sys.argv.pop(3)))
except CheaptrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""


def _start_preparing(root: Path, *arguments: str) -> tuple[subprocess.Popen[bytes], list[psutil.Process]]:
    """The command with two workers, and three units done."""
    asked = recipe(root, {"files": str(root / "a.jsonl")}, unit_bytes=UNIT, workers=2)
    process = subprocess.Popen(
        [sys.executable, "-c", PREPARE, asked.model_dump_json(), *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    _await(lambda: len(_units(root)) >= 3 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, psutil.Process(process.pid).children(recursive=True)


def _units(root: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (root / "data").glob("source0-*/unit-*.json")}


def _gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    "number, group",
    [
        (signal.SIGINT, True),
        pytest.param(signal.SIGTERM, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, True, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, False, marks=pytest.mark.slow),
    ],
)
def test_a_stopped_prepare_fails_or_leaves_workers(tmp_path: Path, number: signal.Signals, group: bool) -> None:
    """To the process alone, as `kill` sends it, and to its workers as well, as a terminal or a scheduler does."""
    write_jsonl(tmp_path / "a.jsonl", range(3000), words=90)
    process, workers = _start_preparing(tmp_path)
    workers[1].suspend()  # it will not see that its parent is gone
    os.killpg(process.pid, number) if group else process.send_signal(number)
    output = process.communicate(timeout=60)[0].decode()
    assert process.returncode == 75, output
    assert f"{number.name}: stopped; finished units are kept: run the same command again" in output
    assert "cheaptrain prepare 'my recipe.toml'" in output and "Traceback" not in output
    assert len(workers) == 2 and all(map(_gone, workers))
    done = _units(tmp_path)
    assert 3 <= len(done) < 60
    manifest, _ = prepare(tmp_path, {"files": str(tmp_path / "a.jsonl")}, unit_bytes=UNIT)
    assert manifest.train.documents + manifest.val.documents == 3000
    assert {name: when for name, when in _units(tmp_path).items() if name in done} == done


def test_a_worker_that_hears_what_its_parent_was_told_fails_the_command(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(1500), words=90)
    process, workers = _start_preparing(tmp_path)
    for number in SIGNALS:
        workers[0].send_signal(number)
    output = process.communicate(timeout=120)[0].decode()
    assert process.returncode == 0, output
    assert len(_units(tmp_path)) > 20


def test_a_second_signal_waits_for_workers_or_leaves_them(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(3000), words=90)
    process, workers = _start_preparing(tmp_path, "slow")
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(LATER)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    _await(lambda: all(map(_gone, workers)), 10)
    assert len(workers) == 2
