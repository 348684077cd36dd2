"""Packing loses, repeats or cuts no conversation, fills rows well, and is the same on every machine."""

import gzip
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheaptrain.data.packing import Packing, pack
from cheaptrain.errors import PreflightError

SFT = Path(__file__).parents[2] / "shared" / "data" / "sft"


def plain_best_fit(sizes: list[int], seq_len: int) -> list[int]:
    """Room left in each row, the slow way: every item into the row with the least room that is enough."""
    rooms: list[int] = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - size)
        else:
            rooms.append(seq_len - size)
    return sorted(rooms)


def rooms_of(packing: Packing, lengths: np.ndarray) -> list[int]:
    return [packing.seq_len - int((lengths[packing.of_row(row)] - 1).sum()) for row in range(packing.rows)]


@settings(max_examples=300, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 33), max_size=80) | st.lists(st.sampled_from([2, 3, 12, 17, 18, 33]), max_size=80),
    seed=st.integers(0, 2**63 - 1),
)
def test_a_conversation_is_lost_repeated_or_cut(lengths: list[int], seed: int) -> None:
    tokens = np.array(lengths, np.int64)
    packing = pack(tokens, 32, seed)
    packed = [document for row in range(packing.rows) for document in packing.of_row(row)]
    assert sorted(packed) == list(range(len(lengths)))
    rooms = rooms_of(packing, tokens)
    assert all(0 <= room < 32 for room in rooms)
    assert sorted(rooms) == plain_best_fit([length - 1 for length in lengths], 32)
    assert packing.of_row(packing.rows) == packing.of_row(-1) == []


def test_another_machine_or_another_numpy_packs_otherwise() -> None:
    """Golden: a run that goes on elsewhere must find the rows it left."""
    lengths = np.array([2 + (7919 * k) % 63 for k in range(500)])
    packing = pack(lengths, 64, seed=11)
    digest = hashlib.sha256(packing.documents.astype("<i8").tobytes() + packing.starts.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "92561de67b519ae5"
    assert packing.rows == pack(lengths, 64, seed=12).rows


def test_documents_of_one_length_always_share_rows_with_the_same_others() -> None:
    lengths = np.full(400, 9)
    ours, theirs = pack(lengths, 32, seed=1), pack(lengths, 32, seed=2)
    together = {frozenset(ours.of_row(row)) for row in range(ours.rows)}
    assert len(together & {frozenset(theirs.of_row(row)) for row in range(theirs.rows)}) < 3
    # Neighbours in the source are not neighbours in rows.
    assert np.abs(np.diff(ours.documents)).mean() > 50


@pytest.mark.parametrize("seq_len", [1024, 4096, 32_768])
def test_rows_of_realistic_lengths_are_padding_by_more_than_a_hundredth(seq_len: int) -> None:
    rng = np.random.default_rng(3)
    lengths = np.clip(rng.lognormal(5.5, 1.0, 60_000).astype(np.int64) + 2, 2, seq_len + 1)
    packing = pack(lengths, seq_len)
    assert (lengths - 1).sum() / (packing.rows * seq_len) > 0.99


@pytest.mark.skipif(not SFT.is_dir(), reason="../shared/data/sft is not here")
@pytest.mark.parametrize("seq_len", [1024, 2048, 4096])
def test_rows_of_real_conversations_are_padding_by_more_than_a_hundredth(seq_len: int) -> None:
    """Lengths of real conversations, a token reckoned as four characters."""
    lengths = []
    for path in sorted(SFT.glob("*.jsonl.gz")):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            lengths += [len(json.dumps(json.loads(line), ensure_ascii=False)) // 4 for line in lines]
    tokens = np.clip(np.array(lengths), 2, seq_len + 1)
    packing = pack(tokens, seq_len)
    assert len(tokens) > 1000
    assert (tokens - 1).sum() / (packing.rows * seq_len) > 0.99


def test_a_conversation_longer_than_a_row_or_without_a_target_is_packed() -> None:
    with pytest.raises(PreflightError, match=r"2 documents do not fit a row .* 32 positions, document 1 of 34 tokens"):
        pack(np.array([33, 34, 40]), 32)
    with pytest.raises(PreflightError, match="document 1 has 1 token and nothing to learn"):
        pack(np.array([5, 1]), 32)
