"""The account of a run holds what was read, by all processes together, each row once."""

import json
from typing import Any

import numpy as np
import pytest
import torch

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import CheaptrainError
from cheaptrain.recipe.resolve import Resolved, resolve
from cheaptrain.recipe.schema import Recipe
from cheaptrain.train.counts import StepCounts, counts_from, counts_vector
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.step import StepResult

SEQ = 64
NAMES = ("web", "code", "math")


def resolved(world: int = 1, rows: int = 8, **parallel: Any) -> Resolved:
    recipe = Recipe.model_validate(
        {
            "run": {"dir": "x", "allow_batch_change": True},
            "tokenizer": {"path": "gpt2"},
            "model": {"preset": "tiny"},
            "data": {"seq_len": SEQ, "sources": [{"name": "web", "weight": 1.0, "files": "web"}]},
            "train": {"steps": 100, "lr": 1.0, "global_batch_tokens": rows * SEQ},
            "parallel": parallel,
        }
    )
    return resolve(recipe, world)


def result(counts: StepCounts, applied: bool = True) -> StepResult:
    return StepResult(1.0, 0.5, 1.0, 1.0, counts, applied, False)


def batch(sources: list[int], unsupervised: int = 0) -> RowBatch:
    labels = torch.ones(len(sources), SEQ, dtype=torch.int64)
    labels.view(-1)[:unsupervised] = -100
    ids = torch.zeros_like(labels)
    return RowBatch(ids, labels, ids, ids.int(), np.array(sources), labels.numel() - unsupervised)


def test_a_process_enters_its_own_rows_only() -> None:
    ranks = [[batch([0, 1]), batch([0, 0], unsupervised=3)], [batch([2, 2], unsupervised=1), batch([0, 1])]]
    vectors = [counts_vector(batches, len(NAMES)) for batches in ranks]
    assert [vector.tolist() for vector in vectors] == [
        [4 * SEQ - 3, 4 * SEQ - 3, 3, 1, 0],
        [4 * SEQ - 1, 4 * SEQ - 1, 1, 1, 2],
    ]
    counts = counts_from(sum(vectors[1:], vectors[0]), SEQ)
    assert counts == StepCounts(8, 8 * SEQ, 8 * SEQ - 4, 8 * SEQ - 4, (4, 2, 2))
    ledger = Ledger()
    ledger.begin(resolved(world=2))
    ledger.add(counts, NAMES, result(counts), 2.0)
    ledger.add(counts, NAMES, result(counts, applied=False), 1.0)
    assert (ledger.step, ledger.rows_seen, ledger.tokens_seen) == (2, 16, 16 * SEQ)
    assert ledger.supervised_tokens == 2 * (8 * SEQ - 4)
    assert ledger.source_tokens == {"web": 8 * SEQ, "code": 4 * SEQ, "math": 4 * SEQ}
    assert (ledger.skipped_steps, ledger.skipped_in_a_row, ledger.train_seconds) == (1, 1, 3.0)


@pytest.mark.parametrize("rows", [4, 7, 16])
def test_rows_lost_or_counted_twice_between_processes_stand_in_the_account(rows: int) -> None:
    ledger = Ledger()
    ledger.begin(resolved())
    counts = StepCounts(rows, rows * SEQ, rows * SEQ, rows * SEQ, (rows,))
    with pytest.raises(CheaptrainError, match=f"step 1: .* read {rows * SEQ:,} tokens in {rows} rows, .* is 512"):
        ledger.add(counts, ["web"], result(counts), 1.0)
    assert (ledger.step, ledger.tokens_seen, ledger.source_tokens) == (0, 0, {}), "nothing of it was entered"


def steps(ledger: Ledger, now: Resolved, count: int) -> None:
    ledger.begin(now)
    rows = now.rows_per_step
    counts = StepCounts(rows, rows * SEQ, rows, rows, (rows,))
    for _ in range(count):
        ledger.add(counts, ["web"], result(counts), 1.0)


def test_history_says_when_batch_or_layout_changed_and_nothing_else() -> None:
    ledger = Ledger()
    assert ledger.done() is None
    for world, rows, parallel, count in [
        (1, 8, {}, 3),
        (1, 8, {}, 2),  # the same again
        (4, 8, {}, 1),  # more processes
        (4, 8, {"tp": 2}, 0),  # stopped before a step was done
        (4, 8, {"dp_replicate": 2}, 2),
        (2, 16, {}, 1),
    ]:
        ledger = Ledger.from_json(json.loads(json.dumps(ledger.to_json())))
        steps(ledger, resolved(world, rows, **parallel), count)
    assert [vars(entry) for entry in ledger.batches] == [
        {"step": 0, "tokens": 0, "global_batch_tokens": 512, "processes": 1, "layout": "1 process"},
        {"step": 5, "tokens": 2560, "global_batch_tokens": 512, "processes": 4, "layout": "dp_shard=4"},
        {"step": 6, "tokens": 3072, "global_batch_tokens": 512, "processes": 4, "layout": "dp_replicate=2, dp_shard=2"},
        {"step": 8, "tokens": 4096, "global_batch_tokens": 1024, "processes": 2, "layout": "dp_shard=2"},
    ]
    done = ledger.done()
    assert done is not None
    assert (done.steps, done.tokens, done.rows) == (9, 5120, 80)
    assert [(s.step, s.tokens, s.global_batch_tokens) for s in done.stretches] == [(0, 0, 512), (8, 4096, 1024)]


def test_going_back_before_a_step_was_done_leaves_two_entries_for_one_step() -> None:
    ledger = Ledger()
    steps(ledger, resolved(rows=8), 3)
    assert ledger.begin(resolved(rows=16)) is not None
    assert ledger.begin(resolved(rows=8)) is None, "as if nothing had been"
    assert [entry.step for entry in ledger.batches] == [0]
    assert ledger.begin(resolved(rows=8)) is None
    entered = ledger.begin(resolved(rows=4))
    assert entered == ledger.batches[-1]
    assert (entered.step, entered.tokens, entered.global_batch_tokens) == (3, 3 * 512, 256)


def test_a_ledger_with_counts_of_another_version_is_taken() -> None:
    values = Ledger().to_json()
    with pytest.raises(TypeError):
        Ledger.from_json(values | {"epochs_seen": 1})
