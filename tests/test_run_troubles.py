"""Troubles beside the training itself, which must not end it, and numbers that would not be true."""

import errno
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from small_runs import prepare, read_lines, recipe_table, run_child, tail, train, write_recipe, write_texts

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.hardware import find_gpu
from cheaptrain.train.metrics import Metrics
from cheaptrain.train.validate import Score, validation_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("troubles")
    write_texts(path)
    prepare(write_recipe(path / "prepare.toml", _table(path, "prepare")))
    return path


def _table(folder: Path, run: str) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": 10}
    return table


def test_validation_on_no_tokens_reports_no_loss_of_zero(folder: Path) -> None:
    table = _table(folder, "unscored")
    table["validation"] = {"tokens": 0}
    log = folder / "unscored.log"
    assert run_child(train(write_recipe(folder / "unscored.toml", table)), log) == 0, tail(log)
    assert not any(key.startswith("val/") for r in read_lines(folder / "unscored" / "metrics.jsonl") for key in r)
    assert "validation loss" not in tail(log).split("What was trained")[0]


def test_sources_without_text_have_no_bits_per_byte_of_zero() -> None:
    metrics = validation_metrics({"ids": Score(30.0, 10, 0.0, 0), "none": Score(0.0, 0, 0.0, 0)})
    assert metrics == {"val/loss": 3.0, "val/ids/loss": 3.0}
    text = validation_metrics({"text": Score(30.0, 10, 20.0, 40)})
    assert math.isclose(text["val/bpb"], 20 / math.log(2) / 40)


def test_damaged_metrics_of_a_finished_run_do_not_end_the_launch(folder: Path) -> None:
    recipe, log = write_recipe(folder / "damaged.toml", _table(folder, "damaged")), folder / "damaged.log"
    assert run_child(train(recipe), log) == 0, tail(log)
    with (folder / "damaged" / "metrics.jsonl").open("ab") as file:
        file.write(b"\0\0\0\xff\n")
    assert run_child(train(recipe), log) == 0, tail(log)
    assert "done already" in tail(log) and "1 broken line left out" in tail(log)


@pytest.mark.parametrize("stopped", [False, True])
def test_metrics_that_the_disk_does_not_take_for_a_while_cost_no_training(folder: Path, stopped: bool) -> None:
    name = f"full-{stopped}"
    recipe, log = write_recipe(folder / f"{name}.toml", _table(folder, name)), folder / f"{name}.log"

    def work() -> None:
        plain, calls = JsonLines._flush, [0]

        def flush(self: JsonLines) -> OSError | None:
            calls[0] += 1
            if calls[0] == 8 and stopped:
                os.kill(os.getpid(), signal.SIGTERM)
            if calls[0] > 3 and (stopped or calls[0] < 10):  # stopped: full to the end
                return OSError(errno.ENOSPC, "No space left on device")
            return plain(self)

        JsonLines._flush = flush  # type: ignore[method-assign]
        train(recipe)()

    assert run_child(work, log) == (75 if stopped else 0), tail(log)  # not the exit code of the lines lost
    assert "No space left on device" in tail(log)
    if not stopped:
        steps = [r["step"] for r in read_lines(folder / name / "metrics.jsonl") if "train/loss" in r]
        assert steps == list(range(1, 11))


def test_out_of_memory_names_the_settings_that_help(folder: Path) -> None:
    recipe, log = write_recipe(folder / "memory.toml", _table(folder, "memory")), folder / "memory.log"

    def work() -> None:
        from cheaptrain.train import loop

        def exhausted(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        loop.train_step = exhausted
        train(recipe)()

    assert run_child(work, log) == 1
    assert "train.micro_batch_size (now 2)" in tail(log) and "Traceback" not in tail(log)


def test_one_tracker_that_fails_does_not_silence_the_others(tmp_path: Path) -> None:
    class Tracker:
        def __init__(self, name: str, fails: bool) -> None:
            self.name, self.fails, self.logged, self.finished = name, fails, list[int](), False

        def log(self, values: dict[str, Any], step: int) -> None:
            if self.fails:
                raise ConnectionError("gone")
            self.logged.append(step)

        def finish(self) -> None:
            self.finished = True

    accelerator, trackers = Accelerator(cpu=True), [Tracker("a", True), Tracker("b", False)]
    accelerator.trackers = trackers  # type: ignore[assignment]
    metrics = Metrics(JsonLines(tmp_path / "metrics.jsonl", None), accelerator)
    with pytest.warns(UserWarning, match="a switched off: ConnectionError: gone") as warned:
        for step in (1, 2):
            metrics.write(step, {"train/loss": 1.0})
    metrics.close()
    assert len(warned) == 1 and trackers[1].logged == [1, 2] and all(tracker.finished for tracker in trackers)
    assert [record["step"] for record in read_lines(tmp_path / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L4", "L4"),
        # Other chips whose names begin alike: no MFU is better than one against a wrong peak.
        ("NVIDIA L40", None),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
    ],
)
def test_a_gpu_is_not_taken_for_another_with_a_longer_name(name: str, expected: str | None) -> None:
    found = find_gpu(name)
    assert (found.name if found else None) == expected
