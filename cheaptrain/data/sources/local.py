"""Local files: parquet by row groups, jsonl by byte ranges, compressed jsonl and txt by the file.

Files are taken in sorted order and cut into pieces; consecutive pieces fill a unit up to about `unit_bytes` of text. A
jsonl piece owns the lines that begin inside its byte range, so pieces can be read by different workers and every line
is read exactly once. The trap: a bad line must be named by its line in the file, which a worker that began in the
middle does not know; it counts the lines before it only when there is something to report.
"""

import glob
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from cheaptrain.data.files import InputHashes, cannot_read
from cheaptrain.data.sources import Bad, Document, Input, Plan, Unit, check_unchanged, file_stamp, make_unit
from cheaptrain.data.sources.column import Taken, choose, named, take, taken_columns
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

_SUFFIXES = {".parquet": "parquet", ".jsonl": "jsonl", ".ndjson": "jsonl", ".txt": "txt"}
_SUFFIXES |= {".jsonl.gz": "jsonl.gz", ".jsonl.zst": "jsonl.zst"}
_BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, pa.ArrowException)
_BOM = b"\xef\xbb\xbf"  # of a file that an editor on Windows wrote
_LINES_TO_JUDGE_BY = 100
_COMPRESSION = 3  # text bytes expected of one compressed byte; only progress and free space depend on it


def find_files(patterns: str | list[str], key: str) -> tuple[list[str], list[str]]:
    """Paths that the globs match, sorted, each file once; and notes. Raises PreflightError for a glob without match."""
    found: dict[str, str] = {}
    twice = 0
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        literal = os.path.isfile(pattern)  # a name may hold brackets
        globbed = [pattern] if literal else glob.glob(pattern, recursive=True)
        matches = sorted(path for path in globbed if not os.path.isdir(path))
        if not matches and os.path.isdir(pattern):
            raise PreflightError(
                f"{key}: {pattern!r} is a folder; write {pattern.rstrip('/')}/**/*.parquet or the like"
            )
        if not matches:
            what = "no file matches" if glob.has_magic(pattern) else "no such file:"
            raise PreflightError(f"{key}: {what} {pattern!r} (looked from {os.getcwd()}); check the path in the recipe")
        for path in matches:
            if os.path.exists(path) and not os.path.isfile(path):  # reading a pipe would wait for ever
                raise PreflightError(f"{key}: {path} is no regular file but a pipe or a device; write it to a file")
            twice += os.path.realpath(path) in found
            found.setdefault(os.path.realpath(path), path)
    notes = [f"{twice} file{'s' * (twice > 1)} given twice by {key}, read once"] if twice else []
    return sorted(found.values()), notes


def plan(source: schema.Source, unit_bytes: int, hashes: InputHashes) -> Plan:
    """Units over all files. Raises PreflightError: no match, unknown kind, unreadable, broken, wrong column."""
    assert source.files is not None
    key = f"source {source.name!r}: files"
    paths, notes = find_files(source.files, key)
    kinds = [_kind(path, key) for path in paths]
    stamps = [file_stamp(path) for path in paths]
    inputs = [
        Input(path, fingerprint, os.path.getsize(path))
        for path, fingerprint in zip(paths, hashes.of(map(Path, paths)), strict=True)
    ]
    tables = {
        path: _columns(path, kind)
        for path, kind, item in zip(paths, kinds, inputs, strict=True)
        if kind != "txt" and item.size
    }
    if source.format == "chat" and "txt" in kinds:
        raise PreflightError(f"{key}: {paths[kinds.index('txt')]}: a text file holds no conversations")
    taken: Taken | None = None
    for path, columns in tables.items():
        if not columns:
            continue  # one shard of many may hold nothing
        taken = choose(columns, source, taken, path)
    notes += named(source, taken, {name for columns in tables.values() for name in columns})
    pieces = []
    for path, kind, stamp, item in zip(paths, kinds, stamps, inputs, strict=True):
        pieces += [(item, piece | {"stamp": stamp}, size) for piece, size in _pieces(path, kind, taken, unit_bytes)]
    units: list[Unit] = []
    group: list[tuple[Input, dict[str, Any], int]] = []
    group_bytes = 0
    for index, entry in enumerate(pieces):
        group.append(entry)
        group_bytes += entry[2]
        alone = entry[1]["kind"] in ("jsonl.gz", "jsonl.zst")
        next_alone = index + 1 < len(pieces) and pieces[index + 1][1]["kind"] in ("jsonl.gz", "jsonl.zst")
        if alone or next_alone or index + 1 == len(pieces) or group_bytes >= unit_bytes:
            units.append(_unit(len(units), group, source.on_bad_line))
            group, group_bytes = [], 0
    return Plan(tuple(units), tuple(notes))


