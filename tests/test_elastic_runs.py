"""A run that is stopped and goes on with other processes, in another layout, is the run that was never stopped."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    final_weights,
    ledger_of,
    note_rows,
    prepare,
    read_lines,
    recipe_table,
    rows_of_steps,
    run_child,
    signal_at_step,
    tail,
    train_together,
    write_recipe,
    write_texts,
)
from transformers import AutoModelForCausalLM

ROW, ROWS, STEPS = 64, 12, 24
EVERY = 4  # steps between validations, and between checkpoints


@dataclass(frozen=True)
class Session:
    """One launch of the recipe: how many processes, which layout, and the step after which it is stopped."""

    processes: int
    last: int
    settings: tuple[str, ...] = ()
    rank: int = 0  # the one that gets the signal

    @property
    def layout(self) -> str:
        axes = [s.removeprefix("parallel.") for s in self.settings if s.startswith("parallel.")]
        return ", ".join(axes) or (f"dp_shard={self.processes}" if self.processes > 1 else "1 process")


CHAIN = [
    Session(1, 3),
    Session(2, 6, rank=1),
    Session(4, 8, ("train.micro_batch_size=3",), rank=3),
    Session(3, 11, ("train.micro_batch_size=2",), rank=1),
    Session(4, 14, ("parallel.dp_shard=2", "parallel.tp=2", "train.micro_batch_size=3"), rank=2),
    Session(4, 17, ("parallel.dp_replicate=2", "parallel.dp_shard=2")),
    Session(2, 21, ("parallel.cp=2", "train.micro_batch_size=4"), rank=1),
    Session(1, STEPS),
]
# Relative; the weights of a tensor to its largest. Measured: 1.5e-7 and 3e-7. One matrix whose momentum one of two
# processes has lost in the middle gives 3e-5 and 7e-2.
LOSS, WEIGHT = 5e-6, 1e-4


def _table(folder: Path, run: str) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": STEPS, "global_batch_tokens": ROWS * ROW, "micro_batch_size": 1}
    return table | {
        "validation": {"every": f"{EVERY} steps", "tokens": 256},
        "checkpoint": {"every": f"{EVERY} steps", "keep_last": 2},
        "samples": {"prompts": ["the river"], "max_new_tokens": 2, "every": f"{EVERY} steps"},
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, prepared data, and one run of one process that was never stopped."""
    path = tmp_path_factory.mktemp("elastic")
    write_texts(path, documents=400)
    recipe = write_recipe(path / "straight.toml", _table(path, "straight"))
    prepare(recipe)
    _train(path, recipe, Session(1, STEPS), path / "straight.rows")
    return path


def _train(folder: Path, recipe: str, session: Session, notes: Path | None = None, *, ends: bool = True) -> None:
    """Run one session; the last one ends by itself, each other one with a signal to one rank."""

    def before(rank: int) -> None:
        if notes is not None:
            note_rows(notes)
        _note_logits(Path(recipe).with_suffix(".logits"), rank)
        if not ends and rank == session.rank:
            signal_at_step(session.last)

    log = Path(recipe).with_suffix(".log")
    ended = train_together(session.processes, [recipe, *session.settings], log, before)
    assert ended == dict.fromkeys(range(session.processes), 0 if ends else 75), tail(log)


def _note_logits(file: Path, rank: int) -> None:
    """In this process, keep the ids and the live logits of the last proof."""
    from cheaptrain.train import save

    plain = save.live_logits

    def spied(root: Any, ids: torch.Tensor, *rest: Any) -> torch.Tensor:
        logits = plain(root, ids, *rest)
        if rank == 0:
            torch.save({"ids": ids, "logits": logits}, file)
        return logits

    save.live_logits = spied


def _values(run: Path, name: str) -> dict[int, float]:
    """A metric by step; a step that was written twice fails."""
    values: dict[int, float] = {}
    for record in read_lines(run / "metrics.jsonl"):
        if name in record:
            assert record["step"] not in values, f"{name} of step {record['step']} was written twice"
            values[record["step"]] = record[name]
    return values


def _apart(ours: dict[int, float], theirs: dict[int, float]) -> float:
    """The largest relative difference, over the same steps."""
    assert ours.keys() == theirs.keys()
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)


@pytest.mark.slow
def test_a_run_that_went_through_every_layout_is_another_run(folder: Path) -> None:
    # One test, because the runs are worth sharing and tests of one file are spread over workers.
    recipe = write_recipe(folder / "chain.toml", _table(folder, "chain"))
    for session in CHAIN:
        _train(folder, recipe, session, folder / "chain.rows", ends=session is CHAIN[-1])
    _rows_are_read_once(folder)
    _numbers_are_near(folder / "chain", folder / "straight")
    _ledger_is_the_same(folder / "chain", folder / "straight")
    _transformers_loads(folder / "chain", 0.0)


