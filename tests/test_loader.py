"""Any number of processes, any resume: the same global rows, each once an epoch; and a reader that fails says so."""

import gc
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from token_files import numbered, stream_of

from cheaptrain.data.loader import Loader, validation_batches
from cheaptrain.data.open import held_out_rows
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import RowBatch, StreamRows
from cheaptrain.data.stream import TokenStream
from cheaptrain.errors import RecipeError

SEQ_LEN = 4
LENGTHS = {"web": [5, 3, 9, 1, 14, 6] * 9, "code": [2, 30, 1] * 5, "math": [7] * 12}
WEIGHTS = {"web": 0.6, "code": 0.3, "math": 0.1}


@pytest.fixture
def streams(tmp_path: Path) -> list[TokenStream]:
    return [
        stream_of(tmp_path, numbered(lengths, first=k * 10_000), shards=2, name=name)
        for k, (name, lengths) in enumerate(LENGTHS.items())
    ]


def sources_of(streams: list[TokenStream]) -> list[StreamRows]:
    return [StreamRows.whole(stream, SEQ_LEN, document_mask=True) for stream in streams]


def held_out(
    stream: TokenStream, seq_len: int, max_tokens: int, mask: bool, rank: int = 0, ranks: int = 1
) -> list[RowBatch]:
    return list(validation_batches(held_out_rows(stream, seq_len, max_tokens, mask), 2, rank, ranks))


