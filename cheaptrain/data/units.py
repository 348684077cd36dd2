"""One unit of preparing: read its documents, encode them, split off validation, write two shards and a record.

This is all a worker does, and it depends on nothing but the unit, the tokenizer and the settings below, so it does not
matter which worker does it, when, or how often. The record is renamed into place last: a unit without a record was not
done, and a record is believed only after the shards it names have been hashed again.

Whether a document is held out is decided by a hash of its text: the same document lands on the same side in every
source, whatever stands around it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheaptrain.data.encode import Encoder
from cheaptrain.data.files import sealed_json, write_atomically
from cheaptrain.data.shards import ShardWriter
from cheaptrain.data.sources import Bad, Unit, read_documents
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

FORMAT = 1
SPLITS = ("train", "val")
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """What every unit of a source has in common. `owner`: tells temporary files of this run from another's."""

    source: schema.Source
    directory: Path
    validation: float
    owner: str


def record_path(directory: Path, index: int) -> Path:
    """Where the record of a unit lies."""
    return directory / f"unit-{index:05d}.json"


def write_unit(job: Job, unit: Unit, limit: int | None, encoder: Encoder, progress: Progress) -> dict[str, Any]:
    """Prepare one unit; returns its record, which by then is on the disk.

    `limit`: stop after the document with which the training tokens reach it. `progress(text bytes, tokens)` is called
    for every batch. Raises PreflightError for a document that cannot be read, unless the source says to skip those.
    """
    dtype = encoder.spec.dtype
    writers = [ShardWriter(job.directory, f"{split}-{unit.index:05d}", dtype, job.owner) for split in SPLITS]
    text_bytes, reached, counts = [0, 0], False, {"dropped": 0, "skipped": 0}
    try:
        for texts, passed_over in _batches(read_documents(job.source, unit), job.source):
            encoded = [text.encode() for text in texts]
            sizes = np.fromiter(map(len, encoded), np.int64, len(encoded))
            held_out = is_held_out(encoded, job.validation)
            ids, lengths = encoder.encode(texts)
            filled = lengths > encoder.spec.added
            if not filled.all():  # a tokenizer may make nothing of spaces
                ids = ids[np.repeat(filled, lengths)]
                lengths = np.where(filled, lengths, 0)
            left = None if limit is None else limit - writers[0].tokens
            kept, reached = _documents_until(left, np.where(held_out, 0, lengths))
            for before, kind in passed_over:
                counts[kind] += before < kept or not reached
            counts["dropped"] += int(np.count_nonzero(~filled[:kept]))
            taken = np.flatnonzero(filled[:kept])
            sizes, held_out, lengths = sizes[taken], held_out[taken], lengths[taken]
            ids = ids[: int(lengths.sum())]
            of_split = np.repeat(held_out, lengths)
            for side, (writer, chosen) in enumerate(zip(writers, (~held_out, held_out), strict=True)):
                if chosen.any():
                    writer.add(ids[of_split == bool(side)], lengths[chosen])
                    text_bytes[side] += int(sizes[chosen].sum())
            progress(int(sizes.sum()), len(ids))
            if reached:
                break
        files = {name: written for writer in writers for name, written in writer.finish().items()}
    finally:
        for writer in writers:
            writer.discard()
    record: dict[str, Any] = {
        "format": FORMAT,
        "index": unit.index,
        "identity": unit.identity,
        "inputs": {item.name: item.fingerprint for item in unit.inputs},
        "limit": limit if reached else None,
        "dropped": counts["dropped"],
        "skipped": counts["skipped"],
        "files": files,
    }
    for split, writer, size in zip(SPLITS, writers, text_bytes, strict=True):
        record[split] = {"tokens": writer.tokens, "documents": writer.documents, "bytes": size}
    write_atomically(record_path(job.directory, unit.index), sealed_json(record), job.owner)
    return record


def _documents_until(left: int | None, train_tokens: NDArray[np.int64]) -> tuple[int, bool]:
    """How many documents to take until `train_tokens` [documents] add up to `left`, and whether they do."""
    if left is None:
        return len(train_tokens), False
    last = int(np.searchsorted(np.cumsum(train_tokens), left))
    return min(last + 1, len(train_tokens)), last < len(train_tokens)


def is_held_out(documents: Sequence[bytes], validation: float) -> NDArray[np.bool_]:
    """Which documents (UTF-8) are for validation, bool [documents]."""
    return held_out_by_digest((hashlib.blake2b(document, digest_size=8).digest() for document in documents), validation)


def held_out_by_digest(digests: Iterable[bytes], validation: float) -> NDArray[np.bool_]:
    """Those whose 8-byte hash falls into the lowest `validation` of all, bool [documents]."""
    hashes = np.frombuffer(b"".join(digests), "<u8")
    return np.ones(len(hashes), bool) if validation >= 1 else hashes < np.uint64(int(validation * 2**64))


def _batches(
    documents: Iterator[str | Bad], source: schema.Source
) -> Iterator[tuple[list[str], list[tuple[int, str]]]]:
    """Documents worth encoding, about a megabyte at a time; and what was passed over: (documents of the batch before
    it, "dropped" for an empty one or "skipped" for a bad one)."""
    batch: list[str] = []
    passed_over: list[tuple[int, str]] = []
    size = 0
    for document in documents:
        if isinstance(document, Bad):
            if source.on_bad_line == "error":
                remedy = f'mend it, or set on_bad_line = "skip" for source {source.name!r} to leave such documents out'
                raise PreflightError(f"{document.where}: {document.why}; {remedy}")
            passed_over.append((len(batch), "skipped"))
        elif not document:
            passed_over.append((len(batch), "dropped"))
        else:
            batch.append(document)
            size += len(document)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, passed_over
                batch, passed_over, size = [], [], 0
    if batch or passed_over:
        yield batch, passed_over
