"""Killed at any moment, in saving too, a run goes on as if nothing had happened: bit for bit, row for row."""

import os
import random
import signal
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from small_runs import (
    final_state,
    final_weights,
    in_child,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train_with_spy,
    write_recipe,
    write_texts,
)

from cheaptrain.recipe.load import load_recipe
from cheaptrain.train.survey import survey


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, prepared data, and one run that was never disturbed."""
    path = tmp_path_factory.mktemp("runs")
    write_texts(path)
    recipe = write_recipe(path / "straight.toml", recipe_table(path, "straight"))
    prepare(recipe)
    assert run_child(train_with_spy([recipe], path / "straight.spy"), path / "straight.log") == 0, tail(
        path / "straight.log"
    )
    return path


STEPS = 60


def _same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("wanted", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kill_at_random_moments_then_resume_is_bitwise_the_run_never_stopped(folder: Path, wanted: int) -> None:
    straight = [record["rows"] for record in read_lines(folder / "straight.spy")]
    place = {tuple(rows): step for step, rows in enumerate(straight)}
    assert len(place) == STEPS
    moments = random.Random(2)
    kills = 0
    for number in range(wanted):
        name = f"killed-{wanted}-{number}"
        recipe = write_recipe(folder / f"{name}.toml", recipe_table(folder, name))
        spy, log = folder / f"{name}.spy", folder / f"{name}.log"
        code = -9
        while code == -9:
            code = run_child(
                train_with_spy([recipe], spy), log, kill_after=moments.uniform(0.1, 1.5) if kills < wanted else None
            )
            kills += code == -9
        assert code == 0, tail(log)

        assert _same(final_weights(folder / name), final_weights(folder / "straight"))
        assert _same(final_state(folder / name), final_state(folder / "straight"))
        steps = [place[tuple(record["rows"])] for record in read_lines(spy)]  # KeyError: a batch of its own
        # After a kill a run goes back to a checkpoint, never forward, and misses nothing.
        assert all(later <= earlier + 1 for earlier, later in pairwise(steps))
        assert set(steps) == set(range(STEPS))
        assert _losses(folder / name) == _losses(folder / "straight")
        if kills == wanted:
            break
    assert kills == wanted


def _losses(run: Path) -> list[float]:
    losses = [record["train/loss"] for record in read_lines(run / "metrics.jsonl") if "train/loss" in record]
    assert len(losses) == STEPS
    return losses


def test_resume_reads_the_next_batches_of_the_run_never_stopped(folder: Path) -> None:
    table = recipe_table(folder, "cut")
    table["checkpoint"]["keep_last"] = 20
    recipe = write_recipe(folder / "cut.toml", table)
    run_child(train_with_spy([recipe], folder / "cut.spy"), folder / "cut.log")
    for step in range(5, STEPS + 1, 5):
        for path in (folder / "cut" / "checkpoints").glob(f"step-{step:06d}"):
            if step > 30:
                path.rename(path.with_name(f".away-{step}"))
    (folder / "cut" / "final").unlink()
    (folder / "cut.spy").unlink()
    assert run_child(train_with_spy([recipe], folder / "cut.spy"), folder / "cut.log") == 0, tail(folder / "cut.log")
    again = read_lines(folder / "cut.spy")
    assert again == read_lines(folder / "straight.spy")[30:]
    assert _same(final_weights(folder / "cut"), final_weights(folder / "straight"))


def test_every_row_is_read_once_an_epoch_with_a_resume_in_it(folder: Path) -> None:
    table = recipe_table(folder, "epochs")
    table["data"]["sources"][0]["weight"] = 1
    table["data"]["sources"][1]["weight"] = 0
    del table["train"]["steps"]
    table["train"] |= {"epochs": 2.0}
    recipe = write_recipe(folder / "epochs.toml", table)
    facts = survey(load_recipe(recipe), 1)
    rows, steps = facts.sources["prose"].rows(64), facts.resolved.steps
    assert steps == 2 * rows // 4
    spy = folder / "epochs.spy"
    # Killed by what it has done, not by the clock, so that a faster machine does not finish first.
    pid, deadline = in_child(train_with_spy([recipe], spy), folder / "epochs.log"), time.monotonic() + 60
    while not (folder / "epochs" / "checkpoints" / "step-000010").exists():
        assert time.monotonic() < deadline, tail(folder / "epochs.log")
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -9
    assert run_child(train_with_spy([recipe], spy), folder / "epochs.log") == 0, tail(folder / "epochs.log")
    order = [record["rows"] for record in read_lines(spy)]
    # Steps done again after the kill are the same batches: keep each once, in order.
    seen: list[tuple[str, ...]] = []
    for batch in map(tuple, order):
        if batch not in seen:
            seen.append(batch)
    assert len(seen) == steps
    counts = Counter(row for batch in seen for row in batch)
    assert sum(counts.values()) == steps * 4
    assert len(counts) == rows
    assert set(counts.values()) <= {1, 2}
    assert sum(count == 2 for count in counts.values()) == steps * 4 - rows


def test_tokens_seen_is_what_a_spy_counted(folder: Path) -> None:
    counted = sum(record["tokens"] for record in read_lines(folder / "straight.spy"))
    records = read_lines(folder / "straight" / "metrics.jsonl")
    seen = [record["train/tokens"] for record in records if "train/loss" in record]
    assert counted == seen[-1] == STEPS * 256
    assert seen == [256 * (step + 1) for step in range(STEPS)]
    last = next(record for record in reversed(records) if "train/loss" in record)
    assert last["data/prose/tokens"] + last["data/notes/tokens"] == counted
    assert abs(last["data/prose/tokens"] - counted * 2 / 3) <= 2 * 64
