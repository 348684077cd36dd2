"""Token shards that somebody else made, recognised and read where they lie.

    .ds (+ .ds.index, .ds.metadata)   datatrove: headerless uint16 or uint32, document ends as uint64
    .bin + .idx                       Megatron: headerless, any integer type, MMIDIDX index
    .bin with a 256-int32 header      llm.c and modded-nanogpt (uint16), llm.c for Llama 3 (uint32)
    .bin                              nanoGPT: headerless uint16, or uint32 with token_bytes = 4
    .npy                              build-nanogpt: one array of integers

Nothing in these files says which tokenizer made them. The trap: ids of another tokenizer train without an error and
mean nothing; all that can be checked is checked (every id lies inside the vocabulary, documents end with end-of-text),
and what is odd is printed.
"""

import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cheaptrain.data.files import InputHashes, cannot_read
from cheaptrain.data.shards import read_index
from cheaptrain.data.sources import Input, Plan, Unit, file_stamp, make_unit
from cheaptrain.data.sources.local import find_files
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

_HEADER_BYTES = 256 * 4
_HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}  # (magic, version) of llm.c → token type
_SAMPLE_TOKENS = 1 << 16
_LEAST_SAMPLE_TOKENS = 64
_LARGEST_UPPER_HALF = 3  # of a 4-byte id: vocabularies end at 2**18
_SIDECARS = (".ds.index", ".ds.metadata", ".idx")


@dataclass(frozen=True)
class TokenFile:
    """How to read a file of tokens. `index`: the file that says where documents end, if there is one."""

    path: str
    format: str
    dtype: str
    offset_bytes: int = 0
    index: str | None = None

    @property
    def tokens(self) -> int:
        return (os.path.getsize(self.path) - self.offset_bytes) // np.dtype(self.dtype).itemsize


def plan(source: schema.Source, hashes: InputHashes) -> Plan:
    """One unit a file. Raises PreflightError: no match, unknown format, cut file, a type against token_bytes."""
    assert source.tokens is not None
    paths, notes = find_files(source.tokens, f"source {source.name!r}: tokens")
    mains = sorted({_main_file(path) for path in paths})
    units: list[Unit] = []
    formats: dict[str, int] = {}
    for path in mains:
        stamp = file_stamp(path)
        file = recognise(path, source.token_bytes)
        read = [file.path] + ([file.index] if file.index else [])
        fingerprints = hashes.of(map(Path, read))
        inputs = [Input(name, sha, os.path.getsize(name)) for name, sha in zip(read, fingerprints, strict=True)]
        piece: dict[str, Any] = {"name": path, "path": path, "stamp": stamp, "format": file.format, "dtype": file.dtype}
        piece |= {"offset_bytes": file.offset_bytes, "index": file.index}
        units.append(make_unit(len(units), path, inputs, [piece], file.tokens))
        kind = f"{file.format} ({np.dtype(file.dtype).name})"
        formats[kind] = formats.get(kind, 0) + 1
    notes += [f"{count} file{'s' * (count > 1)} of {kind}" for kind, count in formats.items()]
    return Plan(tuple(units), tuple(notes))


def recognise(path: str, token_bytes: int | None = None) -> TokenFile:
    """Tell the format of a file by its name, its neighbours and its first bytes. Raises PreflightError."""
    try:
        file = _recognised(path, token_bytes)
        size = os.path.getsize(path)
    except OSError as error:
        raise PreflightError(cannot_read(error.filename or path, error)) from error
    itemsize = np.dtype(file.dtype).itemsize
    if token_bytes is not None and token_bytes != itemsize:
        raise PreflightError(f"{path}: {file.format} of {itemsize} bytes a token, but token_bytes = {token_bytes}")
    if (size - file.offset_bytes) % itemsize or size < file.offset_bytes:
        remedy = (
            "cut short, or token_bytes is wrong" if file.format == "nanoGPT" else "cut short: fetch or write it again"
        )
        raise PreflightError(f"{path}: {size:,} bytes are not a whole number of {itemsize}-byte tokens; {remedy}")
    if file.format in ("nanoGPT", "datatrove") and file.index is None and token_bytes != 2:
        _refuse_halves(file)
    return file


def _refuse_halves(file: TokenFile) -> None:
    """Wider tokens read as narrow ones are ids and zeros in turn, each of them inside the vocabulary."""
    sample = np.fromfile(file.path, file.dtype, _SAMPLE_TOKENS, offset=file.offset_bytes)
    upper = sample[1::2]
    if len(sample) < _LEAST_SAMPLE_TOKENS or upper.max() > _LARGEST_UPPER_HALF or sample.max() <= _LARGEST_UPPER_HALF:
        return
    size = np.dtype(file.dtype).itemsize
    remedy = "set token_bytes = 4, or 2 if it is right as it is" if size == 2 else "write it as uint16 or uint32"
    raise PreflightError(
        f"{file.path}: read as tokens of {size} bytes, every second one is 0 or next to it, so they are probably of "
        f"{2 * size} bytes; {remedy}"
    )


