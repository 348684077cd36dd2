"""Token shards that others made are read where they lie, document by document, and refused when they do not fit."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepare_helpers import all_bytes, documents_of, prepare, quiet, recipe, text, tokenizer_of, write_jsonl

from cheaptrain.data.encode import Encoder
from cheaptrain.data.manifest import verify_manifest
from cheaptrain.data.open import open_stream
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.shards import index_bytes, read_index
from cheaptrain.errors import PreflightError

DOCUMENTS = 60


@pytest.fixture
def encoded(tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(ids of all documents with end of text, document ends)."""
    recipe(tmp_path, {"drills": {"documents": 1}})  # writes the tokenizer
    ids, lengths = Encoder(tokenizer_of(tmp_path).encoder_spec()).encode([text(i) for i in range(DOCUMENTS)])
    return ids, np.cumsum(lengths)


def megatron_index(dtype_code: int, itemsize: int, sizes: list[int], documents: list[int]) -> bytes:
    pointers = np.concatenate(([0], np.cumsum(sizes)[:-1])) * itemsize
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, dtype_code, len(sizes), len(documents))
    arrays = (np.array(sizes, np.int32), pointers.astype(np.int64), np.array(documents, np.int64))
    return header + b"".join(array.tobytes() for array in arrays)


def write(folder: Path, kind: str, ids: np.ndarray, ends: np.ndarray) -> tuple[Path, dict[str, Any]]:
    folder.mkdir(exist_ok=True)
    if kind.startswith("datatrove"):
        dtype = "<u4" if kind.endswith("4") else "<u2"
        (folder / "00000_shuffled.ds").write_bytes(ids.astype(dtype).tobytes())
        (folder / "00000_shuffled.ds.index").write_bytes(ends.astype("<u8").tobytes())
        if "metadata" in kind:
            (folder / "00000_shuffled.ds.metadata").write_text(f"gpt2|{dtype[-1]}\n{len(ids)}\n2 KT")
        return folder / "00000_shuffled.ds", {}
    if kind.startswith("megatron"):
        code = int(kind.removeprefix("megatron"))
        dtype = {3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}[code]
        (folder / "c_text_document.bin").write_bytes(ids.astype(dtype).tobytes())
        sizes = np.diff(ends, prepend=0).tolist()
        # The first document in two sequences, as sentence splitting writes it.
        sizes = [sizes[0] - 3, 3, *sizes[1:]]
        index = megatron_index(code, np.dtype(dtype).itemsize, sizes, [0, *range(2, len(sizes) + 1)])
        (folder / "c_text_document.idx").write_bytes(index)
        return folder / "c_text_document.idx", {}
    if kind.startswith("nanogpt"):
        itemsize = int(kind.removeprefix("nanogpt"))
        (folder / "train.bin").write_bytes(ids.astype(f"<u{itemsize}").tobytes())
        return folder / "train.bin", {} if itemsize == 2 else {"token_bytes": 4}
    if kind == "npy":
        np.save(folder / "edufineweb_train_000001.npy", ids.astype(np.uint16))
        return folder / "edufineweb_train_000001.npy", {}
    header = np.zeros(256, np.int32)
    header[:3] = (20240520, 1, len(ids)) if kind == "llmc" else (20240801, 7, len(ids))
    dtype = "<u2" if kind == "llmc" else "<u4"
    (folder / "fineweb_train_000001.bin").write_bytes(header.tobytes() + ids.astype(dtype).tobytes())
    return folder / "fineweb_train_000001.bin", {}


FORMATS = [
    "datatrove", "datatrove4", "datatrove-metadata4", "megatron3", "megatron4", "megatron5", "megatron8", "nanogpt2",
    "nanogpt4", "npy", "llmc", "llama3",
]  # fmt: skip


def test_every_format_gives_the_documents_of_our_own_shards(tmp_path: Path, encoded: Any) -> None:
    own, _ = prepare(tmp_path, {"files": str(write_jsonl(tmp_path / "a.jsonl", range(DOCUMENTS)))}, validation=0.2)
    sources, originals = [], {}
    for kind in FORMATS:
        path, extra = write(tmp_path / kind, kind, *encoded)
        sources.append({"name": kind, "tokens": str(path), **extra})
        originals |= {file: file.read_bytes() for file in (tmp_path / kind).iterdir()}
    manifests = prepare_recipe(recipe(tmp_path, *sources, validation=0.2), console=quiet())
    tokenizer = tokenizer_of(tmp_path)
    every = {text(i) for i in range(DOCUMENTS)}
    first = None
    for manifest in manifests:
        train, val = (documents_of(manifest, tokenizer, split) for split in ("train", "val"))
        assert {*train} | {*val} == every and len(train) + len(val) == DOCUMENTS and val
        first = first or (train, val)
        assert (train, val) == first, f"{manifest.name} splits differently"
        assert manifest.train.bytes + manifest.val.bytes == own.train.bytes + own.val.bytes
        assert manifest.train.tokens + manifest.val.tokens == len(encoded[0])
        verify_manifest(manifest)
        assert sum(path.stat().st_size for path in manifest.directory.glob("*.npy")) < 4000  # no tokens copied
    assert {file: file.read_bytes() for file in originals} == originals


