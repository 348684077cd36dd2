"""Small token files for the tests of streams, rows and the loader."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from cheaptrain.data.stream import Shard, TokenStream


def write_shard(path: Path, documents: Sequence[Sequence[int]], dtype: str = "<u2", header: bytes = b"") -> Shard:
    """Write documents (lists of token ids) as one token file; returns its shard."""
    tokens = np.array([token for document in documents for token in document], dtype)
    path.write_bytes(header + tokens.tobytes())
    ends = np.cumsum([len(document) for document in documents], dtype=np.int64)
    return Shard(path, dtype, ends, offset_bytes=len(header))


def stream_of(folder: Path, documents: Sequence[Sequence[int]], shards: int = 1, name: str = "s") -> TokenStream:
    """A stream of these documents, cut into `shards` files of about as many documents each."""
    bounds = [len(documents) * k // shards for k in range(shards + 1)]
    return TokenStream(
        [write_shard(folder / f"{name}-{k}.bin", documents[low:high]) for k, (low, high) in enumerate(pairwise(bounds))]
    )


def numbered(lengths: Sequence[int], first: int = 0) -> list[list[int]]:
    """Documents of these lengths, tokens numbered first, first + 1, ... throughout: every token tells its place."""
    documents = []
    for length in lengths:
        documents.append(list(range(first, first + length)))
        first += length
    return documents
