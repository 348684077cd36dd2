"""Every key of the recipe by its dotted name, read off the schema.

Elements of a list of tables share their names: `data.sources.weight` is the weight of any source.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BeforeValidator
from pydantic.fields import FieldInfo

from cheaptrain.recipe.quantities import parse_bytes, parse_count, parse_every, parse_seconds, parse_span
from cheaptrain.recipe.schema import Recipe, Section


@dataclass(frozen=True)
class Key:
    """A key or a table. `section` is the table type it holds, if any; `listed` when it holds a list of such tables."""

    name: str
    field: FieldInfo
    section: type[Section] | None
    listed: bool

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def table(self) -> str:
        """The dotted name of the table it stands in; empty at the top."""
        return self.name.rpartition(".")[0]

    @property
    def path(self) -> bool:
        """Whether it names files or folders, in which `${env:NAME}` is expanded."""
        return self._marked("path")

    @property
    def operational(self) -> bool:
        """Whether it may change between a run and its resumption."""
        return self._marked("operational")

    def _marked(self, mark: str) -> bool:
        extra = self.field.json_schema_extra
        return isinstance(extra, dict) and bool(extra.get(mark))


@cache
def keys() -> dict[str, Key]:
    """All tables and keys by dotted name, in the schema's order."""
    return {key.name: key for key in _keys(Recipe, "")}


def dotted_names(steps: Sequence[str | int]) -> str:
    """The dotted name of a place, without the numbers of list elements."""
    return ".".join(step for step in steps if isinstance(step, str))


def key_at(steps: Sequence[str | int]) -> Key | None:
    """The key at a place in a recipe; inside a free table (`model.overrides`), the table."""
    names = [step for step in steps if isinstance(step, str)]
    while names:
        key = keys().get(".".join(names))
        if key is not None:
            return key
        names.pop()
    return None


def is_free(key: Key) -> bool:
    """Whether the key is a table that takes any keys (`model.overrides`, `env`)."""
    return get_origin(key.field.annotation) is dict


def free_value(key: Key) -> Any:
    """The type of the values in a free table."""
    return get_args(key.field.annotation)[1]


def place(name: str) -> str:
    """How a key is written in a file: `train.lr`, `weight in [[data.sources]]`, or `[train]` for a table."""
    table, _, leaf = name.rpartition(".")
    if name in keys() and (keys()[name].section is not None or is_free(keys()[name])):
        return f"[[{name}]]" if keys()[name].listed else f"[{name}]"
    return f"{leaf} in [[{table}]]" if table in keys() and keys()[table].listed else name


def expected(key: Key) -> str:
    """What the key takes, in words: `a number`, `text or a list of texts`, `"adamw" or "muon"`."""
    return _either([_words(option) for option in _options(key.field.rebuild_annotation())])


def kinds(annotation: Any) -> list[Any]:
    """The alternatives of a union without None and without constraints."""
    return [get_args(option)[0] if get_origin(option) is Annotated else option for option in _options(annotation)]


def _options(annotation: Any) -> list[Any]:
    """The alternatives of a union without None, each with its own constraints."""
    bare = get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation
    if get_origin(bare) in (Union, UnionType):
        return [inner for option in get_args(bare) if option is not NoneType for inner in _options(option)]
    return [annotation]


_QUANTITIES = {
    parse_count: "an amount",
    parse_bytes: "an amount of bytes",
    parse_seconds: "a time",
    parse_span: "a span",
    parse_every: "a span",
}


def _words(kind: Any, plural: bool = False) -> str:
    if get_origin(kind) is Annotated:
        kind, *metadata = get_args(kind)
        for constraint in metadata:
            if isinstance(constraint, BeforeValidator) and constraint.func in _QUANTITIES:
                return _QUANTITIES[constraint.func]
    if get_origin(kind) is Literal:
        return _either([f'"{value}"' if isinstance(value, str) else str(value) for value in get_args(kind)])
    if get_origin(kind) is list:
        return f"a list of {_words(get_args(kind)[0], plural=True)}"
    if get_origin(kind) is dict and get_args(kind)[1] is not Any:
        return f"a table of {_words(get_args(kind)[1], plural=True)}"
    if get_origin(kind) is tuple:
        return f"a list of {len(get_args(kind))} {_words(get_args(kind)[0], plural=True)}"
    singular, several = {
        str: ("text", "texts"),
        int: ("a whole number", "whole numbers"),
        float: ("a number", "numbers"),
        bool: ("true or false", "true or false"),
    }.get(kind, ("a table", "tables"))
    return several if plural else singular


def _either(options: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(options[:-1]), options[-1]]))


def _keys(section: type[Section], prefix: str) -> Iterator[Key]:
    for leaf, field in section.model_fields.items():
        inner, listed = _section(field.annotation)
        yield Key(prefix + leaf, field, inner, listed)
        if inner is not None:
            yield from _keys(inner, f"{prefix}{leaf}.")


def _section(annotation: Any) -> tuple[type[Section] | None, bool]:
    for kind in kinds(annotation):
        listed = get_origin(kind) is list
        inner = get_args(kind)[0] if listed else kind
        if isinstance(inner, type) and issubclass(inner, Section):
            return inner, listed
    return None, False
