"""Small conversations on disk, as preparing writes them: ids end to end, and a mask beside them."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from token_files import write_shard

from cheaptrain.data.documents import Documents
from cheaptrain.data.packing import pack
from cheaptrain.data.rows import PackedRows
from cheaptrain.data.stream import Shard, TokenStream


def documents_of(
    folder: Path, documents: Sequence[Sequence[int]], masks: Sequence[Sequence[int]], shards: int = 1, name: str = "c"
) -> Documents:
    """These conversations, cut into `shards` files of about as many each."""
    bounds = [len(documents) * k // shards for k in range(shards + 1)]
    ids = [
        write_shard(folder / f"{name}-{k}.bin", documents[low:high]) for k, (low, high) in enumerate(pairwise(bounds))
    ]
    for shard, low, high in zip(ids, bounds[:-1], bounds[1:], strict=True):
        flat = [value for mask in masks[low:high] for value in mask]
        shard.bin.with_suffix(".mask").write_bytes(np.array(flat, np.uint8).tobytes())
    return Documents(
        TokenStream(ids), TokenStream([Shard(s.bin.with_suffix(".mask"), np.uint8, s.document_ends) for s in ids])
    )


def conversations(lengths: Sequence[int], vocab: int = 500, seed: int = 0) -> tuple[list[list[int]], list[list[int]]]:
    """Conversations of these lengths with masks of uneven density; the last token of each is supervised."""
    rng = np.random.default_rng(seed)
    documents = [rng.integers(1, vocab, length).tolist() for length in lengths]
    masks = [(rng.random(length) < rng.uniform(0.1, 0.9)).astype(int).tolist() for length in lengths]
    for mask in masks:
        mask[0], mask[-1] = 0, 1
    return documents, masks


def packed_rows(
    folder: Path, lengths: Sequence[int], seq_len: int, seed: int = 0, assistant_only: bool = True, vocab: int = 500
) -> PackedRows:
    """Conversations of these lengths, packed."""
    documents = documents_of(folder, *conversations(lengths, vocab), shards=min(3, len(lengths)))
    return PackedRows(documents, pack(documents.lengths, seq_len, seed), assistant_only)