def _rows_are_read_once(folder: Path) -> None:
    straight, ours = rows_of_steps(folder / "straight.rows"), rows_of_steps(folder / "chain.rows")
    assert straight.keys() == set(range(1, STEPS + 1))
    for step, rows in straight.items():
        assert len(rows) == ROWS and all(len(row) == ROW for row in rows)
        assert ours.get(step) == rows, f"step {step}"
    assert ours.keys() == straight.keys()
    assert len({tuple(row) for rows in straight.values() for row in rows}) == STEPS * ROWS


def _numbers_are_near(chain: Path, straight: Path) -> None:
    assert _apart(_values(chain, "train/loss"), _values(straight, "train/loss")) <= LOSS
    assert len(_values(chain, "train/loss")) == STEPS
    assert _apart(_values(chain, "val/loss"), _values(straight, "val/loss")) <= LOSS
    assert set(_values(chain, "val/loss")) == {0, *range(EVERY, STEPS + 1, EVERY)}
    for name in ("train/learning_rate", "data/prose/tokens", "data/notes/tokens"):
        assert _values(chain, name) == _values(straight, name), name
    ours, theirs = final_weights(chain), final_weights(straight)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() <= WEIGHT * weight.abs().max(), name


def _ledger_is_the_same(chain: Path, straight: Path) -> None:
    ours, theirs = ledger_of(chain / "final"), ledger_of(straight / "final")
    for count in ("step", "rows_seen", "tokens_seen", "supervised_tokens", "source_tokens", "skipped_steps"):
        assert ours[count] == theirs[count], count
    assert ours["rows_seen"] == STEPS * ROWS and ours["tokens_seen"] == STEPS * ROWS * ROW
    assert sum(ours["source_tokens"].values()) == STEPS * ROWS * ROW
    firsts = [0, *(session.last for session in CHAIN)]
    assert ours["batches"] == [
        {
            "step": first,
            "tokens": first * ROWS * ROW,
            "global_batch_tokens": ROWS * ROW,
            "processes": session.processes,
            "layout": session.layout,
        }
        for first, session in zip(firsts, CHAIN, strict=False)
    ]


def _transformers_loads(run: Path, allowed: float) -> None:
    """The final folder gives the logits that the model had when it was saved."""
    log = run.with_suffix(".check")
    assert run_child(partial(_compare_logits, run, allowed), log) == 0, tail(log)  # this process computes nothing


def _compare_logits(run: Path, allowed: float) -> None:
    kept = torch.load(run.with_suffix(".logits"))
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(run / "final")(kept["ids"]).logits
    difference = (logits - kept["logits"]).abs().max().item()
    assert logits.shape == kept["logits"].shape and kept["ids"].shape == (1, ROW)
    assert difference <= allowed, difference


SAME = {
    "two": Session(2, 6, ("train.steps=10", "train.micro_batch_size=3"), rank=1),
    "tp": Session(
        4, 5, ("train.steps=8", "train.micro_batch_size=6", "parallel.dp_shard=2", "parallel.tp=2"), rank=1
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ["two", pytest.param("tp", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_stop_changes_bits_of_a_run_on_the_same_layout(folder: Path, name: str) -> None:
    session, runs = SAME[name], []
    for how in ("whole", "stopped"):
        recipe = write_recipe(folder / f"{name}-{how}.toml", _table(folder, f"{name}-{how}"))
        if how == "stopped":
            _train(folder, recipe, session, ends=False)
        _train(folder, recipe, session)
        runs.append(folder / f"{name}-{how}")
    whole, stopped = runs
    for metric in ("train/loss", "train/grad_norm", "val/loss", "val/bpb"):
        assert _values(stopped, metric) == _values(whole, metric), metric
    files = [json.loads((run / "final" / "manifest.json").read_text())["files"] for run in runs]
    tensors = [{file: facts for file, facts in of.items() if file.endswith(".safetensors")} for of in files]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 1 + session.processes  # weights, and moments of each
    _transformers_loads(stopped, 1e-4)


def test_processes_that_would_sample_different_tokens_wait_for_each_other(folder: Path) -> None:
    def before(rank: int) -> None:
        from cheaptrain.train import samples

        plain = samples.row_logits

        def ends_at_once(model: Any, *rest: Any) -> torch.Tensor:
            logits = plain(model, *rest)
            logits[:, model.generation_config.eos_token_id] = 1e9
            return logits

        if rank == 1:
            samples.row_logits = ends_at_once

    recipe, log = write_recipe(folder / "sampled.toml", _table(folder, "sampled")), folder / "sampled.log"
    assert train_together(2, [recipe, "train.micro_batch_size=6"], log, before) == {0: 0, 1: 0}, tail(log)
    texts = [record["text"] for record in read_lines(folder / "sampled" / "samples.jsonl")]
    assert len(texts) == 1 + STEPS // EVERY and all(texts)
