"""The recipe before it is typed: a tree of values that each know where they were written.

Recipes that extend others are merged here: tables deeply, lists of named tables by `name`, everything else replaced.
The trap it avoids: after a merge nobody knows which file a bad value came from, so every node keeps its origin.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cheaptrain.recipe.errors import Origin

Steps = tuple[str | int, ...]


@dataclass(frozen=True)
class Node:
    """A value and where it was written. `value`: a dict of nodes (a table), a list of nodes, or a plain value."""

    value: Any
    origin: Origin


def build(value: Any, file: str, lines: Mapping[Steps, int], steps: Steps = ()) -> Node:
    """A tree from what tomli gave, with the lines that `toml_lines` found."""
    if isinstance(value, dict):
        value = {key: build(child, file, lines, (*steps, key)) for key, child in value.items()}
    elif isinstance(value, list):
        value = [build(child, file, lines, (*steps, index)) for index, child in enumerate(value)]
    return Node(value, Origin(file, lines.get(steps, 1)))


def written(value: Any, origin: Origin) -> Node:
    """A tree that was written in one place, such as on the command line."""
    if isinstance(value, dict):
        value = {key: written(child, origin) for key, child in value.items()}
    elif isinstance(value, list):
        value = [written(child, origin) for child in value]
    return Node(value, origin)


def plain(node: Node) -> Any:
    """The values without their origins."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def merge(base: Node, over: Node) -> Node:
    """`over` on top of `base`."""
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        items = dict(base.value)
        for key, child in over.value.items():
            items[key] = merge(items[key], child) if key in items else child
        return Node(items, over.origin)
    names = _names(base)
    if names and _names(over):
        elements = list(base.value)
        for name, child in zip(_names(over), over.value, strict=True):
            if name in names:
                # Taken once: the same name twice in one file stays twice, to be refused.
                index = names.index(name)
                names[index] = ""
                elements[index] = merge(elements[index], child)
            else:
                elements.append(child)
        return Node(elements, over.origin)
    return over


def locate(node: Node, dotted: str) -> Steps | None:
    """The steps to a dotted key that is there (`data.sources.wiki.weight`: an element of a named list by its name)."""
    if not dotted:
        return ()
    for label, step in _labels(node):
        if dotted == label or dotted.startswith(label + "."):
            rest = locate(node.value[step], dotted[len(label) + 1 :])
            if rest is not None:
                return (step, *rest)
    return None


def at(node: Node, steps: Sequence[str | int]) -> Node | None:
    """The node at `steps`, or None."""
    for step in steps:
        inner: Any = node.value
        there = (isinstance(inner, list) and step in range(len(inner))) or (isinstance(inner, dict) and step in inner)
        if not there:
            return None
        node = inner[step]
    return node


def put(node: Node, steps: Sequence[str | int], new: Node | None) -> Node:
    """A tree with the node at `steps` replaced, or removed when `new` is None. Tables on the way are made."""
    if not steps:
        assert new is not None
        return new
    step, rest = steps[0], steps[1:]
    items: Any = node.value.copy() if isinstance(node.value, dict | list) else {}
    if new is None and not rest:
        del items[step]
    else:
        items[step] = put(at(node, [step]) or Node({}, new.origin if new else node.origin), rest, new)
    return Node(items, node.origin)


def leaves(node: Node, steps: Steps = ()) -> Iterator[tuple[Steps, Node]]:
    """Every value that is neither a table nor a list, with the steps to it."""
    if isinstance(node.value, dict | list):
        for step in node.value if isinstance(node.value, dict) else range(len(node.value)):
            yield from leaves(node.value[step], (*steps, step))
    else:
        yield steps, node


def dotted(node: Node, steps: Sequence[str | int]) -> str:
    """What people call the place: `data.sources.wiki.weight`, or `data.sources[2].weight` where there is no name."""
    text = ""
    for index, step in enumerate(steps):
        if isinstance(step, int):
            name = at(node, (*steps[: index + 1], "name"))
            named = name is not None and isinstance(name.value, str) and bool(name.value)
            text += f".{name.value}" if name and named else f"[{step + 1}]"
        else:
            text += f".{step}" if text else step
    return text


def _labels(node: Node) -> list[tuple[str, str | int]]:
    if isinstance(node.value, dict):
        return [(key, key) for key in node.value]
    return [(name, index) for index, name in enumerate(_names(node))]


def _names(node: Node) -> list[str]:
    """The names of a list of named tables; empty for anything else."""
    if not isinstance(node.value, list):
        return []
    names = [at(child, ["name"]) for child in node.value]
    texts = [name.value for name in names if name is not None and isinstance(name.value, str)]
    return texts if len(texts) == len(names) else []
