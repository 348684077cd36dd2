"""Amounts, times and spans mean what they say, exactly."""

import re
from datetime import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cheaptrain.recipe.quantities import Seconds, Span, parse_bytes, parse_count, parse_every, parse_seconds, parse_span


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
    ("text", "seconds"),
    [
        (5400, 5400.0),
        (0.5, 0.5),
        ("90s", 90.0),
        ("90 sec", 90.0),
        ("5m", 300.0),
        ("90min", 5400.0),
        ("1.5h", 5400.0),
        ("23h 45min", 85_500.0),
        (" 1d 2h3min 4.5s ", 93_784.5),
        ("45min 23h", 85_500.0),
        ("36500d", 36_500 * 86_400.0),
    ],
)
def test_times_are_in_seconds(text: object, seconds: float) -> None:
    assert parse_seconds(text) == seconds
    assert isinstance(parse_seconds(text), float)


@pytest.mark.parametrize(
    "wrong",
    [
        *(
            "",
            " ",
            "5400",
            "h",
            "1h30",
            "1 hour",
            "1hr",
            "-1h",
            "1,5h",
            "1e3s",
            "1_000s",
            "23:45:00",
            "1h, 30min",
            "1h\0",
        ),
        *("1h 2h", "5m 3min", "1s 1sec"),  # which of the two?
        *("0s", "0h 0min", 0, 0.0, -1, -0.5, "36501d", "9" * 400 + "s", 10**400, 1e300),
        *(True, None, [1], {}, float("nan"), float("inf"), float("-inf"), time(23, 45), "1h" * 10_000, "٣h", "inf s"),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_what_is_no_time_is_refused_or_taken_for_another(wrong: object) -> None:
    with pytest.raises(ValueError, match="90min"):
        parse_seconds(wrong)


@settings(deadline=None)
@given(st.text("0123456789.dhmins ", max_size=12))
def test_a_time_that_editors_accept_is_one_that_is_read(text: str) -> None:
    """The schema's pattern and the parser take the same texts, but for what only the parser can see."""
    try:
        parse_seconds(text)
        read = True
    except ValueError as error:
        read = "above 0" in str(error) or "twice" in str(error)
    pattern = TypeAdapter(Seconds).json_schema()["anyOf"][1]["pattern"]
    assert read == bool(re.search(pattern, text))


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


@settings(deadline=None)
@given(st.floats(min_value=0.0001, max_value=100) | st.integers(0, 100))
def test_a_share_survives_being_written_and_read(percent: float) -> None:
    span = parse_span(f"{percent!r}%") if percent >= 0.0001 else parse_span(0)
    assert parse_span(str(span)) == span
    assert span.amount == percent


@settings(deadline=None)
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
