"""Small recipes for tests."""

from pathlib import Path

from cheaptrain.recipe.load import LoadedRecipe, load_recipe
from cheaptrain.recipe.schema import Recipe

MINIMAL = """\
[run]
dir = "outputs/x"

[tokenizer]
path = "gpt2"

[model]
preset = "tiny"

[data]
seq_len = 64

[[data.sources]]
name = "web"
weight = 70
files = "web.jsonl"

[[data.sources]]
name = "wiki"
weight = 30
hub = "org/wiki"

[train]
tokens = "1M"
global_batch_tokens = 1024
lr = 3e-4
"""


def line_of(text: str, part: str, nth: int = 1) -> int:
    """The line, from 1, on which `part` stands for the nth time."""
    lines = [number for number, line in enumerate(text.split("\n"), 1) if part in line]
    return lines[nth - 1]


def load_text(folder: Path, text: str, *overrides: str, name: str = "recipe.toml") -> LoadedRecipe:
    """Write a recipe to a folder and load it."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return load_recipe(path, overrides)


def recipe(folder: Path, *overrides: str) -> Recipe:
    """The minimal recipe with overrides."""
    return load_text(folder, MINIMAL, *overrides).recipe