def loader_of(
    streams: list[TokenStream],
    data_parallel: int = 1,
    rank: int = 0,
    micro_batch_size: int = 1,
    rows_per_step: int = 12,
) -> Loader:
    rows = {name: (stream.tokens - 1) // SEQ_LEN for name, stream in zip(WEIGHTS, streams, strict=True)}
    order = MixtureOrder(3, WEIGHTS, rows)
    return Loader(order, sources_of(streams), rows_per_step, micro_batch_size, rank, data_parallel)


def rows_read(batches: list[RowBatch]) -> list[tuple[int, int]]:
    """(source, row) of each row: the tokens are numbered, so that the first one tells."""
    return [
        (int(source), int(first) % 10_000 // SEQ_LEN)
        for batch in batches
        for source, first in zip(batch.sources, batch.input_ids[:, 0].tolist(), strict=True)
    ]


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 1), (4, 3)])
def test_another_world_size_reads_other_rows(
    streams: list[TokenStream], world_size: int, micro_batch_size: int
) -> None:
    for first_row in (0, 12, 36, 7):
        ranks = [loader_of(streams, world_size, rank, micro_batch_size).step(first_row) for rank in range(world_size)]
        assert {len(batches) for batches in ranks} == {12 // (world_size * micro_batch_size)}
        # Micro-step by micro-step and rank by rank, the rows stand in their global order.
        together = [row for micro in zip(*ranks, strict=True) for batch in micro for row in rows_read([batch])]
        sources, rows, _ = loader_of(streams).order.locate(np.arange(first_row, first_row + 12))
        assert together == list(zip(sources.tolist(), rows.tolist(), strict=True))


def test_resume_on_another_world_size_reads_a_row_twice(streams: list[TokenStream]) -> None:
    sessions = [(1, 0, 9), (3, 9, 20), (4, 20, 21), (2, 21, 60)]  # processes, first step, step after the last
    seen: list[tuple[int, int]] = []
    for world_size, first, last in sessions:
        for step in range(first, last):
            for rank in range(world_size):
                seen += rows_read(loader_of(streams, world_size, rank).step(step * 12))
    order = loader_of(streams).order
    drawn = order.counts(60 * 12)
    assert len(seen) == drawn.sum() == 720
    times = Counter(seen)
    for source, (draws, rows) in enumerate(zip(drawn.tolist(), order.rows, strict=True)):
        epochs, begun = divmod(draws, rows)
        assert epochs >= 1, "the run must be long enough to show repeats"
        assert sorted(times[source, row] for row in range(rows)) == [epochs] * (rows - begun) + [epochs + 1] * begun


def test_tokens_read_differ_from_tokens_counted(streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch) -> None:
    spied: list[int] = []
    read = TokenStream.read

    def spy(self: TokenStream, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        spied.append(stop - start - 1)  # a row reads one token more than its inputs, for the last target
        return read(self, start, stop, out)

    monkeypatch.setattr(TokenStream, "read", spy)
    tokens, supervised = 0, 0
    for batches in loader_of(streams, micro_batch_size=4).prefetch(24, 10):
        tokens += sum(batch.input_ids.numel() for batch in batches)
        supervised += sum(batch.supervised for batch in batches)
        assert all(batch.supervised == int((batch.labels != -100).sum()) for batch in batches)
    assert tokens == sum(spied) == 10 * 12 * SEQ_LEN
    assert 0 < supervised < tokens


def test_prefetching_changes_what_is_read(streams: list[TokenStream]) -> None:
    loader = loader_of(streams, data_parallel=2, rank=1, micro_batch_size=3)
    for ahead in (0, 1, 2, 50):
        steps = list(loader.prefetch(36, 5, ahead=ahead))
        assert [rows_read(batches) for batches in steps] == [rows_read(loader.step(36 + 12 * k)) for k in range(5)]
    assert list(loader.prefetch(36, 0)) == []


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("rows")]


def test_failure_in_the_reader_hangs_or_loses_its_traceback(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_late(self: Loader, first_row: int) -> list[RowBatch]:
        if first_row >= 36:
            raise OSError("the disk is gone")
        return []

    monkeypatch.setattr(Loader, "step", fail_late)
    steps = loader_of(streams).prefetch(0, 100)
    assert [next(steps) for _ in range(3)] == [[], [], []]
    with pytest.raises(OSError, match="the disk is gone") as failure:
        next(steps)
    assert "fail_late" in "".join(traceback.format_exception(failure.value))
    assert reader_threads() == []


@pytest.mark.parametrize("kind", [SystemExit, KeyboardInterrupt, MemoryError])
def test_reader_that_dies_of_anything_hangs_the_training(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    def die(self: Loader, first_row: int) -> list[RowBatch]:
        raise kind

    monkeypatch.setattr(Loader, "step", die)
    with pytest.raises(kind):
        list(loader_of(streams).prefetch(0, 3))


def test_stopping_early_leaves_a_thread_or_reads_on(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def slow(self: Loader, first_row: int) -> list[RowBatch]:
        asked.append(first_row)
        time.sleep(0.01)
        return []

    monkeypatch.setattr(Loader, "step", slow)
    steps = loader_of(streams).prefetch(0, 1000, ahead=100)
    next(steps)
    assert len(reader_threads()) == 1
    steps.close()  # type: ignore[attr-defined]
    assert reader_threads() == []
    assert len(asked) < 50

    with pytest.raises(ZeroDivisionError):
        for _ in loader_of(streams).prefetch(0, 1000):
            raise ZeroDivisionError
    gc.collect()
    assert reader_threads() == []


def test_reader_runs_far_ahead_and_fills_the_memory(
    streams: list[TokenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(Loader, "step", lambda self, first_row: asked.append(first_row) or [])
    steps = loader_of(streams).prefetch(0, 1000, ahead=2)
    next(steps)
    deadline = time.monotonic() + 10
    while len(asked) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)  # time to run too far ahead in
    assert asked == [0, 12, 24]
    steps.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("rows", "micro", "world", "remedy"),
    [
        (42, 6, 2, r"42 rows a step do not divide over 2 data-parallel groups x micro_batch_size 6: use "
                   r"train.micro_batch_size 3, or 1 data-parallel group, or .* multiple of 12 rows"),
        (43, 6, 4, "multiple of 24 rows"),
        (512, 1, 6, "use 4 data-parallel groups"),
    ],
)  # fmt: skip
def test_step_that_does_not_divide_drops_rows(
    streams: list[TokenStream], rows: int, micro: int, world: int, remedy: str
) -> None:
    with pytest.raises(RecipeError, match=remedy):
        loader_of(streams, data_parallel=world, micro_batch_size=micro, rows_per_step=rows)


def test_order_made_for_other_streams_is_used(streams: list[TokenStream]) -> None:
    order = loader_of(streams).order
    with pytest.raises(ValueError, match="'web'"):
        Loader(order, sources_of([streams[1], streams[0], streams[2]]), 12, 1, 0, 1)
    with pytest.raises(ValueError, match="shorter"):
        Loader(order, sources_of(streams[:2]), 12, 1, 0, 1)


@pytest.mark.parametrize("seq_len", [3, 4, 7, 100])
@pytest.mark.parametrize("max_tokens", [1, 5, 24, 10_000])
@pytest.mark.parametrize("document_mask", [True, False])
def test_validation_loses_tokens_or_counts_padding(
    tmp_path: Path, seq_len: int, max_tokens: int, document_mask: bool
) -> None:
    lengths = [6, 1, 9, 4, 11]
    stream = stream_of(tmp_path, numbered(lengths))
    batches = held_out(stream, seq_len, max_tokens, document_mask)
    inputs = min(max_tokens, 30)
    first_tokens = np.cumsum([0, *lengths])[:-1].tolist() if document_mask else []
    labels = torch.cat([batch.labels.reshape(-1) for batch in batches])
    targets = labels[labels != -100].tolist()
    assert targets == [place for place in range(1, inputs + 1) if place not in first_tokens]
    assert sum(batch.supervised for batch in batches) == len(targets)
    assert {tuple(batch.input_ids.shape) for batch in batches} == {(2, seq_len)}
    # No batch of padding alone, and no padding inside a document that counts.
    assert len(batches) == -(-inputs // (2 * seq_len))
    for number, batch in enumerate(batches):
        for row in range(2):
            counted = min(max(inputs - (2 * number + row) * seq_len, 0), seq_len)
            documents = batch.document_ids[row].tolist()
            assert documents[0] == 0
            assert not document_mask or not set(documents[:counted]) & set(documents[counted:])
            assert batch.labels[row, counted:].tolist() == [-100] * (seq_len - counted)
            if document_mask and counted < seq_len:
                assert batch.position_ids[row, counted:].tolist() == list(range(seq_len - counted))


@pytest.mark.parametrize("data_parallel", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize(("seq_len", "max_tokens"), [(4, 10_000), (4, 24), (7, 5), (3, 1)])
def test_validation_on_more_processes_hangs_or_scores_other_tokens(
    tmp_path: Path, data_parallel: int, seq_len: int, max_tokens: int
) -> None:
    stream = stream_of(tmp_path, numbered([6, 1, 9, 4, 11]))
    alone = held_out(stream, seq_len, max_tokens, True)
    ranks = [held_out(stream, seq_len, max_tokens, True, rank, data_parallel) for rank in range(data_parallel)]
    # Sharded models run forward together: a rank with a batch more would wait for ever.
    assert {len(batches) for batches in ranks} == {-(-len(alone) // data_parallel)}
    together = [batch for turn in zip(*ranks, strict=True) for batch in turn]
    for batch, other in zip(alone, together, strict=False):
        for name in ("input_ids", "labels", "position_ids", "document_ids"):
            assert torch.equal(getattr(batch, name), getattr(other, name))
    assert [batch.supervised for batch in together[len(alone) :]] == [0] * (len(together) - len(alone))
    assert all((batch.labels == -100).all() for batch in together[len(alone) :])
    assert sum(batch.supervised for batch in together) == sum(batch.supervised for batch in alone) > 0

    # A stand-in for a model: a loss of each target that depends on its input and its position.
    torch.manual_seed(1)
    table = torch.randn(64, 64)

    def nats(batches: list[RowBatch]) -> float:
        sums = [
            torch.nn.functional.cross_entropy(
                (table[batch.input_ids] * (1 + batch.position_ids[..., None])).flatten(0, 1),
                batch.labels.flatten(),
                reduction="sum",
            )
            for batch in batches
        ]
        return float(sum(part.double() for part in sums))

    assert sum(nats(batches) for batches in ranks) == pytest.approx(nats(alone), rel=1e-6)


def test_validation_of_a_stream_without_a_target_fails(tmp_path: Path) -> None:
    assert held_out(stream_of(tmp_path, [[7]]), 4, 100, True) == []
    assert held_out(TokenStream([]), 4, 100, True) == []
    # Documents of one token: every target would be the first token of another document.
    lonely = stream_of(tmp_path, [[7], [8], [9]], name="lonely")
    for rank in range(3):
        assert held_out(lonely, 4, 100, True, rank, 3) == []
        assert len(held_out(lonely, 4, 100, False, rank, 3)) == 1
    begun = stream_of(tmp_path, [[7], [8], [9, 10]], name="begun")
    assert held_out(begun, 4, 2, True) == [], "the first two targets start documents"
    assert [batch.supervised for batch in held_out(begun, 4, 3, True)] == [1]
