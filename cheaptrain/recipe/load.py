"""A TOML file and the command line → one typed recipe, with where each value came from.

    files in order (layers) → one tree (merge) → overrides → ${env:NAME} in paths → typed recipe (check)

Every step notes what is wrong and goes on as long as that makes sense, so that all mistakes are shown at once. Paths
are left as written: like `outputs/...` they count from the folder the command is run in, whichever file wrote them.
Only `extends` counts from the file that says it.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.check import check
from cheaptrain.recipe.errors import Problem, RecipeProblems
from cheaptrain.recipe.keys import key_at
from cheaptrain.recipe.layers import merge_layers, read_layers
from cheaptrain.recipe.overrides import apply_overrides, is_utf8
from cheaptrain.recipe.schema import Recipe, Section
from cheaptrain.recipe.tree import Node, Steps, at, dotted, leaves, put


@dataclass(frozen=True)
class LoadedRecipe:
    """A recipe and its files, base first. `provenance` says of every dotted key where its value was written:
    `file:line`, `command line` or `default`."""

    recipe: Recipe
    path: Path
    files: tuple[str, ...]
    provenance: dict[str, str]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> LoadedRecipe:
    """Read a recipe and all it extends. Raises RecipeError that lists everything wrong with it."""
    if not is_utf8(str(path)) or "\0" in str(path):
        raise RecipeError(f"{str(path)!a} is not UTF-8 text; rename the file")
    problems: list[Problem] = []
    layers = read_layers(Path(path), problems)
    if problems:  # a file is missing or unreadable: any more complaints would be about its absence
        raise RecipeProblems(str(path), problems)
    tree = merge_layers(layers, problems)
    tree = apply_overrides(tree, overrides, problems)
    tree = _expand(tree, problems)
    files = tuple(layer.file for layer in layers)
    recipe = check(tree, files, problems)
    if recipe is None:
        raise RecipeProblems(str(path), problems)
    return LoadedRecipe(recipe, Path(path), files, dict(_provenance(recipe, tree)))


def load_recipes(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> list[LoadedRecipe]:
    """Read several recipes. Raises RecipeError with what is wrong with any of them."""
    loaded: list[LoadedRecipe] = []
    problems: list[RecipeError] = []
    for path in paths:
        try:
            loaded.append(load_recipe(path, overrides))
        except RecipeError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise RecipeError("\n".join(map(str, problems)))
    return loaded


_ENV = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


def _expand(tree: Node, problems: list[Problem]) -> Node:
    """`${env:NAME}` in paths replaced; refused anywhere else, where it would be taken as text."""
    for steps, leaf in list(leaves(tree)):
        if not isinstance(leaf.value, str):
            continue
        key, name = key_at(steps), dotted(tree, steps)
        if key is None or not key.path:
            if "${env:" in leaf.value:
                problems.append(Problem(leaf.origin, name, "${env:NAME} is expanded in paths only, and this is none"))
            continue
        unset = [variable for variable in _ENV.findall(leaf.value) if not os.environ.get(variable)]
        for variable in unset:  # an empty one as well: "${env:SCRATCH}/data" would be a folder at the root
            how = "empty" if variable in os.environ else "not set"
            problems.append(Problem(leaf.origin, name, f"the environment variable {variable} is {how}"))
        if not leaf.value:
            problems.append(Problem(leaf.origin, name, "is empty; give a path, or leave the key out"))
        elif "${" in _ENV.sub("", leaf.value):
            problems.append(Problem(leaf.origin, name, f"{leaf.value!r}: a variable is written ${{env:NAME}}"))
        elif leaf.value.startswith("~"):
            problems.append(Problem(leaf.origin, name, f"{leaf.value!r}: ~ is not expanded; write ${{env:HOME}}/..."))
        elif not unset:
            expanded = _ENV.sub(lambda match: os.environ[match[1]], leaf.value)
            if "\0" in expanded or not is_utf8(expanded):
                problems.append(Problem(leaf.origin, name, f"{expanded!a} is no path: UTF-8 text without \\0"))
            tree = put(tree, steps, Node(expanded, leaf.origin))
    return tree


def _provenance(recipe: Recipe, tree: Node) -> Iterator[tuple[str, str]]:
    def walk(value: Any, steps: Steps, name: str) -> Iterator[tuple[str, str]]:
        if isinstance(value, Section):
            for key in type(value).model_fields:
                yield from walk(getattr(value, key), (*steps, key), f"{name}.{key}" if name else key)
        elif isinstance(value, list) and value and isinstance(value[0], Section):
            for index, item in enumerate(value):
                yield from walk(item, (*steps, index), f"{name}.{item.name}")
        elif isinstance(value, dict) and value:
            for key, item in value.items():
                yield from walk(item, (*steps, key), f"{name}.{key}")
        else:
            node = at(tree, steps)
            yield name, str(node.origin) if node else "default"

    return walk(recipe, (), "")
