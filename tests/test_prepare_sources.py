"""Every kind of source gives the documents it should; every kind of bad input is named with its place and remedy."""

import gzip
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from prepare_helpers import documents_of, prepare, quiet, recipe, said, text, tokenizer_of, write_jsonl

from cheaptrain.data.open import open_stream
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.sources import drills
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.recipe.schema import Drills


def test_jsonl_cut_into_byte_ranges_reads_every_line_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    manifest, printed = prepare(tmp_path, {"files": str(path)}, unit_bytes=1000, validation=0.0)
    assert len(manifest.units) > 20
    assert documents_of(manifest, tokenizer_of(tmp_path)) == [text(i) for i in range(100)]
    assert "text column: text" in printed


@pytest.mark.parametrize("kind", ["parquet", "jsonl.gz", "jsonl.zst", "txt"])
def test_every_format_gives_the_same_documents(tmp_path: Path, kind: str) -> None:
    lines = "".join(json.dumps({"content": text(i)}) + "\n" for i in range(20)).encode()
    if kind == "parquet":
        pq.write_table(pa.table({"content": [text(i) for i in range(20)]}), tmp_path / "a.parquet", row_group_size=6)
    elif kind == "jsonl.gz":
        (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":  # two frames, as parallel compressors write
        half = lines.index(b"\n", len(lines) // 2) + 1
        frames = [zstandard.compress(part) for part in (lines[:half], lines[half:])]
        (tmp_path / "a.jsonl.zst").write_bytes(b"".join(frames))
    else:
        for i in range(20):
            (tmp_path / f"{i:02d}.txt").write_text(text(i))
    manifest, _ = prepare(tmp_path, {"files": f"{tmp_path}/*.{kind}"}, unit_bytes=2000, validation=0.0)
    assert documents_of(manifest, tokenizer_of(tmp_path)) == [text(i) for i in range(20)]
    assert manifest.train.bytes == sum(len(text(i).encode()) for i in range(20))


def test_hub_layout_gives_one_unit_a_file_and_detects_the_column(tmp_path: Path) -> None:
    folder = tmp_path / "dataset" / "data"
    folder.mkdir(parents=True)
    for part in range(3):
        table = pa.table({"id": list(range(4)), "body": [text(part * 4 + i) for i in range(4)]})
        pq.write_table(table, folder / f"train-{part:05d}-of-00003.parquet")
    manifest, printed = prepare(tmp_path, {"hub": str(tmp_path / "dataset")}, validation=0.0)
    assert len(manifest.units) == 3 and "text column: body" in printed
    assert documents_of(manifest, tokenizer_of(tmp_path)) == [text(i) for i in range(12)]
    with pytest.raises(PreflightError, match=r"no column 'txt'.*id, body"):
        prepare(tmp_path, {"hub": str(tmp_path / "dataset"), "column": "txt"})
    with pytest.raises(PreflightError, match="validation"):
        prepare(tmp_path, {"hub": str(tmp_path / "dataset"), "split": "validation"})


def test_packages_are_read_without_importing_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "lib" / "explosive"
    package.mkdir(parents=True)
    code = '"""First line.\n\n    Indented.\n    """\nraise SystemExit("imported")\n\n'
    code += (
        'class A:\n    "About A."\n    def go(self, to, *, fast=True):\n        """Go there.\n\n        At once."""\n'
    )
    (package / "__init__.py").write_text(code)
    (package / "bare.py").write_text("x = 1\n")
    (tmp_path / "lib" / "single.py").write_text('"""A module in one file."""\n')
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    source = {"packages": ["explosive", "single"]}
    manifest, _ = prepare(tmp_path, source, {"name": "code", **source, "content": "code"}, validation=0.0)
    first, second = documents_of(manifest, tokenizer_of(tmp_path))
    assert first == (
        "module explosive\n\nFirst line.\n\nIndented.\n\nclass explosive.A\n\nAbout A.\n\n"
        "explosive.A.go(self, to, fast)\n\nGo there.\n\nAt once."
    )
    assert second == "module single\n\nA module in one file."
    assert manifest.dropped == 1  # bare.py has no docstring
    whole = prepare_recipe(recipe(tmp_path, {**source, "content": "code"}, validation=0.0), console=quiet())[0]
    assert documents_of(whole, tokenizer_of(tmp_path))[0] == code


def test_standard_library_module_and_nearest_name(tmp_path: Path) -> None:
    manifest, _ = prepare(tmp_path, {"packages": ["argparse", "os", "xml.sax"]}, validation=0.0)
    texts = documents_of(manifest, tokenizer_of(tmp_path))
    assert any(item.startswith("module argparse\n\n") for item in texts)
    assert any(item.startswith("module xml.sax.handler\n\n") for item in texts)
    with pytest.raises(PreflightError, match=r"called 'argprase'.*did you mean 'argparse'"):
        prepare(tmp_path, {"packages": "argprase"})


def test_drills_are_the_same_everywhere_and_right() -> None:
    # Written once and for all: another text here means every prepared drill changed.
    assert drills.drill(Drills(documents=1), 0) == GOLDEN_DRILL
    for number in range(200):
        for line in drills.drill(Drills(documents=1, digits=9, seed=3), number).splitlines():
            figures = [int(part) for part in "".join(c if c.isdigit() else " " for c in line).split()]
            a, b, c = figures
            assert c in (a + b, a - b, b - a, a * b), line


GOLDEN_DRILL = """What is 6 times 91? 546.
Multiplying 9 by 2 gives 18.
What is 5 times 77? 385.
5 * 2 = 10
What is 51 times 4? 204.
4 - 2 = 2
What is 3 times 83? 249.
4 times 7 is 28."""


def test_drills_do_not_depend_on_the_unit_size(tmp_path: Path) -> None:
    source = {"drills": {"documents": 50, "digits": 3, "seed": 1}}
    one, _ = prepare(tmp_path, source, validation=0.2)
    many, _ = prepare(tmp_path, source, validation=0.2, unit_bytes=1000)
    assert len(one.units) == 1 and len(many.units) == 10
    for split in ("train", "val"):
        whole, parts = open_stream(one, split), open_stream(many, split)  # type: ignore[arg-type]
        assert np.array_equal(whole.read(0, whole.tokens), parts.read(0, parts.tokens))


def test_same_document_lands_on_the_same_side_in_every_source(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(200))
    pq.write_table(pa.table({"text": [text(i) for i in range(100, 300)]}), tmp_path / "b.parquet")
    sources = [{"files": str(tmp_path / name)} for name in ("a.jsonl", "b.parquet")]
    a, b = prepare_recipe(recipe(tmp_path, *sources, validation=0.2), console=quiet())
    tokenizer = tokenizer_of(tmp_path)
    held_a, held_b = ({*documents_of(manifest, tokenizer, "val")} for manifest in (a, b))
    common = {text(i) for i in range(100, 200)}
    assert held_a & common == held_b & common
    assert 20 <= len(held_a) <= 60 and not held_a & {*documents_of(a, tokenizer)}
    assert len(held_a) + a.train.documents == 200


def test_a_source_without_held_out_documents_says_so(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(3))
    manifest, printed = prepare(tmp_path, {"files": str(path)}, validation=0.0001)
    assert manifest.val.documents == 0 and open_stream(manifest, "val").tokens == 0
    assert "no document is held out" in printed


def test_literal_special_tokens_in_text_stay_text(tmp_path: Path) -> None:
    quoted = "to end a document write <|endoftext|> and <|im_start|> to start a turn"
    (tmp_path / "a.txt").write_text(quoted)
    manifest, _ = prepare(tmp_path, {"files": str(tmp_path / "a.txt")}, validation=0.0)
    assert documents_of(manifest, tokenizer_of(tmp_path)) == [quoted]  # asserts one end of text, at the end


def test_bytes_of_text_equal_the_bytes_of_the_tokens(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(60))
    manifest, _ = prepare(tmp_path, {"files": str(path)}, validation=0.3)
    table = tokenizer_of(tmp_path).token_bytes()
    for split, totals in (("train", manifest.train), ("val", manifest.val)):
        stream = open_stream(manifest, split)  # type: ignore[arg-type]
        assert (stream.tokens, stream.documents) == (totals.tokens, totals.documents)
        assert table[stream.read(0, stream.tokens)].sum() == totals.bytes > 0


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"text": "\xff\xfe"}', "not UTF-8"),
        (b'{"text": null}', "no value in column 'text'"),
        (b'{"other": "x"}', "no value in column 'text'"),
        (b'{"text": 3}', "holds a int"),
        (b'["text"]', "a JSON list"),
        (b'{"text": "\\ud800"}', "surrogate"),
    ],
)
def test_bad_line_is_named_or_skipped_and_counted(tmp_path: Path, line: bytes, why: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(30))
    path.write_bytes(path.read_bytes() + b"\n" + line + b"\n" + b'{"text": "the end"}\n{"text": ""}')
    source = {"files": str(path)}
    with pytest.raises(PreflightError, match=rf"a\.jsonl:32: .*{why}.*on_bad_line"):
        prepare(tmp_path, source, unit_bytes=1500)
    manifest, _ = prepare(tmp_path, source | {"on_bad_line": "skip"}, unit_bytes=1500, validation=0.0)
    assert (manifest.train.documents, manifest.skipped, manifest.dropped) == (31, 1, 1)


