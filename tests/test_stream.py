"""A token stream reads what its documents say, across files, and refuses files that are not what their index says."""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import numbered, stream_of, write_shard

from cheaptrain.data import stream as stream_module
from cheaptrain.data.stream import Shard, TokenStream
from cheaptrain.errors import PreflightError

lengths = st.lists(st.integers(1, 9), max_size=8)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), files=st.lists(lengths, min_size=1, max_size=4), dtype=st.sampled_from(["<u2", "<u4"]))
def test_reading_across_files_documents_or_selections_gives_other_tokens(
    folder: Path, data: st.DataObject, files: list[list[int]], dtype: str
) -> None:
    documents: list[list[int]] = []
    shards: list[Shard] = []
    for k, file in enumerate(files):
        header = data.draw(st.sampled_from([b"", b"abc", b"x" * 1024]))
        inside = numbered(file, first=1000 * k)
        shard = write_shard(folder / f"{k}.bin", inside, dtype, header)
        chosen = data.draw(st.none() | st.lists(st.integers(0, max(0, len(file) - 1)), unique=True, max_size=len(file)))
        if chosen is not None and (file or not chosen):
            shard = shard.select(np.array(sorted(chosen), np.int64))
            inside = [inside[document] for document in sorted(chosen)]
        shards.append(shard)
        documents += inside
    stream = TokenStream(shards)
    tokens = [token for document in documents for token in document]
    first_tokens = {sum(map(len, documents[:k])) for k in range(len(documents))}
    assert (stream.tokens, stream.documents) == (len(tokens), len(documents))
    for _ in range(8):
        start = data.draw(st.integers(0, len(tokens)))
        stop = data.draw(st.integers(start, len(tokens)))
        read = stream.read(start, stop)
        assert read.dtype == np.int64
        assert read.tolist() == tokens[start:stop]
        expected = sorted(place - start for place in first_tokens if start < place < stop)
        assert stream.document_starts(start, stop).tolist() == expected


@pytest.mark.parametrize(("start", "stop"), [(-1, 3), (0, 11), (5, 4), (11, 11)])
def test_reading_outside_the_stream_gives_some_tokens(tmp_path: Path, start: int, stop: int) -> None:
    stream = stream_of(tmp_path, numbered([4, 6]))
    with pytest.raises(IndexError, match="10 tokens"):
        stream.read(start, stop)
    with pytest.raises(IndexError, match="10 tokens"):
        stream.document_starts(start, stop)


@pytest.mark.parametrize("change", [-1, 1, 2])
def test_cut_or_grown_shard_is_read(tmp_path: Path, change: int) -> None:
    shard = write_shard(tmp_path / "train-00003.bin", numbered([4, 6]), header=b"12")
    size = shard.bin.stat().st_size
    with shard.bin.open("r+b") as file:
        file.truncate(size + change)
    with pytest.raises(PreflightError, match=rf"train-00003\.bin: {size + change} bytes.*prepare"):
        TokenStream([shard])


def test_missing_shard_is_found_out_in_the_middle_of_training(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "train-00000.bin", numbered([4]))
    shard.bin.unlink()
    with pytest.raises(PreflightError, match=r"train-00000\.bin.*No such file"):
        TokenStream([shard])


@pytest.mark.parametrize(("ends", "empty"), [([0, 10], 0), ([4, 4, 10], 1), ([6, 4, 10], 1)])
def test_empty_document_is_accepted(tmp_path: Path, ends: list[int], empty: int) -> None:
    shard = replace(write_shard(tmp_path / "a.bin", numbered([10])), document_ends=np.array(ends, np.int64))
    with pytest.raises(PreflightError, match=rf"a\.bin: document {empty} "):
        TokenStream([shard])


@pytest.mark.parametrize("extent", [(-1, 3), (8, 3), (4, 0)])
def test_selection_reaches_outside_its_file(tmp_path: Path, extent: tuple[int, int]) -> None:
    shard = replace(write_shard(tmp_path / "a.bin", numbered([10])), extents=np.array([extent], np.int64))
    with pytest.raises(PreflightError, match=r"a\.bin: a selected document"):
        TokenStream([shard])


def test_train_and_validation_of_one_file_overlap_or_lose_a_document(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.bin", numbered([3, 1, 4, 1, 5]))
    held_out = np.array([False, True, False, False, True])
    train = TokenStream([shard.select(np.flatnonzero(~held_out))])
    validation = TokenStream([shard.select(np.flatnonzero(held_out))])
    assert train.read(0, train.tokens).tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert validation.read(0, validation.tokens).tolist() == [3, 9, 10, 11, 12, 13]


def test_a_corpus_of_many_shards_runs_out_of_file_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc/self/fd to count open files")
    monkeypatch.setattr(stream_module, "_mapped", lru_cache(maxsize=4)(stream_module._mapped.__wrapped__))
    stream = stream_of(tmp_path, numbered([1] * 50), shards=50)
    before = len(os.listdir(descriptors))
    assert stream.read(0, 50).tolist() == list(range(50))
    assert len(os.listdir(descriptors)) - before <= 4
    assert stream_module._MAPS <= 4096


def test_a_replaced_file_is_read_through_its_old_map(tmp_path: Path) -> None:
    assert stream_of(tmp_path, [[1, 2, 3]]).read(0, 3).tolist() == [1, 2, 3]
    (tmp_path / "s-0.bin").unlink()
    shard = write_shard(tmp_path / "s-0.bin", [[4, 5, 6]])
    os.utime(shard.bin, ns=(1, 1))  # a file system with coarse times must not make this test pass or fail by chance
    assert TokenStream([shard]).read(0, 3).tolist() == [4, 5, 6]


@pytest.mark.parametrize("how", ["replaced", "gone", "emptied"])
def test_a_file_replaced_before_its_first_row_is_read_with_the_old_index(tmp_path: Path, how: str) -> None:
    stream = stream_of(tmp_path, [[1, 2, 3]])
    path = tmp_path / "s-0.bin"
    path.unlink()
    if how != "gone":
        write_shard(path, [[4, 5, 6]] if how == "replaced" else [])
        os.utime(path, ns=(1, 1))
    with pytest.raises(PreflightError, match=r"s-0\.bin: changed or gone since it was opened"):
        stream.read(0, 3)


def test_two_threads_disturb_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "_mapped", lru_cache(maxsize=2)(stream_module._mapped.__wrapped__))
    stream = stream_of(tmp_path, numbered([3] * 60), shards=12)
    with ThreadPoolExecutor(2) as pool:
        reads = list(pool.map(lambda k: stream.read(k % 90, k % 90 + 90).tolist(), range(300)))
    assert reads == [list(range(k % 90, k % 90 + 90)) for k in range(300)]


def test_empty_split_cannot_be_opened(tmp_path: Path) -> None:
    stream = TokenStream([write_shard(tmp_path / "val-00000.bin", [])])
    assert (stream.tokens, stream.documents, stream.read(0, 0).tolist()) == (0, 0, [])
    assert TokenStream([]).tokens == 0
