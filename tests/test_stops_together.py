"""Asked to stop, or met by a loss that is no number: all processes do the same after the same step, whoever it hit."""

import hashlib
import json
import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    at_step,
    final_weights,
    ledger_of,
    on_call,
    prepare,
    read_lines,
    recipe_table,
    signal_at_step,
    tail,
    train_together,
    write_recipe,
    write_texts,
)

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import verify_checkpoint
from cheaptrain.parallel.root import Root
from cheaptrain.train.objective import OBJECTIVES, Sums
from cheaptrain.train.signals import ECHO_SECONDS, SIGNALS

Before = Callable[[int], None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stops")
    write_texts(path)
    prepare(write_recipe(path / "prepare.toml", recipe_table(path, "prepare")))
    return path


class Launches:
    """One run of two processes, started as often as it takes; steps of 4 rows, a checkpoint of every fourth step."""

    def __init__(self, folder: Path, name: str, steps: int = 9, **train: Any) -> None:
        table = recipe_table(folder, name)
        table["train"] |= {"steps": steps, "micro_batch_size": 1, **train}
        table["checkpoint"] = {"every": "4 steps", "keep_last": 20}
        table["validation"] = {"every": "4 steps", "tokens": 256}
        table["samples"] = {"every": "4 steps", "prompts": ["the river"], "max_new_tokens": 1}
        self.recipe = write_recipe(folder / f"{name}.toml", table)
        self.run, self.log, self.steps = RunDirectory(folder / name), folder / f"{name}.log", steps

    def start(self, before: Before = lambda rank: None, *settings: str) -> dict[int, int | str]:
        """How each process ended; its output alone is in the log."""
        self.log.unlink(missing_ok=True)
        return train_together(2, [self.recipe, *settings], self.log, before)

    def stopped(self, before: Before, *settings: str) -> list[int]:
        """Start, to be stopped; the steps whose checkpoints stand then, all of them whole."""
        assert self.start(before, *settings) == {0: 75, 1: 75}, self.said
        return self.whole()

    def ends(self, before: Before = lambda rank: None) -> None:
        """Start, to go on to the end; then every step and every validation is in the records once, in order."""
        assert self.start(before) == {0: 0, 1: 0}, self.said
        assert self.logged("train/loss") == list(range(1, self.steps + 1))
        assert self.logged("val/loss") == [0, 4, 8, 9]
        assert [record["step"] for record in read_lines(self.run.samples)] == [0, 4, 8, 9]

    def whole(self) -> list[int]:
        """The steps whose checkpoints stand, every hash in them checked."""
        for path in self.run.steps():
            assert verify_checkpoint(path) == []
        return [int(path.name[5:]) for path in self.run.steps()]

    def logged(self, name: str) -> list[int]:
        """The steps that have this metric."""
        return [record["step"] for record in read_lines(self.run.metrics) if name in record]

    @property
    def said(self) -> str:
        return tail(self.log)


def _on(rank: int, put: Callable[[], None]) -> Before:
    """Put something in place in the process of this rank only."""
    return lambda own: put() if own == rank else None


def _ask(number: int = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


def test_a_signal_to_one_of_two_stops_only_that_one_or_at_another_step(folder: Path) -> None:
    run = Launches(folder, "signals")
    for step, (rank, number) in enumerate(((rank, number) for rank in (1, 0) for number in SIGNALS), 1):
        stood = run.whole()
        assert run.stopped(_on(rank, partial(signal_at_step, step, number))) == [*stood, step]
        name = signal.Signals(number).name
        assert f"stopped {name} on rank {rank}: stopped after step {step}; checkpoint {run.run.step(step)}" in run.said
        assert run.logged("train/loss") == list(range(1, step + 1))
    run.ends()


def test_a_signal_in_the_middle_of_validation_is_heard_at_its_end(folder: Path) -> None:
    from cheaptrain.train import validate

    run = Launches(folder, "validating")
    # Four batches before the first step, then as many after the fourth.
    assert run.stopped(_on(1, lambda: on_call(validate, "_score", 2, _ask))) == []
    assert "stopped after step 0; nothing is saved yet" in run.said and "validation loss" not in run.said
    assert run.stopped(_on(1, lambda: on_call(validate, "_score", 6, _ask))) == [4]
    assert "step 0: validation loss" in run.said and "step 4: validation loss" not in run.said  # it was broken off
    run.ends()


@pytest.mark.slow
def test_a_signal_in_the_last_step_costs_the_last_validation(folder: Path) -> None:
    run = Launches(folder, "last")
    run.ends(_on(1, partial(signal_at_step, run.steps)))
    assert run.whole()[-1] == run.steps and run.run.final.exists()


def test_a_signal_while_a_checkpoint_is_written_costs_it(folder: Path) -> None:
    from cheaptrain.checkpoint import write

    run = Launches(folder, "saving")
    steps = run.stopped(_on(1, lambda: on_call(write, "write_weights", 1, _ask)))
    assert steps[0] == 4 and len(steps) <= 2  # written in the background: a step may have been done meanwhile
    run.ends()


def test_the_clocks_of_two_processes_stop_them_at_different_steps(folder: Path) -> None:
    run = Launches(folder, "time")

    def late(rank: int) -> None:
        def forward(stage: Any) -> None:
            stage.stop._started -= 3600

        at_step(3 if rank == 1 else 5, forward)  # rank 1's clock is ahead: only that of rank 0 counts

    assert run.stopped(late, "run.max_time=3600") == [4, 5]
    assert "stopped run.max_time: stopped after step 5" in run.said
    run.ends()


def test_a_second_signal_waits_for_the_checkpoint_or_harms_an_older_one(folder: Path) -> None:
    from cheaptrain.checkpoint import write

    run = Launches(folder, "twice")

    def twice(rank: int) -> None:
        def again() -> None:
            time.sleep(1.2 * ECHO_SECONDS)
            _ask()
            time.sleep(60)

        signal_at_step(6)
        on_call(write, "_write_parts", 2, again)  # the save of step 4 was the first

    left = 128 + signal.SIGTERM
    assert run.start(twice) == {0: left, 1: left}, run.said
    assert run.whole() == [4] and len(run.run.leftovers()) == 1
    run.ends()
    assert run.run.leftovers() == [] and run.whole() == [4, 8, 9]


# --- a loss, or a gradient, that is no number ---


def _spoil(spoiled: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    """In this process, change the loss of the last micro-batch of the steps given, by what is given."""
    from cheaptrain.train import setup

    plain, batches = OBJECTIVES["next_token"], [0]

    def spied(*arguments: Any) -> Sums:
        batches[0] += 1
        sums, step, last = plain(*arguments), (batches[0] + 1) // 2, batches[0] % 2 == 0
        return Sums(spoiled[step](sums.loss), sums.correct) if last and step in spoiled else sums

    setup.OBJECTIVES = {"next_token": spied}


def _not_a_number(loss: torch.Tensor) -> torch.Tensor:
    return loss * float("nan")


def _infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    """The same loss, whose gradient is infinite: the root of 0."""
    return loss + (loss - loss.detach()).sqrt()


def _note_weights(file: Path) -> None:
    """In this process, write a hash of the weights and moments that lie here before and after each step."""
    from cheaptrain.train import loop

    plain = loop.train_step

    def spied(root: Root, optimizers: Any, *arguments: Any, **rest: Any) -> Any:
        before = _here(root, optimizers)
        result = plain(root, optimizers, *arguments, **rest)
        with file.open("a", encoding="utf-8") as notes:
            notes.write(json.dumps({"before": before, "after": _here(root, optimizers)}) + "\n")
        return result

    loop.train_step = spied


def _here(root: Root, optimizers: Any) -> str:
    digest = hashlib.sha256()
    tensors = [*root.parameters()]
    tensors += [state[key] for o in optimizers for state in o.state.values() for key in sorted(state)]
    for tensor in tensors:
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        digest.update(local.detach().numpy().tobytes())
    return digest.hexdigest()


def _spoiled_on(rank: int, folder: Path, spoiled: dict[int, Callable[[torch.Tensor], torch.Tensor]]) -> Before:
    def before(own: int) -> None:
        _note_weights(folder / f"weights-{own}")
        if own == rank:
            _spoil(spoiled)

    return before


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("spoil", [_not_a_number, _infinite_gradient])
def test_a_loss_that_is_no_number_on_one_process_reaches_the_weights_of_another(
    folder: Path, tmp_path: Path, rank: int, spoil: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    from cheaptrain.checkpoint import write

    run = Launches(folder, f"stop-{rank}-{spoil.__name__}")

    def before(own: int) -> None:
        _spoiled_on(rank, tmp_path, {6: spoil})(own)
        on_call(write, "_commit", 1, lambda: time.sleep(0.5))  # the save of step 4 is still under way then

    assert run.start(before) == {0: 4, 1: 4}, run.said
    for own in (0, 1):
        steps = read_lines(tmp_path / f"weights-{own}")
        assert len(steps) == 6 and [step["before"] == step["after"] for step in steps] == [False] * 5 + [True]
    assert "step 6: loss" in run.said and "the weights were not touched" in run.said
    assert run.whole() == [4] and run.logged("train/loss") == list(range(1, 7))


def test_a_skipped_step_is_counted_once_by_each_or_drives_the_copies_apart(folder: Path, tmp_path: Path) -> None:
    run = Launches(folder, "skip", on_nonfinite="skip")
    before = _spoiled_on(1, tmp_path, {3: _not_a_number, 6: _infinite_gradient})
    copies = ("parallel.dp_replicate=2", "parallel.dp_shard=1")
    assert run.start(before, *copies) == {0: 0, 1: 0}, run.said
    first, second = (read_lines(tmp_path / f"weights-{own}") for own in (0, 1))
    assert first == second  # each holds the whole model
    untouched = [step["before"] == step["after"] for step in first]
    assert untouched == [number in (3, 6) for number in range(1, run.steps + 1)]
    assert ledger_of(run.run.final)["skipped_steps"] == 2
    counted = [record.get("train/skipped_steps", 0) for record in read_lines(run.run.metrics) if "train/loss" in record]
    assert counted == [0, 0, 1, 1, 1, 2, 2, 2, 2]
    assert all(torch.isfinite(weight).all() for weight in final_weights(run.run.path).values())
