"""A recipe's files, in the order in which they count.

`extends` names other recipes, relative to the file that says it. All files are put in one line, a file after everything
it extends and each only once, and laid over one another in that order. The trap is the diamond: when two parents extend
the same base, the second must not bring the base's values back over what the first changed. `unset` takes away what
earlier files said before the file's own keys are laid over it.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import tomli

from cheaptrain.recipe.errors import Origin, Problem
from cheaptrain.recipe.toml_lines import toml_lines
from cheaptrain.recipe.tree import Node, build, locate, merge, put


@dataclass(frozen=True)
class Layer:
    """One file: its keys, and the dotted keys it unsets."""

    file: str
    tree: Node
    unset: tuple[Node, ...]


def read_layers(path: Path, problems: list[Problem]) -> list[Layer]:
    """The file and all it extends, base first. What cannot be read is left out and noted in `problems`."""
    layers: dict[str, Layer] = {}
    _read(path, Origin("command line", 0), [], layers, problems)
    return list(layers.values())


def merge_layers(layers: list[Layer], problems: list[Problem]) -> Node:
    """One tree of all layers."""
    tree = Node({}, layers[-1].tree.origin)
    for index, layer in enumerate(layers):
        for key in layer.unset:
            steps = locate(tree, key.value)
            if steps:
                tree = put(tree, steps, None)
            elif not any(locate(earlier.tree, key.value) for earlier in layers[:index]):
                message = f"{key.value!r} is not inherited from anywhere, so there is nothing to unset"
                problems.append(Problem(key.origin, "unset", message))
        tree = merge(tree, layer.tree)
    return tree


def _read(path: Path, asked: Origin, chain: list[Path], layers: dict[str, Layer], problems: list[Problem]) -> None:
    real, file = os.path.realpath(path), _shown(path)
    if path in chain:
        circle = " -> ".join(_shown(link) for link in [*chain[chain.index(path) :], path])
        problems.append(Problem(asked, "extends", f"recipes extend each other in a circle: {circle}"))
        return
    if real in layers:
        return
    tree = _parse(path, file, asked, problems)
    if tree is None:
        return
    items = dict(tree.value)
    parents = _texts("extends", items.pop("extends", None), problems)
    unset = _texts("unset", items.pop("unset", None), problems)
    for parent in parents:
        _read(Path(os.path.normpath(path.parent / parent.value)), parent.origin, [*chain, path], layers, problems)
    layers[real] = Layer(file, Node(items, tree.origin), tuple(unset))


def _parse(path: Path, file: str, asked: Origin, problems: list[Problem]) -> Node | None:
    key = "extends" if asked.line else ""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        problems.append(Problem(asked, key, f"{file} does not exist (looked in {Path.cwd()})"))
    except UnicodeDecodeError as error:
        problems.append(Problem(Origin(file, 1), "", f"not UTF-8 text: {error.reason} at byte {error.start:,}"))
    except OSError as error:
        problems.append(Problem(asked, key, f"cannot read {file}: {error.strerror}"))
    else:
        try:
            return build(tomli.loads(text), file, toml_lines(text))
        except tomli.TOMLDecodeError as error:
            problems.append(_syntax(error, file, text))
        except (ValueError, RecursionError) as error:  # a number of thousands of digits, brackets hundreds deep
            problems.append(Problem(Origin(file, 1), "", f"cannot be read as TOML: {error}"))
    return None


def _texts(key: str, node: Node | None, problems: list[Problem]) -> list[Node]:
    """`extends` and `unset` are a text or a list of texts."""
    elements = node.value if node and isinstance(node.value, list) else [node] if node else []
    if all(isinstance(element.value, str) and element.value and "\0" not in element.value for element in elements):
        return elements
    assert node is not None
    example = '"base.toml"' if key == "extends" else '"train.tokens"'
    problems.append(Problem(node.origin, key, f"expected text or a list of texts, e.g. {key} = [{example}]"))
    return []


_HINTS = [
    (r"\s*[\w.\"-]+\s*=\s*[\d.,_]+\s*[A-Za-z%].*", 'an amount with a unit is text: write it in quotes, e.g. "10B"'),
    (r"\s*[\w.\"-]+\s*=\s*(True|False|TRUE|FALSE|yes|no|on|off)\b.*", "write true or false"),
    (r"\s*[\w.\"-]+\s*=\s*(None|none|null|nil|~)\b.*", 'TOML has no null: leave the key out (or unset = ["the.key"])'),
    (r"\s*[\w.\"-]+\s*=\s*\.\d.*", "a number begins with a digit: 0.5, not .5"),
    (r"\s*[\w.\"-]+\s*=\s*[A-Za-z/~.$].*", "text stands in quotes"),
    (r"\s*[\w.\"-]+\s*:.*", "TOML separates key and value by ="),
]


def _syntax(error: tomli.TOMLDecodeError, file: str, text: str) -> Problem:
    line = text.split("\n")[error.lineno - 1].strip() if error.lineno <= text.count("\n") + 1 else ""
    reason = error.msg
    if reason.startswith(("Cannot overwrite a value", "Cannot declare")):
        reason = f"the same key or table is given twice ({reason})"
    hint = next((f"\n  {hint}" for pattern, hint in _HINTS if re.fullmatch(pattern, line)), "")
    shown = f"\n  {line}" if line else ""
    return Problem(Origin(file, error.lineno), "", f"not valid TOML, column {error.colno}: {reason}{shown}{hint}")


def _shown(path: Path) -> str:
    """The path as people would type it from here."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") and path.is_absolute() else relative
