"""Input that is strange and not wrong is read, and input that is wrong is refused by a sentence, never a traceback."""

import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_helpers import (
    documents_of,
    prepare,
    quiet,
    recipe,
    save_tokenizer,
    text,
    tokenizer_of,
    write_jsonl,
)
from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import open_tokenizer
from cheaptrain.errors import CheaptrainError, PreflightError

GOOD = b'{"text": "hello world"}\n'
DEEP = b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"


@pytest.mark.parametrize("lines", [GOOD + DEEP, DEEP + GOOD])
def test_brackets_nested_too_deep_end_in_a_traceback(tmp_path: Path, lines: bytes) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines)
    source = {"files": str(tmp_path / "a.jsonl")}
    with pytest.raises(PreflightError, match=r"a\.jsonl:\d: not JSON"):
        prepare(tmp_path, source)
    manifest, _ = prepare(tmp_path, source | {"on_bad_line": "skip"}, validation=0.0)
    assert (manifest.train.documents, manifest.skipped) == (1, 1)


def test_a_number_of_thousands_of_digits_makes_a_good_line_bad(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a", "id": ' + b"7" * 5000 + b"}\n")
    manifest, _ = prepare(tmp_path, {"files": str(tmp_path / "a.jsonl")}, validation=0.0)
    assert manifest.train.documents == 1


def test_one_shard_without_a_line_refuses_all_the_others(tmp_path: Path) -> None:
    (tmp_path / "0.jsonl").write_bytes(b"\xef\xbb\xbf")
    (tmp_path / "1.jsonl").write_bytes(b"\n \n" * 200)
    (tmp_path / "2.jsonl.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "3.jsonl").write_bytes(b"\n" * 200 + GOOD)
    manifest, printed = prepare(tmp_path, {"files": str(tmp_path / "*.jsonl*")}, validation=0.0)
    assert manifest.train.documents == 1 and "text column: text" in printed


def test_a_pipe_among_the_files_is_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    with pytest.raises(PreflightError, match="pipe"):
        prepare(tmp_path, {"files": str(tmp_path / "*.jsonl")})


@pytest.mark.parametrize("kind", ["category", "view"])
def test_text_of_pandas_categories_and_of_polars_is_taken_for_no_text(tmp_path: Path, kind: str) -> None:
    texts = [text(i) for i in range(5)] + [text(1)]
    column = pa.array(texts).dictionary_encode() if kind == "category" else pa.array(texts, pa.string_view())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    manifest, _ = prepare(tmp_path, {"files": str(tmp_path / "a.parquet")}, validation=0.0)
    assert documents_of(manifest, tokenizer_of(tmp_path)) == texts


def test_documents_of_which_the_tokenizer_makes_nothing_are_counted_as_documents(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "plain")
    backend = Tokenizer.from_file(str(tmp_path / "plain" / "tokenizer.json"))
    backend.normalizer = normalizers.Strip()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    hf.save_pretrained(tmp_path / "tokenizer")
    texts = ["  ", "hello", "\n", "world", " "]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    manifest, _ = prepare(tmp_path, {"files": str(tmp_path / "a.jsonl")}, validation=0.0)
    assert (manifest.train.documents, manifest.train.bytes, manifest.dropped) == (2, 10, 3)
    assert documents_of(manifest, tokenizer_of(tmp_path)) == ["hello", "world"]


def test_what_max_tokens_leaves_out_is_counted_as_dropped(tmp_path: Path) -> None:
    lines = ["", text(0), "", text(1), text(2), "", ""]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    source = {"files": str(tmp_path / "a.jsonl")}
    whole, _ = prepare(tmp_path, source, validation=0.0)
    assert (whole.train.documents, whole.dropped) == (3, 4)
    cut, _ = prepare(tmp_path, source | {"max_tokens": 50}, validation=0.0)
    assert (cut.train.documents, cut.dropped) == (2, 2)


@pytest.mark.parametrize("place", ["file", "below a file"])
def test_a_file_where_data_belongs_has_no_remedy(tmp_path: Path, place: str) -> None:
    (tmp_path / "occupied").write_text("x")
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(3)))}
    folder = tmp_path / "occupied" if place == "file" else tmp_path / "occupied" / "data"
    with pytest.raises(PreflightError, match=r"occupied.*set data\.dir to another"):
        prepare(tmp_path, source, dir=str(folder))


