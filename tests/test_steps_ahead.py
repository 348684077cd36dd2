"""Handing a step over before the last one's figures are read must show nowhere but on the clock.

On a GPU that is how training runs. Here the CPU does each step at once, and the loop all the same takes up what it was
one step later.
"""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_runs import (
    final_weights,
    ledger_of,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train,
    write_recipe,
    write_texts,
)

from cheaptrain.train import chain, loop

CLOCKS = ("seconds", "per_second", "per_gpu", "system/memory", "mfu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ahead")
    write_texts(folder)
    prepare(write_recipe(folder / "recipe.toml", _table(folder, "run")))
    return folder


def _table(folder: Path, run: str, **train_keys: Any) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": 24, **train_keys}
    table["validation"] |= {"every": "7 steps"}
    table["samples"] = {"prompts": ["the river"], "max_new_tokens": 4, "every": "9 steps"}
    return table


def _trained(folder: Path, name: str, ahead: int, before: Callable[[], None] = lambda: None, **keys: Any) -> int:
    """Train a recipe with `ahead` steps handed over early; the exit code of the child."""
    path = write_recipe(folder / f"{name}.toml", _table(folder, name, **keys))

    def work() -> None:
        plain = chain.train

        def set_ahead(stage: Any) -> None:
            stage.steps_ahead = ahead
            plain(stage)

        chain.train = set_ahead
        before()
        train(path)()

    return run_child(work, folder / f"{name}.log")


def _records(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith("checkpoint/") and not key.endswith(CLOCKS)}
        for file in ("metrics.jsonl", "samples.jsonl")
        for record in read_lines(run / file)
        if "checkpoint/step" not in record
    ]


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Iterator[Path]:
    assert _trained(folder, "at-once", 0) == 0, tail(folder / "at-once.log")
    yield folder / "at-once"


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_reading_figures_late_changes_a_record_or_a_weight(folder: Path, undisturbed: Path, optimizer: str) -> None:
    plain = undisturbed
    if optimizer == "muon":
        assert _trained(folder, "at-once-muon", 0, optimizer=optimizer) == 0
        plain = folder / "at-once-muon"
    late = folder / f"late-{optimizer}"
    assert _trained(folder, late.name, 1, optimizer=optimizer) == 0, tail(folder / f"{late.name}.log")
    assert _records(late) == _records(plain)
    assert _same(final_weights(late), final_weights(plain))


@pytest.mark.parametrize("at", [13, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 23))])
def test_a_stop_loses_the_step_that_was_handed_over_already(folder: Path, undisturbed: Path, at: int) -> None:
    name = f"stopped-{at}"

    def stop_in_step() -> None:
        plain = loop._step

        def stopping(stage: Any, batches: Any, number: int, factor: float) -> Any:
            if number == at:
                os.kill(os.getpid(), signal.SIGTERM)
            return plain(stage, batches, number, factor)

        loop._step = stopping

    ended = _trained(folder, name, 1, stop_in_step)
    run = folder / name
    if at < 23:  # step 24 was under way when that of step 23 was heard of, and with it all is done
        assert ended == 75, tail(folder / f"{name}.log")
        newest = max(run.glob("checkpoints/step-*"))
        done = ledger_of(newest)["step"]
        assert done == at + (at > 1)  # the first is waited for
        assert ledger_of(newest)["rows_seen"] == 4 * done
        ended = _trained(folder, name, 1)
    assert ended == 0, tail(folder / f"{name}.log")
    assert _same(final_weights(run), final_weights(undisturbed))
    assert _records(run) == _records(undisturbed)


def _broken_at(*steps: int) -> Callable[[], None]:
    """The first micro-batch of these steps has a loss that is not a number."""

    def put() -> None:
        plain = loop._step

        def breaking(stage: Any, batches: Any, number: int, factor: float) -> Any:
            objective = stage.objective

            def broken(*arguments: Any) -> Any:
                sums = objective(*arguments)
                return sums._replace(loss=sums.loss * float("nan"))

            stage.objective = broken if number in steps else objective
            try:
                return plain(stage, batches, number, factor)
            finally:
                stage.objective = objective

        loop._step = breaking

    return put


def test_a_step_that_is_not_finite_is_skipped_like_any_other_way(folder: Path) -> None:
    for name, ahead in (("skip-at-once", 0), ("skip-late", 1)):
        code = _trained(folder, name, ahead, _broken_at(4, 5, 12, 24), on_nonfinite="skip")
        assert code == 0, tail(folder / f"{name}.log")
    plain, late = folder / "skip-at-once", folder / "skip-late"
    assert _same(final_weights(plain), final_weights(late))
    skipped = [record.get("train/skipped_steps") for record in _records(late) if "train/loss" in record]
    assert skipped == [record.get("train/skipped_steps") for record in _records(plain) if "train/loss" in record]
    assert skipped[2:5] == [None, 1, 2] and skipped[-1] == 4


def test_divergence_is_entered_under_another_step_or_saved(folder: Path) -> None:
    assert _trained(folder, "diverged", 1, _broken_at(11)) == 4
    assert "step 11: loss nan" in tail(folder / "diverged.log")
    run = folder / "diverged"
    assert [r["step"] for r in read_lines(run / "metrics.jsonl") if "train/loss" in r] == list(range(1, 12))
    assert max(int(path.name[5:]) for path in run.glob("checkpoints/step-*")) == 10


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_step_is_timed_without_what_the_device_did_while_records_were_written(folder: Path, ahead: int) -> None:
    """A device that takes 4 seconds a step, and a host that takes 1 to hand one over and 2 for the records of one."""
    host, device = 0.0, 0.0

    class Late:
        def __init__(self, started: Any, done: float) -> None:
            self.started, self.done = started, done

        def result(self) -> Any:
            nonlocal host
            host = max(host, self.done)
            return self.started.result()

    def slow() -> None:
        plain = loop._step

        def stepping(*arguments: Any) -> Any:
            nonlocal host, device
            device = max(device, host) + 4.0
            host += 1.0
            return Late(plain(*arguments), device)

        def writing(stage: Any) -> None:
            nonlocal host
            host += 2.0

        loop._step, loop.poll_save = stepping, writing
        loop.time = SimpleNamespace(perf_counter=lambda: host)

    name = f"timed-{ahead}"
    assert _trained(folder, name, ahead, slow, steps=6) == 0, tail(folder / f"{name}.log")
    seconds = [r["train/step_seconds"] for r in read_lines(folder / name / "metrics.jsonl") if "train/loss" in r]
    assert seconds == [4.0] * 6
