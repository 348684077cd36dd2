"""One process of several is killed (-9), in whatever it was doing: the others end, and any number of them goes on."""

import importlib
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import (
    final_weights,
    ledger_of,
    note_rows,
    on_call,
    prepare,
    read_lines,
    recipe_table,
    rows_of_steps,
    tail,
    train_together,
    write_recipe,
    write_texts,
)

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import verify_checkpoint

STEPS, ROWS = 24, 12
LOSS, WEIGHT = 5e-6, 1e-4  # as in test_elastic_runs.py


@dataclass(frozen=True)
class Moment:
    """Where a process dies: in a call of a function, counted from the start of its session."""

    name: str
    module: str
    function: str
    calls: tuple[int, int] = (1, 1)  # of which one is drawn
    main_only: bool = False


# In this order: each begins where the one before it left the run.
MOMENTS = [
    Moment("set-up", "train.setup", "build_model"),
    Moment("validation before the first step", "train.validate", "_score", (1, 2)),
    Moment("the first step", "train.step", "last_micro_batch", (2, 2)),
    Moment("the first save, its tensors written", "checkpoint.write", "compare_weights"),
    Moment("between rename and pruning", "checkpoint.saver", "prune", (1, 2), True),
    Moment("a log line", "checkpoint.jsonl.JsonLines", "append", (3, 6), True),
    Moment("reading the checkpoint", "checkpoint.load", "read_tensors", (1, 2)),
    Moment("before the optimizer", "train.step", "set_learning_rate", (1, 3)),
    Moment("deleting an old checkpoint", "checkpoint.retention", "shutil.rmtree", (1, 1), True),
    Moment("committing", "checkpoint.write", "write_json", (1, 3), True),
    Moment("validation", "train.validate", "_score", (1, 3)),
    Moment("the last checkpoint stands, its link does not", "checkpoint.saver", "finish", (1, 1), True),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, prepared data, and one run of one process that was never disturbed."""
    path = tmp_path_factory.mktemp("killed")
    write_texts(path)
    recipe = write_recipe(path / "straight.toml", _table(path, "straight"))
    prepare(recipe)
    log = path / "straight.log"
    assert train_together(1, [recipe], log, lambda rank: note_rows(path / "straight.rows")) == {0: 0}, tail(log)
    return path


def _table(folder: Path, run: str) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": STEPS, "global_batch_tokens": ROWS * 64, "micro_batch_size": 3}
    table["checkpoint"] = {"every": "2 steps", "keep_last": 2}
    table["validation"] = {"every": "2 steps", "tokens": 256}
    return table


def _die_in(moment: Moment, call: int) -> None:
    """In this process, die at that call of it."""
    module, _, attribute = f"cheaptrain.{moment.module}.{moment.function}".rpartition(".")
    try:
        where: Any = importlib.import_module(module)
    except ModuleNotFoundError:  # a class, or a module that others use as well
        outer, _, inner = module.rpartition(".")
        where = getattr(importlib.import_module(outer), inner)
        if not isinstance(where, type):
            where = SimpleNamespace(**vars(where))
            setattr(importlib.import_module(outer), inner, where)
    on_call(where, attribute, call, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _newest(run: RunDirectory) -> int:
    """The step of the newest whole checkpoint, 0 without one."""
    return max((int(path.name[5:]) for path in run.steps() if not verify_checkpoint(path)), default=0)


def _whole_steps(notes: Path, processes: int) -> dict[int, list[list[int]]]:
    """The rows of the steps that every process of a session began."""
    lines = read_lines(notes) if notes.exists() else []
    begun = Counter(note["step"] for note in lines)
    kept = notes.with_suffix(".whole")
    whole = [note for note in lines if begun[note["step"]] == processes]
    kept.write_text("".join(f"{json.dumps(note)}\n" for note in whole), encoding="utf-8")
    return rows_of_steps(kept)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in (12, *range(8))])
def test_a_killed_process_leaves_the_others_hanging_or_a_run_that_cannot_go_on(folder: Path, seed: int) -> None:
    draw, run = random.Random(seed), RunDirectory(folder / f"run-{seed}")
    recipe = write_recipe(folder / f"run-{seed}.toml", _table(folder, run.path.name))
    straight = rows_of_steps(folder / "straight.rows")
    size = 0
    for number, moment in enumerate(MOMENTS):
        size = draw.choice([n for n in (1, 2, 2, 3, 3, 4) if n != size and (n > 1 or moment.main_only)])
        rank = 0 if moment.main_only else draw.randrange(size)
        call = draw.randint(*moment.calls)
        stood = _newest(run)
        notes, log = folder / f"{seed}-{number}.rows", folder / f"{seed}-{number}.log"
        ended = train_together(size, [recipe, *_settings(size)], log, _before(notes, rank, moment, call))
        what = f"{moment.name} ({call}) on rank {rank} of {size}: {ended}\n{tail(log)}"
        assert ended.pop(rank) == -signal.SIGKILL, what
        assert all(isinstance(code, int) and code not in (0, 75) for code in ended.values()), what
        steps = _whole_steps(notes, size)
        assert not steps or min(steps) == stood + 1, what  # it went on from the newest whole one
        assert all(rows == straight[step] for step, rows in steps.items()), what
        # Nor is it lost: a save is begun every other step, and at most one is under way.
        assert _newest(run) >= max([stood, *((step - 1) // 2 * 2 - 2 for step in steps)]), what
    assert _newest(run) == STEPS and not run.final.exists()
    log = folder / f"{seed}-last.log"
    assert train_together(2, [recipe], log) == {0: 0, 1: 0}, tail(log)
    assert "which a killed process had left undone" in tail(log)
    _compare(run.path, folder / "straight")
    assert run.leftovers() == []


def _settings(size: int) -> list[str]:
    return ["train.micro_batch_size=2"] if size == 3 else []


def _before(notes: Path, rank: int, moment: Moment, call: int) -> Callable[[int], None]:
    def before(own: int) -> None:
        note_rows(notes)
        if own == rank:
            _die_in(moment, call)

    return before


def _compare(ours: Path, theirs: Path) -> None:
    for name in ("train/loss", "val/loss"):
        records = [read_lines(run / "metrics.jsonl") for run in (ours, theirs)]
        values = [[(record["step"], record[name]) for record in of if name in record] for of in records]
        assert [step for step, _ in values[0]] == [step for step, _ in values[1]], name  # each once, in order
        assert max(abs(a - b) / b for (_, a), (_, b) in zip(*values, strict=True)) <= LOSS, name
    for count in ("step", "rows_seen", "tokens_seen", "supervised_tokens", "source_tokens"):
        assert ledger_of(ours / "final")[count] == ledger_of(theirs / "final")[count], count
    wanted = final_weights(theirs)
    for name, weight in final_weights(ours).items():
        assert (weight - wanted[name]).abs().max() <= WEIGHT * wanted[name].abs().max(), name
