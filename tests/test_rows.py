"""A row holds its stretch of the stream, keeps its documents apart, and supervises all that can be learnt, once."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import numbered, stream_of

from cheaptrain.data.rows import RowBatch, StreamRows, build_rows
from cheaptrain.data.stream import TokenStream


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def one_row(stream: TokenStream, row: int, seq_len: int, document_mask: bool = True) -> RowBatch:
    return build_rows([StreamRows.whole(stream, seq_len, document_mask)], np.array([0]), np.array([row]))


def expected_row(lengths: list[int], row: int, seq_len: int) -> dict[str, list[int]]:
    """The same row the slow way: walk the tokens one by one. Token ids are their places in the stream."""
    document_of = [document for document, length in enumerate(lengths) for _ in range(length)]
    out: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "document_ids": []}
    start = row * seq_len
    for place in range(start, start + seq_len):
        fresh = place == start or document_of[place] != document_of[place - 1]
        out["input_ids"].append(place)
        out["labels"].append(place + 1 if document_of[place + 1] == document_of[place] else -100)
        out["position_ids"].append(0 if fresh else out["position_ids"][-1] + 1)
        out["document_ids"].append(document_of[place] - document_of[start])
    return out


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=20),
    seq_len=st.integers(1, 16),
    shards=st.integers(1, 3),
)
def test_packed_row_differs_from_walking_token_by_token(
    folder: Path, lengths: list[int], seq_len: int, shards: int
) -> None:
    stream = stream_of(folder, numbered(lengths), shards)
    rows = np.arange(max(0, stream.tokens - 1) // seq_len)
    batch = build_rows([StreamRows.whole(stream, seq_len, True)], np.zeros(len(rows), np.int64), rows)
    supervised = 0
    for row in rows.tolist():
        expected = expected_row(lengths, row, seq_len)
        for field, values in expected.items():
            assert getattr(batch, field)[row].tolist() == values, field
        supervised += sum(label != -100 for label in expected["labels"])
    assert batch.supervised == supervised
    assert batch.input_ids.shape == (len(rows), seq_len)


def test_document_that_starts_with_the_row_costs_a_label_or_a_number(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([4, 6])), 1, 4)
    assert batch.input_ids.tolist() == [[4, 5, 6, 7]]
    assert batch.labels.tolist() == [[5, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0]]


def test_document_that_starts_at_the_last_target_is_a_target(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([4, 6])), 0, 4)
    assert batch.labels.tolist() == [[1, 2, 3, -100]]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0]]
    assert batch.supervised == 3


def test_document_of_one_token_shares_a_number_with_its_neighbour(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([2, 1, 1, 3])), 0, 6)
    assert batch.document_ids.tolist() == [[0, 0, 1, 2, 3, 3]]
    assert batch.position_ids.tolist() == [[0, 1, 0, 0, 0, 1]]
    assert batch.labels.tolist() == [[1, -100, -100, -100, 5, 6]]


def test_row_inside_one_document_does_not_start_at_position_0(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([20])), 2, 5)
    assert batch.input_ids.tolist() == [[10, 11, 12, 13, 14]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4]]
    assert batch.labels.tolist() == [[11, 12, 13, 14, 15]]


def test_rows_of_a_stream_lose_or_repeat_a_target(tmp_path: Path) -> None:
    lengths = [3, 1, 7, 2, 9, 5, 1]
    stream = stream_of(tmp_path, numbered(lengths), shards=3)
    rows = np.arange((stream.tokens - 1) // 9)
    batch = build_rows([StreamRows.whole(stream, 9, True)], np.zeros(len(rows), np.int64), rows)
    first_tokens = np.cumsum([0, *lengths])[:-1].tolist()
    targets = sorted(batch.labels[batch.labels != -100].tolist())
    assert targets == [place for place in range(1, len(rows) * 9 + 1) if place not in first_tokens]


def test_turning_the_document_mask_off_leaves_some_of_it_on(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([2, 1, 1, 3])), 0, 6, document_mask=False)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch.document_ids.tolist() == [[0] * 6]
    assert batch.labels.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.supervised == 6


def test_rows_of_several_sources_are_mixed_up(tmp_path: Path) -> None:
    streams = [
        stream_of(tmp_path, numbered([9, 9]), name="a"),
        stream_of(tmp_path, numbered([5, 5, 8], first=100), shards=3, name="b"),
    ]
    sources = [StreamRows.whole(stream, 4, True) for stream in streams]
    batch = build_rows(sources, np.array([1, 0, 1]), np.array([0, 2, 3]))
    assert batch.sources.tolist() == [1, 0, 1]
    assert batch.input_ids[:, 0].tolist() == [100, 8, 112]
    assert batch.document_ids.tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]


def test_batch_has_other_types_than_the_model_wants(tmp_path: Path) -> None:
    batch = one_row(stream_of(tmp_path, numbered([9])), 0, 4)
    types = [batch.input_ids.dtype, batch.labels.dtype, batch.position_ids.dtype, batch.document_ids.dtype]
    assert types == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert all(part.is_contiguous() for part in (batch.input_ids, batch.labels, batch.position_ids))