def documents(unit: Unit) -> Iterator[Document | Bad]:
    """The documents of a unit's pieces. Raises PreflightError when a file is gone, changed or broken as a whole."""
    for piece in unit.pieces:
        path = piece["path"]
        check_unchanged(piece)
        try:
            if piece["kind"] == "parquet":
                yield from _parquet(path, piece["row_group"], taken_columns(piece))
            elif piece["kind"] == "txt":
                with open(path, "rb") as file:
                    yield _decoded(file.read(), path)
            elif piece["kind"] == "jsonl":
                yield from _jsonl_range(path, piece["start"], piece["stop"], taken_columns(piece))
            else:
                with _decompressed(path, piece["kind"]) as stream:
                    for number, line in enumerate(stream, 1):
                        yield from json_document(line, taken_columns(piece), f"{path}:{number}", number == 1)
        except _BROKEN as error:
            raise PreflightError(f"{path}: broken or cut short ({error}); fetch or write it again") from error
        except OSError as error:
            raise PreflightError(_cannot_read(path, error)) from error
        check_unchanged(piece)


def json_document(line: bytes, taken: Taken, where: str, first: bool = False) -> Iterator[Document | Bad]:
    """The document of one JSON line; nothing for a blank one."""
    if first:
        line = line.removeprefix(_BOM)
    if line.isspace() or not line:
        return
    try:
        record = _parsed(line)
    except UnicodeDecodeError as error:
        yield Bad(where, f"not UTF-8 ({error.reason} at byte {error.start} of the line)")
    except (ValueError, RecursionError) as error:  # brackets nested thousands deep
        yield Bad(where, f"not JSON ({error})")
    else:
        if not isinstance(record, dict):
            column = taken if isinstance(taken, str) else next(iter(taken.values()))
            yield Bad(where, f"a JSON {type(record).__name__}, not an object with a column {column!r}")
        else:
            yield take(record, taken, where)


def _parsed(line: bytes) -> Any:
    """The JSON of a line. Numbers of thousands of digits, which Python refuses to read, stay text: nobody asks them."""
    try:
        return json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:
        return json.loads(line, parse_int=str)


def _kind(path: str, key: str) -> str:
    for suffix, kind in _SUFFIXES.items():
        if path.lower().endswith(suffix):
            return kind
    raise PreflightError(f"{key}: {path}: unknown kind of file; there are {', '.join(_SUFFIXES)}")


def _pieces(path: str, kind: str, taken: Taken | None, unit_bytes: int) -> Iterator[tuple[dict[str, Any], int]]:
    """(piece, expected bytes of text) for one file."""
    size = os.path.getsize(path)
    piece: dict[str, Any] = {"path": path, "name": path, "kind": kind}
    if kind != "txt":
        piece["columns" if isinstance(taken, dict) else "column"] = taken
    names = [taken] if isinstance(taken, str) else list((taken or {}).values())
    if kind == "parquet":
        metadata = _parquet_file(path).metadata
        for row_group in range(metadata.num_row_groups):
            group = metadata.row_group(row_group)
            chunks = [group.column(index) for index in range(group.num_columns)]
            text = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in names)
            yield piece | {"row_group": row_group}, text
    elif kind == "jsonl":
        step = max(1, unit_bytes)
        for start in range(0, size, step):
            stop = min(start + step, size)
            yield piece | {"start": start, "stop": stop}, stop - start
    else:
        yield piece, size * _COMPRESSION if kind != "txt" else size


def _unit(index: int, group: list[tuple[Input, dict[str, Any], int]], on_bad_line: str) -> Unit:
    first, last = group[0][1], group[-1][1]
    label = _place(first) if len(group) == 1 else f"{_place(first)} to {_place(last)}"
    return make_unit(
        index, label, [item for item, *_ in group], [piece for _, piece, _ in group], sum(size for *_, size in group),
        on_bad_line=on_bad_line,
    )  # fmt: skip


def _place(piece: dict[str, Any]) -> str:
    if "row_group" in piece:
        return f"{piece['name']} row group {piece['row_group']}"
    return f"{piece['name']} from byte {piece['start']:,}" if piece.get("start") else str(piece["name"])


