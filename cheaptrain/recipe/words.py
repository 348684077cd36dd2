"""What is wrong with a value, in words: what was expected, what was given, and how to write it."""

import difflib
import json
import re
from typing import Any, Literal, get_args, get_origin

from cheaptrain.recipe.keys import Key, expected, kinds


def missing_text(key: Key) -> str:
    """A required key that nobody gave."""
    examples = key.field.examples
    if key.section is not None:
        header = f"[[{key.name}]]" if key.listed else f"[{key.name}]"
        return f"missing: the recipe needs {header} ({key.field.description})"
    example = f", e.g. {key.leaf} = {_toml(examples[0])}" if examples else ""
    return f"missing: {key.field.description}{example}"


def how_telling(kind: str) -> int:
    """Which of several complaints about one value says most: a limit before a choice before a type."""
    return 2 if kind in _LIMITS else int(kind == "literal_error")


def wrong_value(key: Key, error: Any, given: Any, inside: bool) -> str:
    """A value that the key does not take. `given` is the wrong value, or the wrong element when `inside` its list."""
    kind, ctx = error["type"], error.get("ctx", {})
    if kind == "value_error":
        return str(ctx["error"])
    if kind == "literal_error" or (kind.endswith("_type") and get_origin(kinds(key.field.annotation)[0]) is Literal):
        return _not_a_choice(key, given)
    if kind in _LIMITS:
        return f"must be {_LIMITS[kind].format(**ctx)}, not {_toml(given)}"
    if kind == "string_too_long":
        return f"must have at most {ctx['max_length']} characters, not {len(given)}"
    if kind == "too_short" and isinstance(given, list) and not given:
        return "must not be empty"
    if kind == "string_pattern_mismatch":
        return f"{_toml(given)}: a name has letters, digits, and after the first of them also . _ -"
    if kind.endswith("_type"):
        return f"expected {expected(key)}, not {_described(given)}{_remedy(key, given, inside)}"
    return re.sub(r"^Input should", "must", error["msg"]) + f", not {_toml(given)}"


_LIMITS = {
    "greater_than": "above {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "below {lt:g}",
    "less_than_equal": "{le:g} or less",
    "finite_number": "a finite number",
}


def _choices(key: Key) -> list[Any]:
    found = []
    for kind in kinds(key.field.annotation):
        inner = get_args(kind)[0] if get_origin(kind) is list else kind
        found += list(get_args(inner)) if get_origin(inner) is Literal else []
    return found


def _not_a_choice(key: Key, given: Any) -> str:
    choices = _choices(key)
    near = difflib.get_close_matches(str(given), [str(choice) for choice in choices], 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"expected {expected(key)}, not {_toml(given)}{hint}"


def _described(given: Any) -> str:
    if isinstance(given, str):
        return f"the text {_toml(given)}"
    if isinstance(given, dict):
        return "a table"
    if isinstance(given, list):
        return f"the list {_toml(given)}"
    return _toml(given)


def _remedy(key: Key, given: Any, inside: bool) -> str:
    """How the same value is written rightly, where that can be guessed."""
    wanted = kinds(key.field.annotation)
    if inside:
        wanted = [inner for kind in wanted for option in get_args(kind) for inner in kinds(option)]
    if isinstance(given, dict) and key.listed:
        return f": write [[{key.name}]] with two brackets"
    if isinstance(given, list) and key.section is not None and not key.listed:
        return f": write [{key.name}] with one bracket"
    if key.section is not None:
        return f": its keys stand under {'[[' + key.name + ']]' if key.listed else '[' + key.name + ']'}"
    if (
        isinstance(given, str)
        and (int in wanted or float in wanted)
        and re.fullmatch(r"[+-]?[\d._]+([eE][+-]?\d+)?", given)
    ):
        return ": write it without quotes"
    if isinstance(given, str) and bool in wanted and given.lower() in ("true", "false"):
        return f": write {given.lower()} without quotes"
    if isinstance(given, float) and int in wanted and given.is_integer():
        return f": write {int(given)}"
    if isinstance(given, str | int | float) and not isinstance(given, bool):
        if str in wanted and not isinstance(given, str):
            return ": write it in quotes"
        if any(get_origin(kind) is list for kind in wanted):
            return f": write [{_toml(given)}]"
    return ""


def _toml(value: Any) -> str:
    """A value as it would be written, cut when long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
