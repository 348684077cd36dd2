"""One unit of a source that is tokens already: the file stays where it is, an index of its documents is written.

`ends-*.npy`: where each document of the file ends; `train-*.npy` and `val-*.npy`: which documents lie on which side,
by a hash of their ids. Ids are checked and bytes of text counted in the same pass.
"""

import hashlib
import io
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cheaptrain.data.encode import EncoderSpec
from cheaptrain.data.files import sealed_json, write_atomically
from cheaptrain.data.foreign import TokenFile, document_ends, map_tokens
from cheaptrain.data.sources import Unit, check_unchanged
from cheaptrain.data.units import FORMAT, SPLITS, Job, held_out_by_digest, record_path
from cheaptrain.errors import PreflightError

_CHUNK_TOKENS = 1 << 22


def index_unit(
    job: Job, unit: Unit, encoder: EncoderSpec, token_bytes: NDArray[np.int32], progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """Index one file; returns its record, which by then is on the disk.

    Raises PreflightError: an id outside the vocabulary (file and position), an index that does not fit.
    """
    piece = unit.pieces[0]
    check_unchanged(piece)
    file = TokenFile(piece["path"], piece["format"], piece["dtype"], piece["offset_bytes"], piece["index"])
    tokens = map_tokens(file)
    all_ends = document_ends(file, encoder.eot_id)
    ends = all_ends[np.diff(all_ends, prepend=0) > 0]
    text_bytes = _text_bytes(file, tokens, ends, encoder.size, token_bytes, progress)
    starts = np.concatenate(([0], ends[:-1])) if len(ends) else ends
    ended = tokens[ends - 1] == encoder.eot_id
    content_ends = ends - ended
    filled = content_ends > starts
    digests = (
        hashlib.blake2b(tokens[start:end].astype("<u4").tobytes(), digest_size=8).digest()
        for start, end in zip(starts.tolist(), content_ends.tolist(), strict=True)
    )
    held_out = held_out_by_digest(digests, job.validation)
    record: dict[str, Any] = {
        "format": FORMAT,
        "index": unit.index,
        "identity": unit.identity,
        "inputs": {item.name: item.fingerprint for item in unit.inputs},
        "limit": None,
        "dropped": len(all_ends) - int(filled.sum()),
        "skipped": 0,
        "unended": int((~ended & filled).sum()),
        "read_from": {"path": piece["name"], "dtype": file.dtype, "offset_bytes": file.offset_bytes},
        "files": {},
    }
    arrays = {"ends": ends}
    for split, side in zip(SPLITS, (~held_out, held_out), strict=True):
        arrays[split] = np.flatnonzero(side & filled)
        record[split] = {
            "tokens": int((ends - starts)[arrays[split]].sum()),
            "documents": len(arrays[split]),
            "bytes": int(text_bytes[arrays[split]].sum()),
        }
    for name, array in arrays.items():
        stream = io.BytesIO()
        np.save(stream, array.astype("<i8"))
        content = stream.getvalue()
        path = job.directory / f"{name}-{unit.index:05d}.npy"
        write_atomically(path, content, job.owner)
        record["files"][path.name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_atomically(record_path(job.directory, unit.index), sealed_json(record), job.owner)
    return record


def _text_bytes(
    file: TokenFile,
    tokens: NDArray[np.integer],
    ends: NDArray[np.int64],
    vocabulary: int,
    token_bytes: NDArray[np.int32],
    progress: Callable[[int, int], None],
) -> NDArray[np.int64]:
    """Bytes of text of each document, int64 [documents]; refuses ids outside the vocabulary on the way."""
    upto = np.zeros(len(ends), np.int64)
    before = 0
    for start in range(0, len(tokens), _CHUNK_TOKENS):
        chunk = tokens[start : start + _CHUNK_TOKENS].astype(np.int64)
        wrong = np.flatnonzero((chunk < 0) | (chunk >= vocabulary))
        if len(wrong):
            raise PreflightError(
                f"{file.path}: id {chunk[wrong[0]]:,} at token {start + int(wrong[0]):,} is outside the tokenizer's "
                f"{vocabulary:,}: the file was made with another tokenizer, or token_bytes is wrong"
            )
        counted = before + np.cumsum(token_bytes[chunk], dtype=np.int64)
        first, last = np.searchsorted(ends, (start, start + len(chunk)), side="right")
        upto[first:last] = counted[ends[first:last] - start - 1]
        before = int(counted[-1])
        progress(len(chunk), len(chunk))
    return np.diff(upto, prepend=0)
