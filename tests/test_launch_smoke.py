"""Whole runs through the real doors, as separate processes: what forked tests cannot see is in the launchers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_runs import ledger_of, prepare, read_lines, recipe_table, run_child, tail, write_recipe, write_texts

from cheaptrain import launching
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import verify_checkpoint

STEPS = 60
ROOT = Path(launching.__file__).resolve().parent.parent
CLI = [sys.executable, "-c", "from cheaptrain.cli import main; main()", "launch"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(launching.CONFIG)]
ACCELERATE += [
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
    "--main_process_port",
    "0",
    "--mixed_precision",
    "no",
    "--dynamo_backend",
    "no",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("launches")
    write_texts(path)
    table = recipe_table(path, "run")
    table["train"] |= {"steps": STEPS}
    table["checkpoint"] = {"every": "50 steps"}
    table["parallel"] = {"dp_shard": 2}
    prepare(write_recipe(path / "run.toml", table))
    return path


def _start(folder: Path, log: str, *command: str) -> "subprocess.Popen[bytes]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, sys.path)]),
        "ACCELERATE_USE_CPU": "true",
        "COLUMNS": "200",
    }
    output = (folder / log).open("wb")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=output)


@pytest.mark.slow
def test_a_stopped_launch_is_not_gone_on_with_by_the_other_door(folder: Path) -> None:
    run = RunDirectory(folder / "run")
    process, deadline = _start(folder, "first.log", *CLI, "run.toml"), time.monotonic() + 180
    while not (run.metrics.exists() and any("train/loss" in record for record in read_lines(run.metrics))):
        assert process.poll() is None and time.monotonic() < deadline, tail(folder / "first.log")
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75, tail(folder / "first.log")
    said = tail(folder / "first.log")
    assert "Traceback" not in said and said.count("stopped SIGTERM on rank") == 1, said
    (checkpoint,) = run.steps()
    stopped = int(checkpoint.name[5:])
    assert verify_checkpoint(checkpoint) == [] and 0 < stopped < STEPS

    assert _start(folder, "second.log", *ACCELERATE, str(launching.DOOR), "run.toml").wait(180) == 0, tail(
        folder / "second.log"
    )
    assert f"going on from {checkpoint}" in (folder / "second.log").read_text(encoding="utf-8")
    steps = [record["step"] for record in read_lines(run.metrics) if "train/loss" in record]
    assert steps == list(range(1, STEPS + 1))
    ledger = ledger_of(run.final)
    assert ledger["tokens_seen"] == STEPS * 256 and [entry["processes"] for entry in ledger["batches"]] == [2]
    assert json.loads((run.final / "manifest.json").read_text())["processes"] == 2
    assert run_child(lambda: _evaluate(run.final), folder / "lm_eval.log") == 0, tail(folder / "lm_eval.log")


def _evaluate(final: Path) -> None:
    """lm_eval takes the folder as it is, and it has learnt what its words are."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=str(final), device="cpu", batch_size=1)
    asked = [("prose 7: the river", text) for text in (" was", " zzqj")]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(asked)]
    (likely, _), (unlikely, _) = model.loglikelihood(requests, disable_tqdm=True)
    assert -20 < likely < 0 and likely > unlikely + 2, (likely, unlikely)


@pytest.mark.slow
def test_fewer_processes_than_the_recipe_says_train_as_something_else(folder: Path) -> None:
    doors = {
        "launch": [*CLI, "run.toml", "run.dir=other", "--processes", "1"],
        "run": [sys.executable, str(launching.DOOR), "run.toml", "run.dir=other"],
    }
    started = {name: _start(folder, f"{name}.log", *command) for name, command in doors.items()}
    for name, process in started.items():
        assert process.wait(180) == 2, tail(folder / f"{name}.log")
        said = " ".join(tail(folder / f"{name}.log").split())
        assert "dp_shard = 2" in said and "takes 2 processes, not 1: start 2" in said and "Traceback" not in said
    assert not (folder / "other").exists()
