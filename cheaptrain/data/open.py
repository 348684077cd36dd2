"""A prepared source as rows, whether it holds text or conversations, in our shards or somebody else's."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cheaptrain.data.documents import Documents
from cheaptrain.data.files import cannot_read
from cheaptrain.data.manifest import REMEDY, Manifest
from cheaptrain.data.packing import pack
from cheaptrain.data.rows import PackedRows, RowSource, StreamRows
from cheaptrain.data.shards import read_index
from cheaptrain.data.stream import Shard, TokenStream
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Data
from cheaptrain.recipe.shares import SourceFacts

Split = Literal["train", "val"]


def open_rows(manifest: Manifest, data: Data, seed: int, assistant_only: bool) -> RowSource:
    """The rows that training reads of a source. `seed` deals the conversations out to rows; `assistant_only`: what
    others say in them is no target. Raises PreflightError naming a shard that is missing or cut, or a conversation that
    does not fit a row."""
    if not holds_chats(manifest):
        return StreamRows.whole(open_stream(manifest, "train"), data.seq_len, data.document_mask)
    documents = open_documents(manifest, "train")
    return PackedRows(documents, pack(documents.lengths, data.seq_len, seed), assistant_only)


def open_held_out(manifest: Manifest, data: Data, max_tokens: int, assistant_only: bool) -> RowSource:
    """The rows that validation reads: the first `max_tokens` tokens of what is held out, or no row where none of them
    is a target. Of conversations it takes whole ones, and one at least."""
    if not holds_chats(manifest):
        return held_out_rows(open_stream(manifest, "val"), data.seq_len, max_tokens, data.document_mask)
    documents = open_documents(manifest, "val")
    fitting = int(np.searchsorted(np.cumsum(documents.lengths - 1), max_tokens, side="right"))
    held = documents.lengths[: max(1, fitting) if max_tokens else 0]
    return PackedRows(documents, pack(held, data.seq_len), assistant_only)


def held_out_rows(stream: TokenStream, seq_len: int, max_tokens: int, document_mask: bool) -> StreamRows:
    """The first `most` input positions of a stream as rows, the last one padded; none when none has a target."""
    inputs = max(0, min(max_tokens, stream.tokens - 1))
    if inputs and document_mask and len(stream.document_starts(0, inputs + 1)) == inputs:
        inputs = 0  # every next token starts a document
    return StreamRows(stream, seq_len, document_mask, inputs)


def source_facts(manifest: Manifest, seq_len: int) -> SourceFacts:
    """What the numbers of a run are derived from. How many rows conversations fill is known when they are packed."""
    facts = manifest.facts()
    if not holds_chats(manifest):
        return facts
    return replace(facts, packed_rows=pack(open_documents(manifest, "train").lengths, seq_len).rows)


def holds_chats(manifest: Manifest) -> bool:
    """Whether the documents of a source are conversations: then a mask lies beside every shard."""
    return any(name.endswith(".mask") for name in manifest.files)


def open_documents(manifest: Manifest, split: Split) -> Documents:
    """The conversations of one side of the split, in order, with their masks."""
    shards = [_shard(manifest, unit, split) for unit in manifest.units if unit[split]["documents"]]
    masks = [Shard(shard.bin.with_suffix(".mask"), np.uint8, shard.document_ends) for shard in shards]
    return Documents(TokenStream(shards), TokenStream(masks))


def open_stream(manifest: Manifest, split: Split) -> TokenStream:
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