def document_ends(file: TokenFile, eot_id: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Where documents end, int64, empty ones included, from the index or else from the end-of-text ids.

    Raises PreflightError when the index does not fit the file.
    """
    if file.index is None:
        tokens = map_tokens(file)
        step = 1 << 24
        found = [np.flatnonzero(tokens[at : at + step] == eot_id) + at + 1 for at in range(0, len(tokens), step)]
        ends = np.concatenate([*found, np.empty(0, np.int64)]).astype(np.int64)
        return ends if len(tokens) == (ends[-1] if len(ends) else 0) else np.append(ends, len(tokens))
    if file.index.endswith(".idx"):
        ends = read_index(Path(file.index)).document_ends
    else:
        ends = np.fromfile(file.index, "<u8").astype(np.int64)
    last = int(ends[-1]) if len(ends) else 0
    if last != file.tokens or (np.diff(ends, prepend=0) < 0).any():
        raise PreflightError(
            f"{file.path}: {file.tokens:,} tokens, but {file.index} counts {last:,}; they do not belong together, or "
            "one was cut: fetch or write them again"
        )
    return ends


def map_tokens(file: TokenFile) -> "np.ndarray[tuple[int], np.dtype[np.integer]]":
    """The tokens, mapped read-only."""
    if not file.tokens:
        return np.empty(0, file.dtype)
    return np.asarray(np.memmap(file.path, file.dtype, "r", file.offset_bytes))


def _main_file(path: str) -> str:
    """The token file that a path belongs to: an index stands for its tokens."""
    for suffix in _SIDECARS:
        if path.endswith(suffix):
            main = path.removesuffix(suffix) + (".bin" if suffix == ".idx" else ".ds")
            if not os.path.isfile(main):
                raise PreflightError(f"{path}: an index without its tokens ({main} is missing)")
            return main
    return path


def _recognised(path: str, token_bytes: int | None) -> TokenFile:
    size = os.path.getsize(path)
    if path.endswith(".ds"):
        index = path + ".index" if os.path.isfile(path + ".index") else None
        return TokenFile(path, "datatrove", _datatrove_dtype(path, size, token_bytes), 0, index)
    if path.endswith(".npy"):
        return _numpy_file(path)
    if not path.endswith(".bin"):
        raise PreflightError(f"{path}: unknown kind of token shard; there are .ds, .bin, .bin with .idx, and .npy")
    index = path.removesuffix(".bin") + ".idx"
    if os.path.isfile(index):
        return TokenFile(path, "Megatron", read_index(Path(index)).dtype.str, 0, index)
    with open(path, "rb") as stream:
        header = np.frombuffer(stream.read(12).ljust(12, b"\0"), "<i4")
    dtype = _HEADERS.get((int(header[0]), int(header[1])))
    if dtype is not None and size == _HEADER_BYTES + int(header[2]) * np.dtype(dtype).itemsize:
        return TokenFile(path, "llm.c", dtype, _HEADER_BYTES)
    if dtype is not None:
        raise PreflightError(
            f"{path}: its header counts {int(header[2]):,} tokens, which is not its size; it was cut short"
        )
    return TokenFile(path, "nanoGPT", "<u4" if token_bytes == 4 else "<u2")


def _datatrove_dtype(path: str, size: int, token_bytes: int | None) -> str:
    """From `name|bytes` in the metadata, else from the size and the index, else `token_bytes`, else uint16."""
    itemsize = token_bytes or 2
    if os.path.isfile(path + ".metadata"):
        first = Path(path + ".metadata").read_text(errors="replace").partition("\n")[0].rpartition("|")[2]
        if first in ("2", "4"):
            return f"<u{first}"
    if os.path.isfile(path + ".index") and os.path.getsize(path + ".index") >= 8:
        last = int(np.fromfile(path + ".index", "<u8")[-1])
        itemsize = 4 if last and size == 4 * last else 2
    return f"<u{itemsize}"


def _numpy_file(path: str) -> TokenFile:
    try:
        array = np.load(path, mmap_mode="r")
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise PreflightError(f"{path}: not a whole .npy file ({error}); fetch or write it again") from error
    if not isinstance(array, np.ndarray):
        raise PreflightError(f"{path}: an .npz archive, not an .npy file; save its array alone with numpy.save")
    if not isinstance(array, np.memmap) or array.ndim != 1 or array.dtype.kind not in "ui":
        raise PreflightError(f"{path}: not one row of integer tokens but {array.dtype} of shape {array.shape}")
    return TokenFile(path, "npy", array.dtype.str, array.offset)