def test_bad_utf8_in_txt_and_null_in_parquet_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"fine \xff")
    with pytest.raises(PreflightError, match=r"bad\.txt: not UTF-8 .*byte 5"):
        prepare(tmp_path, {"files": str(tmp_path / "bad.txt")})
    pq.write_table(pa.table({"text": ["a", "b", None]}), tmp_path / "a.parquet", row_group_size=2)
    with pytest.raises(PreflightError, match=r"a\.parquet row 2: no value in column 'text'"):
        prepare(tmp_path, {"files": str(tmp_path / "a.parquet")})
    raw = pa.array([b"good", b"b\xffd"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "b.parquet")
    with pytest.raises(PreflightError, match=r"b\.parquet row 1: not UTF-8"):
        prepare(tmp_path, {"files": str(tmp_path / "b.parquet")})


def test_broken_files_are_named(tmp_path: Path) -> None:
    lines = "".join(json.dumps({"text": text(i), "noise": os.urandom(60).hex()}) + "\n" for i in range(2000)).encode()
    for name, content in (("a.jsonl.gz", gzip.compress(lines)), ("b.jsonl.zst", zstandard.compress(lines))):
        (tmp_path / name).write_bytes(content[: len(content) * 2 // 3])
        with pytest.raises(PreflightError, match=rf"{name}: broken or cut short"):
            prepare(tmp_path, {"files": str(tmp_path / name)})
    (tmp_path / "c.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(PreflightError, match=r"c\.parquet: not a whole parquet file"):
        prepare(tmp_path, {"files": str(tmp_path / "c.parquet")})


def test_all_problems_of_all_sources_come_at_once(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(3))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "x.csv").write_text("a,b")
    sources = [
        {"files": str(tmp_path / "missing.jsonl")},
        {"files": str(tmp_path / "*.nothing")},
        {"files": str(path), "column": "txt"},
        {"files": str(tmp_path / "empty.jsonl")},
        {"files": str(tmp_path / "x.csv")},
        {"files": str(tmp_path)},
    ]
    with pytest.raises(PreflightError) as caught:
        prepare(tmp_path, *sources)
    message = str(caught.value)
    for part in (
        "no such file",
        "no file matches",
        "no column 'txt'; ",
        "text, id",
        "is empty",
        "unknown kind",
        "a folder",
    ):
        assert part in message
    assert message.count("\n") == 5


def test_a_source_of_empty_documents_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": ""}\n{"text": ""}\n')
    with pytest.raises(PreflightError, match="'source0' is empty"):
        prepare(tmp_path, {"files": str(tmp_path / "a.jsonl")})
    write_jsonl(tmp_path / "b.jsonl", range(3))
    with pytest.raises(PreflightError, match="held out"):
        prepare(tmp_path, {"files": str(tmp_path / "b.jsonl")}, validation=1.0)


def test_a_file_in_two_globs_is_read_once_and_that_is_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", range(5))
    manifest, printed = prepare(tmp_path, {"files": [f"{tmp_path}/*.jsonl", f"{tmp_path}/a.*"]}, validation=0.0)
    assert manifest.train.documents == 5 and "1 file given twice" in printed


@pytest.mark.parametrize("unit_bytes", [2000, 10**6])
def test_max_tokens_stops_at_the_document_that_reaches_it(tmp_path: Path, unit_bytes: int) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(300))
    whole, _ = prepare(tmp_path, {"files": str(path)}, unit_bytes=unit_bytes, validation=0.1)
    ends = np.append(open_stream(whole, "train").document_starts(0, whole.train.tokens), whole.train.tokens)
    wanted = int(ends[np.searchsorted(ends, 3000)])
    for workers in (1, 3):
        limited = {"files": str(path), "max_tokens": 3000}
        data_dir = str(tmp_path / f"data{workers}")
        part, _ = prepare(tmp_path, limited, unit_bytes=unit_bytes, validation=0.1, workers=workers, dir=data_dir)
        assert part.train.tokens == wanted
        stream = open_stream(part, "train")
        assert np.array_equal(stream.read(0, wanted), open_stream(whole, "train").read(0, wanted))
        assert len(list(part.directory.glob("unit-*.json"))) == len(part.units)  # nothing beyond is kept


def test_no_space_is_refused_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(PreflightError, match=r"free, but the tokens will take at least .*max_tokens"):
        prepare(tmp_path, {"files": str(path)})


def test_disk_full_in_the_middle_gives_one_message_and_leaves_no_half_unit(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    wrapper = tmp_path / "lib"
    wrapper.mkdir()
    # A worker imports sitecustomize at start: let its third fsync find the disk full.
    (wrapper / "sitecustomize.py").write_text(
        "import errno, os\nreal, calls = os.fsync, []\n"
        "def fsync(fd):\n    calls.append(fd)\n"
        "    if len(calls) > 12: raise OSError(errno.ENOSPC, 'No space left on device')\n    return real(fd)\n"
        "os.fsync = fsync\n"
    )
    import sys

    sys.path.insert(0, str(wrapper))
    try:
        with pytest.raises(CheaptrainError, match=r"no space left on the disk.*unit 1.*same command again"):
            prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    finally:
        sys.path.remove(str(wrapper))
    (folder,) = (tmp_path / "data").glob("source0-*")
    assert not list(folder.glob(".tmp-*")) and (folder / "unit-00000.json").exists()
    assert not (folder / "manifest.json").exists()
    manifest, _ = prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    assert manifest.train.documents + manifest.val.documents == 100


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
def test_no_permission_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(3))
    path.chmod(0)
    with pytest.raises(PreflightError, match=r"a\.jsonl: no permission to read"):
        prepare(tmp_path, {"files": str(path)})
    path.chmod(0o600)
    (tmp_path / "data").chmod(0o500)
    with pytest.raises(PreflightError, match="no permission to write"):
        prepare(tmp_path, {"files": str(path)})


def test_real_parquet_of_every_kind_is_prepared(tmp_path: Path) -> None:
    shared = Path(__file__).parents[2] / "shared" / "data" / "pretrain" / "math.parquet"
    if not shared.is_file():
        pytest.skip(f"{shared} is not there")
    manifest, printed = prepare(tmp_path, {"files": str(shared), "max_tokens": 20_000})
    assert 20_000 <= manifest.train.tokens < 30_000 and manifest.skipped == 0
    assert str(manifest.directory) in printed.replace("\n", "")


def test_brackets_in_names_are_printed_as_they_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "part[1].jsonl", range(3))
    console = quiet()
    (tmp_path / "[b]").mkdir()
    asked = recipe(tmp_path, {"files": str(path)}, validation=0.0, dir=str(tmp_path / "[b]"))  # no glob: that name
    assert prepare_recipe(asked, console=console)[0].train.documents == 3
    assert "source0: text column: text" in said(console) and "/[b]/source0-" in said(console)