def _columns(path: str, kind: str) -> dict[str, bool]:
    """Columns of a file, and whether each holds text; of jsonl, as far as its first lines tell. None in an empty file:
    one shard of many may hold nothing."""
    if kind == "parquet":
        return arrow_columns(_parquet_file(path).schema_arrow)
    columns: dict[str, bool] = {}
    blank = True
    try:
        with _decompressed(path, kind) as stream:
            lines = (line.removeprefix(_BOM) for line in stream)
            for line in islice(filter(bytes.strip, lines), _LINES_TO_JUDGE_BY):
                blank = False
                try:
                    record = _parsed(line)
                except (ValueError, RecursionError):
                    continue  # named, with its number, when the documents are read
                for name, value in record.items() if isinstance(record, dict) else ():
                    columns[name] = columns.get(name, False) or isinstance(value, str)
    except _BROKEN as error:
        raise PreflightError(f"{path}: broken or cut short ({error}); fetch or write it again") from error
    except OSError as error:
        raise PreflightError(_cannot_read(path, error)) from error
    if not columns and not blank:
        raise PreflightError(f"{path}:1: none of the first lines is a JSON object with columns; is this a jsonl file?")
    return columns


def arrow_columns(arrow_schema: pa.Schema) -> dict[str, bool]:
    """Columns of an Arrow schema, and whether each holds text."""
    return {field.name: _holds_text(field.type) for field in arrow_schema}


def _holds_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):  # a category of pandas
        return _holds_text(kind.value_type)
    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view))


def _parquet_file(path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise PreflightError(f"{path}: not a whole parquet file ({error}); fetch or write it again") from error
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error


def _parquet(path: str, row_group: int, taken: Taken) -> Iterator[Document | Bad]:
    file = _parquet_file(path)
    row = sum(file.metadata.row_group(index).num_rows for index in range(row_group))
    if not isinstance(taken, str):
        try:
            for batch in file.iter_batches(1024, row_groups=[row_group], columns=list(taken.values())):
                for record in batch.to_pylist():
                    yield take(record, taken, f"{path} row {row:,}")
                    row += 1
        except UnicodeDecodeError as error:
            raise PreflightError(f"{path}: row group {row_group} holds text that is not UTF-8 ({error})") from error
        return
    column = taken
    for batch in file.iter_batches(1024, row_groups=[row_group], columns=[column]):
        values = batch.column(0)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        try:
            texts = values.to_pylist()
        except UnicodeDecodeError:
            texts = [_decoded(raw, "") for raw in values.cast(pa.large_binary()).to_pylist()]
        for text in texts:
            # Files written by pyarrow may hold any bytes in a string column; text that decoded is clean.
            good = isinstance(text, str)
            yield text if good else Bad(f"{path} row {row:,}", getattr(text, "why", f"no value in column {column!r}"))
            row += 1


def _jsonl_range(path: str, start: int, stop: int, taken: Taken) -> Iterator[Document | Bad]:
    """Lines that begin in [start, stop)."""
    with open(path, "rb") as file:
        if start:
            file.seek(start - 1)
            file.readline()  # a line that began before `start` belongs to the piece before
        first_byte = position = file.tell()
        number = 0
        while position < stop and (line := file.readline()):
            number += 1
            for document in json_document(line, taken, "", first=position == 0):
                if isinstance(document, Bad):
                    document = Bad(f"{path}:{_lines_before(path, first_byte) + number}", document.why)
                yield document
            position += len(line)


def _lines_before(path: str, offset: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while offset and (block := file.read(min(offset, 1 << 20))):
            lines += block.count(b"\n")
            offset -= len(block)
    return lines


def _decompressed(path: str, kind: str) -> BinaryIO:
    if kind == "jsonl.gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if kind == "jsonl.zst":
        # Not the zstandard package: its reader takes a file that was cut short for one that ends.
        return io.BufferedReader(pa.input_stream(path, compression="zstd"), 1 << 20)  # type: ignore[arg-type]
    return open(path, "rb")


def _decoded(raw: bytes | None, where: str) -> str | Bad:
    if raw is None:
        return Bad(where, "no value")
    try:
        return raw.removeprefix(_BOM).decode()
    except UnicodeDecodeError as error:
        return Bad(where, f"not UTF-8 ({error.reason} at byte {error.start})")


def _cannot_read(path: str, error: OSError) -> str:
    """pyarrow raises OSError, without a number, for a stream that is cut short."""
    return (
        cannot_read(path, error) if error.errno else f"{path}: broken or cut short ({error}); fetch or write it again"
    )
