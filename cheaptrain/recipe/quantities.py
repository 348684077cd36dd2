"""Quantities with units: `"10B"`, `"64 MB"`, `"2000 steps"`, `"1%"`.

A recipe states amounts the way people say them. The trap: `k` is 1,000 and `Ki` is 1,024, always; nothing is guessed
from context. Plain integers (also `524_288`) are taken as they are.
"""

import re
from dataclasses import dataclass
from datetime import time
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

_SUFFIX = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_SUFFIX |= {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
# A comma separates thousands and nothing else: "1,5B" is refused, for it may mean 1.5B.
_NUMBER = r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+(?:_\d+)*)(?:\.\d+)?(?:[eE][+-]?\d{1,3})?)"
_COUNT = re.compile(rf"\s*{_NUMBER}\s*(?P<suffix>[kKMGT]i|[kKMBGT])?\s*(?P<unit>tokens?|steps?|%)?\s*")
_BYTES = re.compile(rf"\s*{_NUMBER}\s*(?P<suffix>[kKMGT]i?)?\s*(?:[bB]|bytes)?\s*")
_IN_SECONDS = {"s": 1, "sec": 1, "min": 60, "m": 60, "h": 3600, "d": 86_400}
_DURATION_PART = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(d|h|min|m|sec|s)")
_DURATION = re.compile(rf"\s*(?:{_DURATION_PART.pattern}\s*)+")
_LONGEST_DAYS = 36_500
_LARGEST = 2**63 - 1


def parse_count(value: Any) -> int:
    """`"10B"`, `"524_288"`, `"0.5M tokens"` or an integer → an integer. Raises ValueError."""
    hint = 'write 1000000, "10B" or "512Ki" (k = 1,000, Ki = 1,024)'
    if isinstance(value, str):
        match = _COUNT.fullmatch(value)
        if not match or match["unit"] in ("%", "step", "steps"):
            raise ValueError(f"{value!r} is not a count; {hint}")
        return _scaled(match["number"], match["suffix"], "a count")
    return _whole(value, "a count", hint)


def parse_bytes(value: Any) -> int:
    """`"64MB"`, `"1GiB"` or an integer number of bytes → an integer. Raises ValueError."""
    hint = 'write 64000000, "64MB" or "64MiB" (M = 1,000,000, Mi = 1,048,576)'
    if isinstance(value, str):
        match = _BYTES.fullmatch(value)
        if not match:
            raise ValueError(f"{value!r} is not a size in bytes; {hint}")
        return _scaled(match["number"], match["suffix"], "a size in bytes")
    return _whole(value, "a size in bytes", hint)


def parse_seconds(value: Any) -> float:
    """`"23h 45min"`, `"90s"`, `"1.5h"` or a number of seconds → seconds, above 0. Raises ValueError."""
    hint = 'write 5400, "90min" or "1h 30min"'
    if isinstance(value, str):
        if not _DURATION.fullmatch(value):
            raise ValueError(f"{value!r} is not a time; {hint}")
        parts = _DURATION_PART.findall(value)
        if len({_IN_SECONDS[unit] for _, unit in parts}) < len(parts):
            raise ValueError(f"{value!r} names a unit twice; {hint}")
        seconds = sum(float(number) * _IN_SECONDS[unit] for number, unit in parts)
    elif isinstance(value, bool) or not isinstance(value, int | float):
        # 23:45:00 without quotes is a time of day in TOML.
        raise ValueError(f"{value if isinstance(value, time) else repr(value)} is not a time; {hint}")
    else:
        seconds = value
    if not 0 < seconds <= _LONGEST_DAYS * 86_400:
        raise ValueError(f"{value!r}: a time lies above 0 and below {_LONGEST_DAYS:,} days; {hint}")
    return float(seconds)