def test_disk_full_while_the_tokenizer_is_written_ends_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what the tokenizers library raises

    asked = recipe(
        tmp_path,
        {"files": str(write_jsonl(tmp_path / "a.jsonl", range(20)))},
        tokenizer={"train": {"vocab_size": 330, "sources": ["source0"]}},
    )
    with monkeypatch.context() as patch, pytest.raises(CheaptrainError, match=r"No space left.*make room"):
        patch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
        prepare_recipe(asked, console=quiet())
    assert not any(path.is_dir() for path in (tmp_path / "data" / "tokenizers").iterdir())
    prepare_recipe(asked, console=quiet())


@pytest.mark.parametrize("damage", ["edit", "cut", "record lost"])
def test_an_edited_tokenizer_passes_for_the_one_that_was_trained(tmp_path: Path, damage: str) -> None:
    asked = recipe(
        tmp_path,
        {"files": str(write_jsonl(tmp_path / "a.jsonl", range(20)))},
        tokenizer={"train": {"vocab_size": 330, "sources": ["source0"]}},
    )
    prepare_recipe(asked, console=quiet())
    (path,) = (tmp_path / "data" / "tokenizers").glob("*/tokenizer.json")
    whole = path.read_text()
    if damage == "record lost":
        (path.parent / "training.json").unlink()
    else:
        path.write_text(whole[:100] if damage == "cut" else json.dumps(json.loads(whole) | {"padding": None}))
    with pytest.raises(PreflightError, match=r"not as it was trained.*delete .*tokenizer\.path"):
        prepare_recipe(asked, console=quiet())


def test_a_token_made_special_in_the_configuration_alone_is_another_tokenizer(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "tokenizer")
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.add_tokens([AddedToken("<think>", special=False)])
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)
    before = open_tokenizer(str(folder))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<think>"]}))
    after = open_tokenizer(str(folder))
    assert before.special_ids != after.special_ids and before.fingerprint != after.fingerprint


@pytest.mark.parametrize(
    ("name", "written", "token_bytes", "remedy"),
    [
        ("a.bin", "<u4", None, "token_bytes = 4"),
        ("a.ds", "<u4", None, "token_bytes = 4"),
        ("a.bin", "<i8", None, "token_bytes = 4"),
        ("a.bin", "<i8", 4, "uint16 or uint32"),
    ],
)
def test_wide_tokens_read_as_narrow_ones_are_trained_on(
    tmp_path: Path, name: str, written: str, token_bytes: int | None, remedy: str
) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    ids = tokenizer_of(tmp_path).hf.encode(f"{text(1)}<|endoftext|>{text(2)}<|endoftext|>")
    (tmp_path / name).write_bytes(np.array(ids, written).tobytes())
    source: dict[str, Any] = {"tokens": str(tmp_path / name)}
    with pytest.raises(PreflightError, match=remedy):
        prepare(tmp_path, source | ({"token_bytes": token_bytes} if token_bytes else {}))
    if written == "<u4":
        manifest, _ = prepare(tmp_path, source | {"token_bytes": 4}, validation=0.0)
        assert (manifest.train.tokens, manifest.train.documents) == (len(ids), 2)


def test_an_archive_of_arrays_and_strange_metadata_end_in_a_traceback(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", ids=np.arange(3))
    (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    with pytest.raises(PreflightError, match=r"an \.npz archive"):
        prepare(tmp_path, {"tokens": str(tmp_path / "a.npy")})
    (tmp_path / "a.ds").write_bytes(np.array([2, 3, 0], "<u2").tobytes())
    (tmp_path / "a.ds.metadata").write_bytes(b"\xff\xfe|?\n")
    manifest, _ = prepare(tmp_path, {"tokens": str(tmp_path / "a.ds")}, validation=0.0)
    assert manifest.train.tokens == 3


def test_a_compiled_module_is_said_to_be_meant_for_itself(tmp_path: Path) -> None:
    with pytest.raises(PreflightError, match="'sys' has no Python code to read"):
        prepare(tmp_path, {"packages": "sys"})


def test_a_hub_file_without_rows_or_with_a_broken_one_is_not_explained(tmp_path: Path) -> None:
    (tmp_path / "hub").mkdir()
    path = tmp_path / "hub" / "train.jsonl"
    path.write_bytes(b"")
    with pytest.raises(PreflightError, match="its files hold nothing"):
        prepare(tmp_path, {"hub": str(tmp_path / "hub")})
    path.write_bytes(GOOD + b'{"text": oops\n')
    with pytest.raises(PreflightError, match="not lines at which the datasets library stops"):
        prepare(tmp_path, {"hub": str(tmp_path / "hub"), "on_bad_line": "skip"})
