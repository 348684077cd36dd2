"""Amounts and spans mean what they say, exactly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cheaptrain.recipe.quantities import Span, parse_bytes, parse_count, parse_every, parse_span


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (0, 0),
        (524_288, 524_288),
        ("524_288", 524_288),
        ("524,288", 524_288),
        ("10B", 10_000_000_000),
        ("10 B", 10_000_000_000),
        ("2.3T", 2_300_000_000_000),
        ("0.5M tokens", 500_000),
        ("1.1B", 1_100_000_000),
        ("512Ki", 524_288),
        ("1k", 1000),
        ("1e9", 1_000_000_000),
        ("9007199254740993", 9007199254740993),  # not a float
    ],
)
def test_amounts_are_exact(text: int | str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "wrong", ["", "ten", "1,5B", "1.5", "5 steps", "5%", "-3", -3, True, 1.0, None, [1], "1e400", "10BB", "1_", 2**63]
)
def test_what_is_no_amount_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"count"):
        parse_count(wrong)


def test_a_million_bytes_is_not_a_mebibyte() -> None:
    assert (parse_bytes("64MB"), parse_bytes("64MiB"), parse_bytes("64M"), parse_bytes("5 bytes")) == (
        64_000_000,
        64 * 2**20,
        64_000_000,
        5,
    )
    for wrong in ("64 tokens", "1.5B x", 1.5, True):
        with pytest.raises(ValueError, match="bytes"):
            parse_bytes(wrong)


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("2000 steps", Span(2000, "steps")),
        ("1 step", Span(1, "steps")),
        ("2k steps", Span(2000, "steps")),
        ("100M tokens", Span(100_000_000, "tokens")),
        ("1%", Span(1, "%")),
        ("0.1 %", Span(0.1, "%")),
        (0, Span(0, "steps")),
        ("0%", Span(0, "steps")),
        ("0 tokens", Span(0, "steps")),
    ],
)
def test_spans(text: object, span: Span) -> None:
    assert parse_span(text) == span


@pytest.mark.parametrize("wrong", [5, "5", "10B", 0.5, True, None, "101%", "5k%", "1.5 steps", "some steps"])
def test_a_span_without_a_unit_is_refused(wrong: object) -> None:
    with pytest.raises(ValueError):
        parse_span(wrong)


def test_how_often_cannot_be_never() -> None:
    assert parse_every("3 steps") == Span(3, "steps")
    with pytest.raises(ValueError, match="cannot be 0"):
        parse_every("0%")


@given(st.floats(min_value=0.0001, max_value=100) | st.integers(0, 100))
def test_a_share_survives_being_written_and_read(percent: float) -> None:
    span = parse_span(f"{percent!r}%") if percent >= 0.0001 else parse_span(0)
    assert parse_span(str(span)) == span
    assert span.amount == percent


@given(st.integers(0, 2**62), st.sampled_from(["steps", "tokens"]))
def test_a_span_survives_being_written_and_read(amount: int, unit: str) -> None:
    assert parse_span(str(parse_span(f"{amount} {unit}"))) == parse_span(f"{amount} {unit}")


def test_a_span_in_steps_and_tokens() -> None:
    step, run = 524_288, 19_073 * 524_288
    assert Span(715, "steps").tokens(step, run) == 715 * step
    assert Span(375_000_000, "tokens").steps(step, run) == 715
    assert Span(1, "%").steps(step, run) == 191
    assert Span(0.0001, "%").steps(step, run) == 1, "a span that is not zero is at least one step"
    assert Span(0, "steps").steps(step, run) == 0