@dataclass(frozen=True)
class Span:
    """A stretch of training: so many steps, so many tokens, or a share of the whole run."""

    amount: float
    unit: Literal["steps", "tokens", "%"]

    def __str__(self) -> str:
        number = f"{int(self.amount):_}" if self.amount == int(self.amount) else repr(self.amount)
        if self.unit == "%":
            return f"{number}%"
        return f"{number} {self.unit if self.amount != 1 else self.unit[:-1]}"

    def tokens(self, tokens_per_step: int, total_tokens: int) -> int:
        """The span in tokens, given what one step and the whole run hold."""
        if self.unit == "steps":
            return int(self.amount) * tokens_per_step
        if self.unit == "tokens":
            return int(self.amount)
        return round(self.amount / 100 * total_tokens)

    def steps(self, tokens_per_step: int, total_tokens: int) -> int:
        """The span in whole steps (the nearest), at least 1 unless the span is zero."""
        if self.amount == 0:
            return 0
        if self.unit == "steps":
            return int(self.amount)
        tokens = self.tokens(tokens_per_step, total_tokens)
        return max(1, (2 * tokens + tokens_per_step) // (2 * tokens_per_step))


def parse_span(value: Any) -> Span:
    """`"2000 steps"`, `"100M tokens"`, `"1%"`, or 0 → a Span; zero in any unit is 0 steps. Raises ValueError."""
    hint = 'write "2000 steps", "100M tokens" or "1%"'
    if isinstance(value, Span):
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{value!r} is not a span of training; {hint}")
    if not isinstance(value, str):
        if value == 0:
            return Span(0, "steps")
        raise ValueError(f"{value!r} has no unit; {hint}")
    match = _COUNT.fullmatch(value)
    if not match:
        raise ValueError(f"{value!r} is not a span of training; {hint}")
    if not match["unit"]:
        raise ValueError(f"{value!r} has no unit; {hint}")
    unit: Literal["steps", "tokens", "%"]
    if match["unit"] == "%":
        amount, unit = float(_decimal(match["number"])), "%"
        if match["suffix"] or amount > 100:
            raise ValueError(f"{value!r}: a share of the run lies between 0% and 100%")
    else:
        unit = "steps" if match["unit"].startswith("step") else "tokens"
        amount = _scaled(match["number"], match["suffix"], f"a number of {unit}")
    return Span(amount, unit) if amount else Span(0, "steps")


def parse_every(value: Any) -> Span:
    """A span that cannot be zero: how often something is done. Raises ValueError."""
    span = parse_span(value)
    if span.amount == 0:
        raise ValueError(f'{value!r}: how often cannot be 0; "100%" is once, at the end')
    return span


def _whole(value: Any, what: str, hint: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{value!r} is not {what}; {hint}")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{what} lies between 0 and 2^63 - 1, not {value:,}")
    return value


def _scaled(number: str, suffix: str | None, what: str) -> int:
    value = _decimal(number) * _SUFFIX[suffix or ""]
    if value != value.to_integral_value():
        raise ValueError(f"{what} must be a whole number; {number}{suffix or ''} is {value.normalize():f}")
    return _whole(int(value), what, "")


def _decimal(number: str) -> Decimal:
    return Decimal(number.replace("_", "").replace(",", ""))


_DIGITS = r"\d[\d_,]*(\.\d+)?([eE][+-]?\d+)?"
_COUNT_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": rf"^\s*{_DIGITS}\s*([kKMGT]i|[kKMBGT])?\s*(tokens?)?\s*$"},
    ],
    "examples": ["10B", "512Ki", 524288],
}
_BYTES_SCHEMA = {
    "anyOf": [
        {"type": "integer", "minimum": 0},
        {"type": "string", "pattern": rf"^\s*{_DIGITS}\s*([kKMGT]i?)?\s*([bB]|bytes)?\s*$"},
    ],
    "examples": ["64MB", "1GiB", 64000000],
}
_SPAN_SCHEMA = {
    "anyOf": [
        {"const": 0},
        {"type": "string", "pattern": rf"^\s*{_DIGITS}\s*([kKMGT]i|[kKMBGT])?\s*(steps?|tokens?|%)\s*$"},
    ],
    "examples": ["2000 steps", "100M tokens", "1%"],
}

_SECONDS_SCHEMA = {
    "anyOf": [
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "string", "pattern": r"^\s*([0-9]+(\.[0-9]+)?\s*(d|h|min|m|sec|s)\s*)+$"},
    ],
    "examples": ["23h 45min", "90min", 5400],
}

Count = Annotated[int, BeforeValidator(parse_count), WithJsonSchema(_COUNT_SCHEMA)]
Bytes = Annotated[int, BeforeValidator(parse_bytes), WithJsonSchema(_BYTES_SCHEMA)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), WithJsonSchema(_SECONDS_SCHEMA)]
_SpanText = PlainSerializer(str, return_type=str)
SpanField = Annotated[Span, BeforeValidator(parse_span), _SpanText, WithJsonSchema(_SPAN_SCHEMA)]
EveryField = Annotated[Span, BeforeValidator(parse_every), _SpanText, WithJsonSchema(_SPAN_SCHEMA["anyOf"][1])]
