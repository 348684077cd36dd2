"""One unit of preparing: read its documents, encode them, split off validation, write two shards and a record.

Documents are texts or conversations; how they become tokens is a function given (`Encode`), and of conversations the
mask is written beside the ids.

This is all a worker does, and it depends on nothing but the unit, the tokenizer and the settings below, so it does not
matter which worker does it, when, or how often. The record is renamed into place last: a unit without a record was not
done, and a record is believed only after the shards it names have been hashed again.

Whether a document is held out is decided by a hash of its text, or of the conversation in its one spelling: the same
document lands on the same side in every source, whatever stands around it.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheaptrain.data.encode import Encoded
from cheaptrain.data.files import sealed_json, write_atomically
from cheaptrain.data.shards import ShardWriter
from cheaptrain.data.sources import Bad, Document, Unit, read_documents
from cheaptrain.data.transform import COUNTS as RULE_COUNTS
from cheaptrain.data.transform import NO_REWRITING, Rewriter, Rewriting
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

FORMAT = 1
SPLITS = ("train", "val")
CHAT_COUNTS = ("cut", "merging", "untaught")
_BATCH_BYTES = 1 << 20
_BATCH_DOCUMENTS = 1024

Progress = Callable[[int, int], None]
Encode = Callable[[Sequence[Any]], Encoded]
Refusal = Callable[[Any], str | None]


@dataclass(frozen=True)
class Job:
    """What every unit of a source has in common. `owner`: tells temporary files of this run from another's."""

    source: schema.Source
    directory: Path
    validation: float
    owner: str
    rewriting: Rewriting = NO_REWRITING

    @property
    def of_chats(self) -> bool:
        """Are the documents conversations?"""
        return self.source.format == "chat"


def record_path(directory: Path, index: int) -> Path:
    """Where the record of a unit lies."""
    return directory / f"unit-{index:05d}.json"


def write_unit(
    job: Job,
    unit: Unit,
    limit: int | None,
    dtype: "np.dtype[np.unsignedinteger]",
    encode: Encode,
    refusal: Refusal,
    progress: Progress,
) -> dict[str, Any]:
    """Prepare one unit; returns its record, which by then is on the disk.

    `limit`: stop after the document with which the training tokens reach it. `refusal(document)`: why it cannot be
    encoded, if it cannot. `progress(text bytes, tokens)` is called for every batch. Raises PreflightError for a
    document that cannot be read or encoded, unless the source says to skip those.
    """
    writers = [
        ShardWriter(job.directory, f"{split}-{unit.index:05d}", dtype, job.owner, job.of_chats) for split in SPLITS
    ]
    text_bytes, reached, counts = [0, 0], False, Counter[str]()
    rewriter, rules = Rewriter(job.rewriting), {rule.name: Counter[str]() for rule in job.rewriting.rules}
    try:
        for documents, passed_over in _batches(_checked(read_documents(job.source, unit), refusal), job.source):
            sizes = np.fromiter((len(_text(document)) for document in documents), np.int64, len(documents))
            spelled = list(map(_spelled, documents))
            held_out = is_held_out(spelled, job.validation)
            rewritten = rewriter.rewrite(documents, spelled, held_out.tolist())
            encoded = encode(rewritten.documents)
            ids, lengths = encoded.ids, encoded.lengths
            filled = lengths > 0
            left = None if limit is None else limit - writers[0].tokens
            kept, reached = _documents_until(left, np.where(held_out, 0, lengths))
            for before, kind in passed_over:
                counts[kind] += before < kept or not reached
            counts["dropped"] += int(np.count_nonzero(~filled[:kept]))
            counts += _chat_counts(encoded, kept)
            taken = np.flatnonzero(filled[:kept])
            counts["literal"] += sum(rewritten.literal[index] for index in taken)
            for name, found in rewritten.totals(taken.tolist()).items():
                rules[name].update(found)
            sizes, held_out, lengths = sizes[taken], held_out[taken], lengths[taken]
            ids = ids[: int(lengths.sum())]
            mask = None if encoded.mask is None else encoded.mask[: len(ids)]
            of_split = np.repeat(held_out, lengths)
            for side, (writer, chosen) in enumerate(zip(writers, (~held_out, held_out), strict=True)):
                if chosen.any():
                    here = of_split == bool(side)
                    writer.add(ids[here], lengths[chosen], None if mask is None else mask[here])
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
        if job.of_chats:
            record[split]["supervised"] = writer.supervised
    if job.of_chats:
        record["chat"] = {key: counts[key] for key in CHAT_COUNTS}
    if rules:
        record["transform"] = {name: {key: found[key] for key in RULE_COUNTS} for name, found in rules.items()}
    if job.rewriting.tokens:
        record["literal"] = counts["literal"]
    write_atomically(record_path(job.directory, unit.index), sealed_json(record), job.owner)
    return record


def _text(document: Document) -> bytes:
    return document.encode() if isinstance(document, str) else document.text.encode()


def _spelled(document: Document) -> bytes:
    return document.encode() if isinstance(document, str) else document.canonical()


def _chat_counts(encoded: Encoded, kept: int) -> Counter[str]:
    """Of the first `kept` conversations: how many lost turns, where a header would merge with the answer, and in which
    there is nothing to learn."""
    if encoded.mask is None or encoded.cut is None or encoded.merging is None:
        return Counter()
    ends = np.cumsum(encoded.lengths)
    taught = np.concatenate(([0], np.cumsum(encoded.mask, dtype=np.int64)))
    untaught = (encoded.lengths > 0) & (taught[ends] == taught[ends - encoded.lengths])
    found = {"cut": encoded.cut, "merging": encoded.merging, "untaught": untaught}
    return Counter({key: int(np.count_nonzero(flags[:kept])) for key, flags in found.items()})


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


def _checked(documents: Iterator[Document | Bad], refusal: Refusal) -> Iterator[Document | Bad]:
    """The same, with what cannot be encoded as `Bad`."""
    for document in documents:
        if isinstance(document, Bad) or (why := refusal(document)) is None:
            yield document
        else:
            yield Bad(f"the conversation that begins {_text(document)[:60].decode(errors='ignore')!r}", why)


def _batches(
    documents: Iterator[Document | Bad], source: schema.Source
) -> Iterator[tuple[list[Document], list[tuple[int, str]]]]:
    """Documents worth encoding, about a megabyte at a time; and what was passed over: (documents of the batch before
    it, "dropped" for an empty one or "skipped" for a bad one)."""
    batch: list[Document] = []
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
            size += len(document) if isinstance(document, str) else len(document.text)
            if size >= _BATCH_BYTES or len(batch) >= _BATCH_DOCUMENTS:
                yield batch, passed_over
                batch, passed_over, size = [], [], 0
    if batch or passed_over:
        yield batch, passed_over
