"""`train.lr=3e-4` on the command line: the same keys as in the file, typed by the schema.

The text after `=` is what the key takes: for a text key the text as it is, for a number a number, for lists and tables
TOML. Nobody has to quote twice for the shell. An element of a named list goes by its name
(`data.sources.wiki.weight=5`); `unset` takes an inherited value away (`train.tokens=unset train.steps=100`).
"""

import difflib
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import tomli
from pydantic import TypeAdapter, ValidationError

from cheaptrain.recipe.errors import COMMAND_LINE, Problem
from cheaptrain.recipe.keys import Key, free_value, is_free, key_at, keys
from cheaptrain.recipe.suggest import unknown_key
from cheaptrain.recipe.tree import Node, Steps, at, dotted, locate, merge, put, written


def apply_overrides(tree: Node, overrides: Sequence[str], problems: list[Problem]) -> Node:
    """The tree with every `key=value` laid over it, in order. What is wrong is noted in `problems`."""
    for text in overrides:
        name, equals, value = text.partition("=")
        name, value = name.strip(), value.strip()
        if not is_utf8(text):
            problems.append(Problem(COMMAND_LINE, "", f"{text!a} is not UTF-8 text"))
            continue
        if not equals or not name:
            problems.append(
                Problem(COMMAND_LINE, "", f"{text!r} is not an override; write key=value, e.g. train.lr=3e-4")
            )
            continue
        try:
            tree = _unset(tree, name) if value == "unset" else _set(tree, name, value)
        except LookupError as error:
            problems.append(Problem(COMMAND_LINE, name, str(error.args[0])))
    return tree


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Recipes and overrides. A path may hold an `=` too (`sweep/lr=3e-4/recipe.toml`): no key holds a slash."""
    overrides = [
        text
        for text in arguments
        if "=" in text and not {"/", os.sep} & set(text.partition("=")[0]) and not os.path.isfile(text)
    ]
    return [text for text in arguments if text not in overrides], overrides


def is_utf8(text: str) -> bool:
    """Whether it can be written to a file; names on a disk and variables of the shell may hold any bytes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unset(tree: Node, name: str) -> Node:
    steps = locate(tree, name)
    if not steps:
        _steps_to(tree, name)  # a key that does not exist is the better complaint
        raise LookupError("nothing sets it, so there is nothing to unset")
    return put(tree, steps, None)


def _set(tree: Node, name: str, text: str) -> Node:
    steps = _steps_to(tree, name)
    key = key_at(steps)
    assert key is not None
    for end in range(1, len(steps)):
        table = at(tree, steps[:end])
        if table and not isinstance(table.value, list if isinstance(steps[end], int) else dict):
            raise LookupError(f"{dotted(tree, steps[:end])} in {table.origin} is not a table")
    inside = is_free(key) and key.name != name
    new = written(_value(text, free_value(key) if inside else _annotation(key, steps)), COMMAND_LINE)
    old = at(tree, steps)
    return put(tree, steps, merge(old, new) if old else new)


def _steps_to(tree: Node, name: str) -> Steps:
    """The steps to a key that the schema has, whether or not the tree has it. Raises LookupError."""
    steps: Steps = ()
    parts = name.split(".")
    while parts:
        key = key_at(steps) if steps else None
        if key is not None and is_free(key):
            return (*steps, *parts)
        if key is not None and key.listed and not isinstance(steps[-1], int):
            index, parts = _element(tree, steps, ".".join(parts))
            steps = (*steps, index)
            continue
        table = key.name if key else ""
        if f"{table}.{parts[0]}".lstrip(".") not in keys() or (key and key.section is None):
            raise LookupError(unknown_key(table, parts[-1] if len(parts) > 1 and not table else parts[0]).message)
        steps = (*steps, parts.pop(0))
    return steps


def _element(tree: Node, steps: Steps, rest: str) -> tuple[int, list[str]]:
    """Which element of a named list `wiki.weight` begins with, and the parts after its name."""
    listed = at(tree, steps)
    elements = listed.value if listed and isinstance(listed.value, list) else []
    names = {str(named.value): index for index, child in enumerate(elements) if (named := at(child, ["name"]))}
    for name in sorted(names, key=len, reverse=True):
        if rest == name or rest.startswith(name + "."):
            return names[name], [part for part in rest[len(name) + 1 :].split(".") if part]
    asked = rest.partition(".")[0]
    near = difflib.get_close_matches(asked, names, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(names)}" if names else ""
    raise LookupError(f"no [[{'.'.join(map(str, steps))}]] is called {asked!r}{hint}")


def _annotation(key: Key, steps: Steps) -> Any:
    return key.section if isinstance(steps[-1], int) else key.field.rebuild_annotation()


def _value(text: str, annotation: Any) -> Any:
    """The text as the schema wants it: of its readings (as it is, as TOML) the first that the key accepts."""
    as_toml = _toml(text)
    readings = [as_toml, text] if annotation is Any or text[:1] in ("[", "{", '"', "'") else [text, as_toml]
    with suppress(ValueError):
        readings.append(float(text))  # also .5 and 5., which TOML refuses
    for reading in readings:
        try:
            TypeAdapter(annotation).validate_python(reading, strict=True)
        except ValidationError:
            continue
        return reading
    return as_toml


def _toml(text: str) -> Any:
    """The text as one TOML value; the text itself when it is none."""
    with suppress(ValueError, RecursionError):  # not TOML, a number of thousands of digits, brackets hundreds deep
        alone, listed = tomli.loads(f"value = {text}"), tomli.loads(f"value = [{text}]")
        # Read twice: a comment or a second line would pass the first, a trailing comma the second.
        if listed == {"value": [alone["value"]]}:
            return alone["value"]
    return text
