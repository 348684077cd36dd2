"""A prepared source as a stream of tokens, whether the shards are ours or somebody else's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cheaptrain.data.files import cannot_read
from cheaptrain.data.manifest import REMEDY, Manifest
from cheaptrain.data.shards import read_index
from cheaptrain.data.stream import Shard, TokenStream
from cheaptrain.errors import PreflightError


def open_stream(manifest: Manifest, split: Literal["train", "val"]) -> TokenStream:
    """The documents of one side of the split, in order. Raises PreflightError naming a shard that is missing or cut."""
    return TokenStream([_shard(manifest, unit, split) for unit in manifest.units if unit[split]["documents"]])


def _shard(manifest: Manifest, unit: Mapping[str, Any], split: str) -> Shard:
    directory, number = manifest.directory, f"{unit['index']:05d}"
    if "read_from" not in unit:
        index = read_index(directory / f"{split}-{number}.idx")
        return Shard(directory / f"{split}-{number}.bin", manifest.dtype, index.document_ends)
    origin = unit["read_from"]
    ends = _array(directory / f"ends-{number}.npy")
    shard = Shard(Path(origin["path"]), np.dtype(origin["dtype"]), ends, origin["offset_bytes"])
    chosen = _array(directory / f"{split}-{number}.npy")
    return shard if len(chosen) == len(ends) else shard.select(chosen)


def _array(path: Path) -> Any:
    try:
        return np.load(path)
    except OSError as error:
        raise PreflightError(cannot_read(path, error)) from error
    except ValueError as error:
        raise PreflightError(f"{path}: damaged ({error}); {REMEDY}") from error
