"""Signals, launchers and readers that go away: one request to stop loses no work, two end the process at once."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import in_child, prepare, read_lines, recipe_table, run_child, tail, train, write_recipe, write_texts

from cheaptrain.train.signals import ECHO_SECONDS, stop_on_signals


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stops")
    write_texts(path)
    prepare(_recipe(path, "prepare"))
    return path


def _recipe(folder: Path, run: str, **model: Any) -> str:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": 10}
    return write_recipe(folder / f"{run}.toml", table | ({"model": model} if model else {}))


def _stopped(module: str, function: str, call: int, *paths: str) -> Callable[[], None]:
    """Train, and get a SIGTERM when `function`, as `module` of cheaptrain.train calls it, is called for the nth
    time."""

    def work() -> None:
        import importlib

        where = importlib.import_module(f"cheaptrain.train.{module}")
        plain, calls = getattr(where, function), [0]

        def interrupted(*arguments: Any, **rest: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(*arguments, **rest)

        setattr(where, function, interrupted)
        train(*paths)()

    return work


def _steps(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").glob("*")) if (run / "checkpoints").exists() else []


def test_a_stop_at_a_step_that_was_just_saved_does_not_save_it_again(folder: Path) -> None:
    recipe, log = _recipe(folder, "once"), folder / "once.log"
    assert run_child(_stopped("loop", "train_step", 5, recipe), log) == 75
    saves = [r for r in read_lines(folder / "once" / "metrics.jsonl") if "checkpoint/seconds" in r]
    assert [record["step"] for record in saves] == [5] and "already there" not in tail(log)
    assert run_child(train(recipe), log) == 0, tail(log)
    assert "from step 5" in tail(log)  # the time in the table is not that of the whole run


def test_a_stop_during_set_up_trains_nothing_and_says_so(folder: Path) -> None:
    recipe, log = _recipe(folder, "early"), folder / "early.log"
    assert run_child(_stopped("chain", "set_up", 1, recipe), log) == 75
    assert _steps(folder / "early") == [] and "nothing is saved yet" in tail(log)


def test_a_stop_in_the_last_save_of_a_stage_does_not_begin_the_next(folder: Path) -> None:
    first, log = _recipe(folder, "last"), folder / "last.log"
    second = _recipe(folder, "next", init_from=str(folder / "last" / "final"))
    assert run_child(_stopped("loop", "save", 2, first, second), log) == 75
    assert (folder / "last" / "final").exists() and not (folder / "next").exists()


def test_a_reader_that_goes_away_does_not_end_the_run(folder: Path) -> None:
    """`launch/run.py … | head`: the pipe breaks at the first line nobody reads."""
    recipe = _recipe(folder, "unread")

    def work() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        train(recipe)()

    assert run_child(work, folder / "unread.log") == 0
    assert _steps(folder / "unread") == ["step-000005", "step-000010"]


def test_the_exit_code_is_right_when_nobody_reads_the_message() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = (
        "from cheaptrain.errors import StoppedError\nfrom cheaptrain.exits import guarded\n"
        "def stop():\n    print('a line that stays in the buffer', end='')\n    raise StoppedError('SIGHUP: stopped')\n"
        "guarded(stop)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": ""}
    process = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=writer, env=environment, check=False)
    os.close(writer)
    assert process.returncode == 75


def _wait_under(signals: list[tuple[float, int]], ignored: int | None = None) -> Callable[[], None]:
    """Work for a child: send itself signals after so many seconds each, then write what was asked for."""

    def work() -> None:
        if ignored is not None:
            signal.signal(ignored, signal.SIG_IGN)
        with stop_on_signals() as stop:
            for seconds, number in signals:
                time.sleep(seconds)
                os.kill(os.getpid(), number)
            print(f"asked by {stop.name}", flush=True)

    return work


@pytest.mark.parametrize(
    "signals, code",
    [
        ([(0, signal.SIGTERM)], 0),
        ([(0, signal.SIGINT), (0, signal.SIGTERM)], 0),  # a launcher passes it on: the same request
        ([(0, signal.SIGHUP), (2 * ECHO_SECONDS, signal.SIGHUP)], 0),  # the kernel's and the shell's
        ([(0, signal.SIGTERM), (2 * ECHO_SECONDS, signal.SIGTERM)], 128 + signal.SIGTERM),
        ([(0, signal.SIGHUP), (2 * ECHO_SECONDS, signal.SIGINT)], 128 + signal.SIGINT),
    ],
)
def test_one_request_delivered_twice_is_one_and_a_second_request_ends_at_once(
    tmp_path: Path, signals: list[tuple[float, int]], code: int
) -> None:
    assert run_child(_wait_under(signals), tmp_path / "log") == code, tail(tmp_path / "log")
    if code == 0:
        assert f"asked by {signal.Signals(signals[0][1]).name}" in tail(tmp_path / "log")


def test_a_run_under_nohup_outlives_the_terminal(tmp_path: Path) -> None:
    assert run_child(_wait_under([(0, signal.SIGHUP)], ignored=signal.SIGHUP), tmp_path / "log") == 0
    assert "asked by None" in tail(tmp_path / "log")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process that its parent died")
def test_a_killed_launcher_leaves_no_process_training_unseen(tmp_path: Path) -> None:
    told, ready = tmp_path / "told", tmp_path / "ready"
    child = (
        "import pathlib, time\nfrom cheaptrain.train.signals import stop_on_signals\n"
        f"with stop_on_signals() as stop:\n    pathlib.Path({str(ready)!r}).touch()\n"
        "    for _ in range(1000):\n        time.sleep(0.01)\n        if stop:\n            break\n"
        f"    pathlib.Path({str(told)!r}).write_text(str(stop.name))\n"
    )
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", launcher, "accelerate", "launch"], env=environment)
    _await(ready.exists)
    process.kill()
    process.wait()
    _await(lambda: told.exists() and bool(told.read_text()))
    assert told.read_text() == "SIGTERM"


def test_a_signal_in_validation_loses_nothing(folder: Path) -> None:
    recipe, log = _recipe(folder, "validating"), folder / "validating.log"
    pid = in_child(_stopped("loop", "validate", 1, recipe), log)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, tail(log)
    assert run_child(train(recipe), log) == 0, tail(log)
    losses = [r["step"] for r in read_lines(folder / "validating" / "metrics.jsonl") if "train/loss" in r]
    assert losses == list(range(1, 11))
    assert json.loads((folder / "validating" / "final" / "manifest.json").read_text())["step"] == 10


def _await(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
