"""What a teacher said of every token of a run, on the disk: its k likeliest next tokens, and the mass of all others.

The rows of a run are numbered, and which row has which number depends on data and seed alone (`order.py`), so what is
said of row i is entry i, whoever reads it and on however many processes. A folder holds `cache.json` (what it is a
cache of), shards of consecutive rows with the hash of each beside it, and `manifest.json` with all hashes once nothing
is missing. Each file is written whole or not at all, so a killed writer goes on with the first shard that is not there,
and several writers may share the shards out. The trap: a cache that belongs to other rows, another teacher or another
temperature has the same shapes; everything that decides its numbers stands in `cache.json` and is compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cheaptrain.data.files import TEMPORARY_PREFIX, cannot_read, read_sealed, sealed_json, write_atomically
from cheaptrain.data.manifest import bad_files
from cheaptrain.data.stream import Int64
from cheaptrain.durable import sha256_of
from cheaptrain.errors import CheaptrainError, PreflightError

REMEDY = "run: cheaptrain distill-cache RECIPE"
_FORMAT = 1
_SHARD_BYTES = 2**26
_CONTENT, _MANIFEST = "cache.json", "manifest.json"


@dataclass(frozen=True)
class CacheSpec:
    """`made_from`: all that decides what is said, as JSON values. `rows_per_shard` decides nothing but the files."""

    made_from: Mapping[str, Any]
    rows: int
    seq_len: int
    top_k: int
    vocab: int
    rows_per_shard: int

    @property
    def id_dtype(self) -> "np.dtype[np.integer]":
        """Of token ids."""
        return np.dtype(np.uint16 if self.vocab <= 2**16 else np.int32)

    @property
    def row_bytes(self) -> int:
        """What is said of one row: an id and an fp32 logarithm for each of k tokens, and one for all others."""
        return self.seq_len * (self.top_k * (self.id_dtype.itemsize + 4) + 4)

    @property
    def shards(self) -> int:
        return -(-self.rows // self.rows_per_shard)

    def shard_rows(self, number: int) -> range:
        """The rows that shard `number` holds."""
        return range(number * self.rows_per_shard, min(self.rows, (number + 1) * self.rows_per_shard))


@dataclass(frozen=True)
class Said:
    """Of n rows: `ids` [n, seq, k], `log_probabilities` fp32 [n, seq, k], `log_rest` fp32 [n, seq]."""

    ids: NDArray[np.integer]
    log_probabilities: NDArray[np.float32]
    log_rest: NDArray[np.float32]


def rows_per_shard(row_bytes: int, micro_batch_size: int) -> int:
    """About 64 MiB, in whole micro-batches: so that a teacher is asked in the portions that training would ask in."""
    return max(1, _SHARD_BYTES // (row_bytes * micro_batch_size)) * micro_batch_size


def begin_cache(folder: Path, spec: CacheSpec) -> CacheSpec:
    """Make the folder of a cache, or find it begun; returns the spec with the shards it has. Raises PreflightError when
    it is the cache of something else."""
    path = folder / _CONTENT
    if path.is_file():
        there = _read_spec(folder)
        if differing := differences(there, spec):
            raise PreflightError(
                f"{folder} is the cache of something else ({'; '.join(differing)}): give another distill.cache"
            )
        return there
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise PreflightError(f"{folder} is not empty and no cache: give another distill.cache")
    write_atomically(path, sealed_json({"format": _FORMAT, **asdict(spec)}))
    return spec


def has_shard(folder: Path, spec: CacheSpec, number: int) -> bool:
    """Whether a shard is there, whole."""
    entry = _entry(folder, number)
    return entry is not None and not bad_files(folder, {f"{_name(number)}.safetensors": entry})


def write_shard(folder: Path, spec: CacheSpec, number: int, said: Said) -> None:
    """Write what was said of the rows of one shard, then its hash. Raises CheaptrainError when the disk is full."""
    name = _name(number)
    for left in folder.glob(f"{TEMPORARY_PREFIX}*-{name}.*"):
        left.unlink(missing_ok=True)  # of a writer that was killed
    content = save(
        {
            "ids": np.ascontiguousarray(said.ids, spec.id_dtype),
            "log_probabilities": np.ascontiguousarray(said.log_probabilities, np.float32),
            "log_rest": np.ascontiguousarray(said.log_rest, np.float32),
        }
    )
    path = folder / f"{name}.safetensors"
    try:
        write_atomically(path, content)
        entry = {"bytes": len(content), "sha256": sha256_of(path)}
        write_atomically(folder / f"{name}.json", sealed_json({"file": entry}))
    except OSError as error:
        raise CheaptrainError(f"{path}: {error.strerror}; the same command goes on with this shard") from error


def finish_cache(folder: Path, spec: CacheSpec) -> list[int]:
    """Write the manifest when no shard is missing; returns those that are."""
    entries = {f"{_name(number)}.safetensors": _entry(folder, number) for number in range(spec.shards)}
    missing = [number for number, entry in enumerate(entries.values()) if entry is None]
    if not missing:
        write_atomically(folder / _MANIFEST, sealed_json({"files": entries}))
    return missing


@dataclass(frozen=True)
class TopKCache:
    """A finished cache, to be read from."""

    folder: Path
    spec: CacheSpec
    files: Mapping[str, Mapping[str, Any]]

    def verify(self) -> None:
        """Hash every shard. Raises PreflightError naming the first that is not what was written."""
        if problems := bad_files(self.folder, self.files):
            raise PreflightError(f"{problems[0]}; remove it, and {REMEDY}: it makes only that shard again")

    def read(self, rows: Int64) -> Said:
        """What was said of rows [n], by their number in the run. Raises PreflightError for a row it does not hold."""
        if rows.size and rows.max() >= self.spec.rows:
            raise PreflightError(
                f"{self.folder} holds {self.spec.rows:,} rows, and row {rows.max():,} is asked for: the run is longer "
                "than the one it was made for; give another distill.cache"
            )
        parts = [self._row(*divmod(row, self.spec.rows_per_shard)) for row in rows.tolist()]
        return Said(*(np.stack([part[name] for part in parts]) for name in ("ids", "log_probabilities", "log_rest")))

    def _row(self, shard: int, row: int) -> dict[str, Any]:
        file = self._open(shard)
        return {name: file.get_slice(name)[row] for name in ("ids", "log_probabilities", "log_rest")}

    def _open(self, shard: int) -> Any:
        if shard not in self._opened:
            path = self.folder / f"{_name(shard)}.safetensors"
            try:
                self._opened[shard] = safe_open(path, framework="numpy")
            except (OSError, SafetensorError) as error:
                raise PreflightError(f"{path}: cannot be read ({error}); {REMEDY}") from error
        return self._opened[shard]

    @cached_property
    def _opened(self) -> dict[int, Any]:
        return {}


def open_cache(folder: Path) -> TopKCache:
    """A finished cache. Raises PreflightError when there is none, or it is not finished."""
    if not (folder / _CONTENT).is_file():
        raise PreflightError(f"distill.cache: there is no cache in {folder}; {REMEDY}")
    spec = _read_spec(folder)
    if not (folder / _MANIFEST).is_file():
        there = sum((folder / f"{_name(number)}.json").is_file() for number in range(spec.shards))
        raise PreflightError(f"distill.cache: {folder} has {there:,} of {spec.shards:,} shards; {REMEDY}")
    return TopKCache(folder, spec, _sealed(folder / _MANIFEST)["files"])


def differences(there: CacheSpec, wanted: CacheSpec) -> list[str]:
    """In words, what a cache differs in from one that is wanted; how it is cut into shards does not matter, and neither
    do further rows."""
    lines = []
    if there.rows < wanted.rows:
        lines.append(f"rows: {there.rows:,} there, {wanted.rows:,} wanted")
    for key in ("seq_len", "top_k", "vocab"):
        if getattr(there, key) != getattr(wanted, key):
            lines.append(f"{key}: {getattr(there, key):,} there, {getattr(wanted, key):,} wanted")
    old, new = _flat(there.made_from), _flat(wanted.made_from)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            lines.append(f"{key}: {_short(old.get(key))} there, {_short(new.get(key))} wanted")
    return lines


def _flat(made_from: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in made_from.items():
        flat |= {f"{key}.{name}": inner for name, inner in value.items()} if isinstance(value, dict) else {key: value}
    return flat


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 24 else f"{text[:20]}..."


def _read_spec(folder: Path) -> CacheSpec:
    content = _sealed(folder / _CONTENT)
    if (version := content.pop("format", None)) != _FORMAT:
        raise PreflightError(
            f"{folder}: a cache of format {version}, and this cheaptrain reads {_FORMAT}; make it anew"
        )
    try:
        return CacheSpec(**content)
    except TypeError as error:
        raise PreflightError(f"{folder / _CONTENT}: damaged ({error}); make the cache anew") from error


def _sealed(path: Path) -> dict[str, Any]:
    try:
        return read_sealed(path)
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error
    except ValueError as error:
        raise PreflightError(f"{path}: damaged ({error}); {REMEDY}, into another folder") from error


def _entry(folder: Path, number: int) -> dict[str, Any] | None:
    path = folder / f"{_name(number)}.json"
    return _sealed(path)["file"] if path.is_file() else None


def _name(number: int) -> str:
    return f"rows-{number:06d}"