def test_our_index_is_read_as_megatron_defines_it(tmp_path: Path) -> None:
    lengths = np.array([3, 1, 7], np.int64)
    for dtype, code, itemsize in (("<u2", 8, 2), ("<u4", 4, 4)):
        raw = index_bytes(lengths, np.dtype(dtype))
        assert raw == megatron_index(code, itemsize, [3, 1, 7], [0, 1, 2, 3])
        (tmp_path / "x.idx").write_bytes(raw)
        assert read_index(tmp_path / "x.idx").document_ends.tolist() == [3, 4, 11]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-4], "cut short"),
        (lambda raw: b"X" + raw[1:], "not an MMIDIDX index"),
        (lambda raw: raw[:17] + b"\x06" + raw[18:], "dtype code 6"),
    ],
)
def test_damaged_index_is_refused(tmp_path: Path, damage: Any, message: str) -> None:
    (tmp_path / "x.idx").write_bytes(damage(index_bytes(np.array([3, 4], np.int64), np.dtype("<u2"))))
    with pytest.raises(PreflightError, match=message):
        read_index(tmp_path / "x.idx")


def test_ids_of_another_tokenizer_are_refused_with_their_place(tmp_path: Path, encoded: Any) -> None:
    ids = encoded[0].copy()
    ids[77] = 40_000
    path, _ = write(tmp_path / "bad", "nanogpt2", ids, encoded[1])
    with pytest.raises(PreflightError, match=r"train\.bin: id 40,000 at token 77 is outside the tokenizer's 372"):
        prepare(tmp_path, {"tokens": str(path)})


def test_files_that_do_not_fit_are_refused(tmp_path: Path, encoded: Any) -> None:
    ids, ends = encoded

    def refused(path: Path, message: str, **extra: Any) -> None:
        with pytest.raises(PreflightError, match=message):
            prepare(tmp_path, {"tokens": str(path), **extra})

    path, _ = write(tmp_path / "cut", "datatrove", ids[:-5], ends)
    refused(path, "tokens, but .*index counts")
    path, _ = write(tmp_path / "odd", "nanogpt2", ids, ends)
    path.write_bytes(path.read_bytes()[:-1])
    refused(path, "not a whole number of 2-byte tokens")
    path, _ = write(tmp_path / "header", "llmc", ids, ends)
    path.write_bytes(path.read_bytes()[:-2])
    refused(path, "its header counts")
    path, _ = write(tmp_path / "contradiction", "npy", ids, ends)
    refused(path, "but token_bytes = 4", token_bytes=4)
    np.save(tmp_path / "square.npy", np.zeros((2, 2)))
    refused(tmp_path / "square.npy", "not one row of integer tokens")
    (tmp_path / "lonely.idx").write_bytes(index_bytes(np.array([3], np.int64), np.dtype("<u2")))
    refused(tmp_path / "lonely.idx", "an index without its tokens")
    (tmp_path / "notes.md").write_text("hello")
    refused(tmp_path / "notes.md", "unknown kind of token shard")
    (tmp_path / "empty.bin").touch()
    refused(tmp_path / "empty.bin", "is empty")


def test_a_glob_over_everything_reads_each_file_once(tmp_path: Path, encoded: Any) -> None:
    write(tmp_path / "mixed", "megatron8", *encoded)
    write(tmp_path / "mixed", "datatrove-metadata", *encoded)
    manifest, printed = prepare(tmp_path, {"tokens": f"{tmp_path}/mixed/*"}, validation=0.0)
    assert len(manifest.units) == 2 and manifest.train.tokens == 2 * len(encoded[0])
    assert "1 file of datatrove (uint16)" in printed and "1 file of Megatron (uint16)" in printed


def test_empty_documents_are_dropped_and_missing_ends_are_told(tmp_path: Path, encoded: Any) -> None:
    ids, ends = encoded
    eot = tokenizer_of(tmp_path).eot_id
    # Two ends of text in a row, and the last document cut by the end of the file.
    odd = np.concatenate(([eot], ids[: ends[3]], [eot], ids[ends[3] : ends[5] - 4]))
    path, _ = write(tmp_path / "odd", "nanogpt2", odd, ends)
    manifest, printed = prepare(tmp_path, {"tokens": str(path)}, validation=0.0)
    assert (manifest.train.documents, manifest.dropped) == (6, 2)
    assert "1 documents do not end with end-of-text" in printed
    stream = open_stream(manifest, "train")
    assert np.array_equal(stream.read(0, stream.tokens), ids[: ends[5] - 4])


def test_changed_or_missing_foreign_file_is_noticed(tmp_path: Path, encoded: Any) -> None:
    path, _ = write(tmp_path / "f", "nanogpt2", *encoded)
    manifest, _ = prepare(tmp_path, {"tokens": str(path)}, validation=0.2)
    before = all_bytes(manifest.directory)
    raw = path.read_bytes()
    path.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    with pytest.raises(PreflightError, match=r"train\.bin changed"):
        verify_manifest(manifest)
    path.unlink()
    with pytest.raises(PreflightError, match=r"train\.bin: no such file"):
        verify_manifest(manifest)
    path.write_bytes(raw)
    prepare(tmp_path, {"tokens": str(path)}, validation=0.2)
    assert all_bytes(manifest.directory) == before
