"""Any number of processes, any layout, any batch: each step has the same rows in the same order, none twice."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from token_files import numbered, stream_of

from cheaptrain.data.loader import Loader
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import RowBatch, StreamRows
from cheaptrain.data.stream import TokenStream
from cheaptrain.recipe.resolve import Resolved, resolve
from cheaptrain.recipe.schema import Recipe
from cheaptrain.train.counts import counts_from, counts_vector
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.step import StepResult

SEQ = 8
ROWS = 1536  # divides over 1, 2, 3, 4 and 512
WEIGHTS = {"web": 0.55, "code": 0.3, "math": 0.15}


@pytest.fixture(scope="module")
def streams(tmp_path_factory: pytest.TempPathFactory) -> list[TokenStream]:
    folder, generator = tmp_path_factory.mktemp("tokens"), np.random.default_rng(5)
    lengths = {"web": 900, "code": 500, "math": 300}
    return [
        stream_of(folder, numbered(generator.integers(1, 30, count).tolist(), first=k * 20_000), shards=2, name=name)
        for k, (name, count) in enumerate(lengths.items())
    ]


def sources_of(streams: list[TokenStream]) -> list[StreamRows]:
    return [StreamRows.whole(stream, SEQ, document_mask=True) for stream in streams]


def order_of(streams: list[TokenStream]) -> MixtureOrder:
    rows = {name: (stream.tokens - 1) // SEQ for name, stream in zip(WEIGHTS, streams, strict=True)}
    return MixtureOrder(7, WEIGHTS, rows)


def resolved_for(processes: int, rows: int, micro: int = 1, ledger: Ledger | None = None, **parallel: int) -> Resolved:
    recipe = Recipe.model_validate(
        {
            "run": {"dir": "x", "allow_batch_change": True},
            "tokenizer": {"path": "gpt2"},
            "model": {"preset": "tiny"},
            "data": {"seq_len": SEQ, "sources": [{"name": "web", "weight": 1.0, "files": "web"}]},
            "train": {"tokens": 10**6, "lr": 1.0, "global_batch_tokens": rows * SEQ, "micro_batch_size": micro},
            "parallel": parallel,
        }
    )
    return resolve(recipe, processes, done=ledger.done() if ledger else None)


def read_step(streams: list[TokenStream], resolved: Resolved, first_row: int) -> list[list[RowBatch]]:
    """The step as the data ranks of this layout read it: [data rank][micro-batch]."""
    order, ranks = order_of(streams), resolved.layout.data_parallel
    return [
        Loader(order, sources_of(streams), resolved.rows_per_step, resolved.micro_batch_size, rank, ranks).step(
            first_row
        )
        for rank in range(ranks)
    ]


def in_order(ranks: list[list[RowBatch]]) -> dict[str, torch.Tensor]:
    """The rows of a step in their global order: micro-step by micro-step, data rank by data rank."""
    batches = [batch for micro_step in zip(*ranks, strict=True) for batch in micro_step]
    together = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("input_ids", "labels", "position_ids", "document_ids")
    }
    return together | {"sources": torch.from_numpy(np.concatenate([batch.sources for batch in batches]))}


LAYOUTS = [
    (1, {}),
    (2, {}),
    (3, {}),
    (4, {}),
    (4, {"dp_replicate": 2}),
    (8, {"tp": 2}),
    (6, {"dp_replicate": 3, "tp": 2}),
    (8, {"dp_replicate": 2, "cp": 2}),
    (512, {}),
    (512, {"tp": 8}),
]


@pytest.mark.parametrize(("processes", "parallel"), LAYOUTS, ids=str)
@pytest.mark.parametrize("accumulates", [True, False])
def test_another_number_of_processes_reads_other_rows(
    streams: list[TokenStream], processes: int, parallel: dict[str, int], accumulates: bool
) -> None:
    micro = 1 if accumulates else ROWS // resolved_for(processes, ROWS, **parallel).layout.data_parallel
    resolved = resolved_for(processes, ROWS, micro, **parallel)
    for first_row in (0, 5 * ROWS + 123):
        ranks = read_step(streams, resolved, first_row)
        assert {len(batches) for batches in ranks} == {resolved.accumulation}
        assert {batch.input_ids.shape for batches in ranks for batch in batches} == {(micro, SEQ)}
        together = in_order(ranks)
        alone = in_order(read_step(streams, resolved_for(1, ROWS, ROWS), first_row))
        for name, expected in alone.items():
            assert torch.equal(together[name], expected), name


SESSIONS = [
    # processes, layout, micro-batch, rows a step, steps
    (1, {}, 1, 24, 5),
    (4, {}, 2, 24, 3),
    (3, {}, 1, 24, 1),
    (8, {"tp": 2, "dp_replicate": 2}, 3, 24, 4),
    (8, {"tp": 2}, 3, 48, 2),  # another batch
    (1, {}, 6, 48, 3),
    (2, {}, 1, 10, 7),  # and another
    (512, {}, 1, 512, 2),
    (4, {"cp": 2}, 4, 24, 6),
]


def test_a_resume_or_a_changed_batch_reads_a_row_twice_or_skips_one(streams: list[TokenStream]) -> None:
    ledger, seen, firsts = Ledger(), [], []
    for processes, parallel, micro, rows, steps in SESSIONS:
        ledger = Ledger.from_json(ledger.to_json())
        resolved = resolved_for(processes, rows, micro, ledger, **parallel)
        ledger.begin(resolved)
        for _ in range(steps):
            firsts.append(ledger.rows_seen)
            ranks = read_step(streams, resolved, ledger.rows_seen)
            seen.append(in_order(ranks))
            vector = sum((counts_vector(batches, len(WEIGHTS)) for batches in ranks), torch.zeros(5, dtype=torch.int64))
            counts = counts_from(vector, SEQ)
            ledger.add(counts, list(WEIGHTS), StepResult(1.0, 0.5, 1.0, 1.0, counts, True, False), 1.0)
    total = sum(rows * steps for *_, rows, steps in SESSIONS)
    assert (ledger.rows_seen, ledger.tokens_seen) == (total, total * SEQ)
    assert [after - before for before, after in pairwise([*firsts, total])] == [len(s["sources"]) for s in seen]
    # The whole run in one piece: the very same rows, in the very same order.
    expected = in_order(read_step(streams, resolved_for(1, total, total), 0))
    for name, rows_of_run in expected.items():
        assert torch.equal(torch.cat([step[name] for step in seen]), rows_of_run), name
    drawn = order_of(streams).counts(total).tolist()
    assert ledger.source_tokens == {name: count * SEQ for name, count in zip(WEIGHTS, drawn, strict=True)}
    assert ledger.supervised_tokens == int((expected["labels"] != -100).sum())


def test_prefetching_goes_on_at_the_old_batch_after_a_change(streams: list[TokenStream]) -> None:
    ledger = Ledger()
    ledger.begin(resolved_for(1, 24))
    order, names = order_of(streams), list(WEIGHTS)
    positions = []
    for rows, steps in ((24, 3), (10, 4), (48, 2)):
        resolved = resolved_for(2, rows, 1, ledger)
        ledger.begin(resolved)
        loaders = [
            Loader(order, sources_of(streams), rows, 1, rank, 2).prefetch(ledger.rows_seen, steps) for rank in range(2)
        ]
        for ranks in zip(*loaders, strict=True):
            positions.append(in_order(list(ranks))["input_ids"])
            counts = counts_from(sum((counts_vector(b, 3) for b in ranks), torch.zeros(5, dtype=torch.int64)), SEQ)
            ledger.add(counts, names, StepResult(1.0, 0.5, 1.0, 1.0, counts, True, False), 1.0)
    alone = in_order(read_step(streams, resolved_for(1, 208, 208), 0))["input_ids"]
    assert torch.equal(torch.cat(positions), alone)
