"""The order of rows: shares follow the weights at every prefix, every row once an epoch, the same on every machine."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cheaptrain.data.order import MAX_POSITION, MixtureOrder
from cheaptrain.errors import PreflightError

# Phase 1 of MobileLLM-R1 as published: the weights sum to 100.01.
PUBLISHED = {
    "starcoder": 10.66, "openwebmath": 6.93, "fineweb_edu": 63.75, "wiki": 5.03, "arxiv": 6.36, "stackexchange": 5.03,
    "algebraicstack": 2.25,
}  # fmt: skip

weights = st.lists(
    st.floats(1e-9, 1e9) | st.floats(0.01, 1) | st.sampled_from([0.0, 1e-300, 1e300]), min_size=1, max_size=14
).filter(any)
seeds = st.integers(0, 2**63 - 1)


def order_of(shares: list[float], seed: int = 1, rows: int = 97) -> MixtureOrder:
    return MixtureOrder(
        seed, {f"s{k}": share for k, share in enumerate(shares)}, {f"s{k}": rows + k for k in range(len(shares))}
    )


def one_source(rows: int, seed: int = 1, name: str = "web") -> MixtureOrder:
    return MixtureOrder(seed, {name: 1.0}, {name: rows})


def epoch_rows(order: MixtureOrder, rows: int, epoch: int = 0) -> np.ndarray:
    return order.locate(np.arange(epoch * rows, (epoch + 1) * rows))[1]


def bound(shares: list[float], position: int) -> Fraction:
    """ceil(log2 K) (1 + n / 2^40): what docs/data-order.md proves, the last part being the rounding of the shares."""
    depth = (sum(share > 0 for share in shares) - 1).bit_length()
    return depth * (1 + Fraction(position, 2**40))


@settings(max_examples=150, deadline=None)
@given(shares=weights, seed=seeds, position=st.integers(0, 2**43 - 1) | st.integers(0, 10_000))
def test_some_prefix_drifts_from_the_weights(shares: list[float], seed: int, position: int) -> None:
    counts = order_of(shares, seed).counts(position)
    total = sum(map(Fraction, shares))
    assert counts.sum() == position
    for share, count in zip(shares, counts.tolist(), strict=True):
        assert abs(count - Fraction(share) / total * position) <= bound(shares, position)
        assert share > 0 or count == 0
    if position <= 2**38 and sum(share > 0 for share in shares) == len(shares):
        assert all(
            abs(count - Fraction(share) / total * position) <= len(shares)
            for share, count in zip(shares, counts.tolist(), strict=True)
        )


@pytest.mark.parametrize("shares", [[1.0], [0.5, 0.5], [1e-6, 1.0], list(PUBLISHED.values()), [1.0] * 14])
def test_one_prefix_of_the_first_20000_drifts_from_the_weights(shares: list[float]) -> None:
    sources = order_of(shares).locate(np.arange(20_000))[0]
    drawn = np.cumsum(sources[:, None] == np.arange(len(shares)), axis=0)
    ideal = np.arange(1, 20_001)[:, None] * (np.array(shares) / math.fsum(shares))
    assert np.abs(drawn - ideal).max() <= max((len(shares) - 1).bit_length(), 1e-6)


@settings(max_examples=100, deadline=None)
@given(shares=weights, seed=seeds, start=st.integers(0, 2**43 - 40) | st.integers(0, 5_000))
def test_seeking_disagrees_with_counting_one_by_one(shares: list[float], seed: int, start: int) -> None:
    order = order_of(shares, seed)
    sources, rows, epochs = order.locate(np.arange(start, start + 30))
    before = order.counts(start)
    for k, (source, row, epoch) in enumerate(zip(sources.tolist(), rows.tolist(), epochs.tolist(), strict=True)):
        after = order.counts(start + k + 1)
        assert (after - before).tolist() == [int(index == source) for index in range(len(shares))]
        draw = int(before[source])
        assert epoch == draw // order.rows[source]
        alone = MixtureOrder(seed, {f"s{source}": 1.0}, {f"s{source}": order.rows[source]})
        assert alone.locate(np.array([draw]))[1:] == (row, epoch)
        before = after


def test_weights_of_100_01_percent_are_refused_or_lose_a_source() -> None:
    order = MixtureOrder(1337, PUBLISHED, dict.fromkeys(PUBLISHED, 1000))
    total = math.fsum(PUBLISHED.values())
    assert total == pytest.approx(100.01)
    counts = order.counts(1_000_000)
    for count, weight in zip(counts.tolist(), PUBLISHED.values(), strict=True):
        assert abs(count - weight / total * 1_000_000) <= 3


def test_source_of_weight_0_is_drawn() -> None:
    order = MixtureOrder(5, {"a": 0.0, "b": 1.0, "c": 0.0, "d": 2.0}, {"a": 3, "b": 9, "c": 0, "d": 9})
    assert set(order.locate(np.arange(5000))[0].tolist()) == {1, 3}
    assert order.counts(MAX_POSITION - 1)[[0, 2]].tolist() == [0, 0]


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")])
def test_source_of_tiny_weight_is_never_drawn(names: tuple[str, str]) -> None:
    order = MixtureOrder(5, {names[0]: 1e-20, names[1]: 1.0}, {"a": 9, "b": 9})
    assert order.counts(2**42)[0] in (4, 5)  # the smallest share there is: 2^-40


def test_row_repeats_or_is_missing_within_an_epoch() -> None:
    for rows in range(1, 2001):
        order = one_source(rows, seed=rows % 7)
        epoch = rows % 3
        _, found, epochs = order.locate(np.arange(epoch * rows, (epoch + 1) * rows))
        assert set(epochs.tolist()) == {epoch}
        assert np.bincount(found, minlength=rows).tolist() == [1] * rows, f"{rows} rows"


@pytest.mark.parametrize("rows", [65_536, 65_537, 10**6 + 3, 10**9 + 7, 2**31 + 11, 2**40, 2**42 + 1])
def test_row_repeats_in_a_source_too_large_to_try_out(rows: int) -> None:
    positions = np.unique(np.random.default_rng(1).integers(0, rows, 50_000))
    found = one_source(rows).locate(positions)[1]
    assert found.min() >= 0
    assert found.max() < rows
    assert len(np.unique(found)) == len(positions)
    assert abs(found.mean() / rows - 0.5) < 0.01


@pytest.mark.parametrize(("seed", "rows", "epoch"), [(1, 4_096, 0), (2, 10_007, 0), (2, 10_007, 1), (3, 99_991, 5)])
def test_rows_come_in_an_order_that_still_shows_the_stored_one(seed: int, rows: int, epoch: int) -> None:
    found = epoch_rows(one_source(rows, seed), rows, epoch)
    index = np.arange(rows)
    # A random permutation moves a row by rows/3 on average and has correlations of about 1/sqrt(rows).
    assert np.abs(found - index).mean() / rows == pytest.approx(1 / 3, abs=1.5 / math.sqrt(rows))
    for lag in (1, 2, 3, 7, 64):
        assert abs(np.corrcoef(found[lag:], found[:-lag])[0, 1]) < 5 / math.sqrt(rows)
    assert abs(np.corrcoef(found, index)[0, 1]) < 5 / math.sqrt(rows)
    # Where in the epoch the rows of each sixteenth of the file fall: 225 degrees of freedom, six standard deviations.
    table = np.histogram2d(index * 16 // rows, found * 16 // rows, bins=(np.arange(17), np.arange(17)))[0]
    chi_square = ((table - rows / 256) ** 2 / (rows / 256)).sum()
    assert 225 - 6 * math.sqrt(450) < chi_square < 225 + 6 * math.sqrt(450)
    # Neighbours in the file follow each other no more often than by chance (once a permutation).
    assert np.count_nonzero(np.diff(found) == 1) < 10


@pytest.mark.parametrize("rows", [2, 3, 4])
def test_small_sources_have_permutations_that_never_come(rows: int) -> None:
    epochs = 6_000
    found = one_source(rows, seed=11).locate(np.arange(epochs * rows))[1].reshape(epochs, rows)
    seen = dict.fromkeys(permutations(range(rows)), 0)
    for order in found.tolist():
        seen[tuple(order)] += 1
    expected = epochs / math.factorial(rows)
    chi_square = sum((count - expected) ** 2 / expected for count in seen.values())
    freedom = math.factorial(rows) - 1
    assert chi_square < freedom + 6 * math.sqrt(2 * freedom)


def test_next_epoch_or_another_seed_repeats_the_permutation() -> None:
    rows = 5_003
    base = epoch_rows(one_source(rows), rows)
    others = [
        epoch_rows(one_source(rows), rows, epoch=1),
        epoch_rows(one_source(rows), rows, epoch=2),
        epoch_rows(one_source(rows, seed=2), rows),
        epoch_rows(one_source(rows, name="web2"), rows),
    ]
    for other in others:
        assert np.count_nonzero(base == other) < 12  # 1 expected
        assert abs(np.corrcoef(base, other)[0, 1]) < 5 / math.sqrt(rows)


def test_listing_the_sources_in_another_order_reorders_the_run() -> None:
    positions = np.arange(3_000)
    rows = {name: 50 + len(name) for name in PUBLISHED}
    one = MixtureOrder(9, PUBLISHED, rows)
    other = MixtureOrder(9, dict(reversed(PUBLISHED.items())), rows)
    (one_sources, one_rows, _), (other_sources, other_rows, _) = one.locate(positions), other.locate(positions)
    assert [one.names[k] for k in one_sources] == [other.names[k] for k in other_sources]
    assert one_rows.tolist() == other_rows.tolist()


GOLDEN: dict[str, list[int]] = {
    "sources": [0, 1, 2, 0, 0, 0, 1, 0, 0, 0, 2, 0],
    "rows": [894, 150, 0, 93, 596, 309, 15, 638, 160, 70, 3, 688],
    "epochs": [0, 0, 0, 0, 0, 0, 0, 0, 0, 734, 122713351, 6157265115],
    "counts": [6157265115547, 1759218604440, 879609302221],
}


def test_order_differs_on_another_machine_or_release() -> None:
    """Golden: a change here changes what every resumed run reads, and must be a decision."""
    order = MixtureOrder(1337, {"web": 0.7, "code": 0.2, "math": 0.1}, {"web": 1000, "code": 300, "math": 7})
    sources, rows, epochs = order.locate(np.array([0, 1, 2, 3, 4, 5, 6, 7, 1000, 2**20 + 1, 2**33, 2**43 - 1]))
    assert sources.tolist() == GOLDEN["sources"]
    assert rows.tolist() == GOLDEN["rows"]
    assert epochs.tolist() == GOLDEN["epochs"]
    assert order.counts(2**43).tolist() == GOLDEN["counts"]


def test_source_that_holds_no_row_is_found_out_in_training() -> None:
    with pytest.raises(PreflightError, match=r"'tiny' has weight 0\.1 .*seq_len.*weight to 0"):
        MixtureOrder(1, {"web": 0.9, "tiny": 0.1}, {"web": 10, "tiny": 0})


@pytest.mark.parametrize("share", [-0.1, float("nan"), float("inf")])
def test_weight_that_is_no_share_is_used(share: float) -> None:
    with pytest.raises(ValueError, match="'b'"):
        MixtureOrder(1, {"a": 1.0, "b": share}, {"a": 1, "b": 1})


def test_no_weight_at_all_or_other_names_are_accepted() -> None:
    with pytest.raises(ValueError, match="weight above 0"):
        MixtureOrder(1, {"a": 0.0}, {"a": 1})
    with pytest.raises(ValueError, match="rows for"):
        MixtureOrder(1, {"a": 1.0}, {"b": 1})


@pytest.mark.parametrize("position", [-1, 2**43])
def test_position_beyond_64_bit_arithmetic_gives_some_row(position: int) -> None:
    with pytest.raises(ValueError, match=r"2\^43"):
        one_source(10).locate(np.array([position]))


def test_no_positions_fail() -> None:
    assert [part.tolist() for part in one_source(10).locate(np.array([], np.int64))] == [[], [], []]
