"""A recipe of a few kilobytes of text, for tests that need one prepared or planned."""

import json
from io import StringIO
from pathlib import Path

from rich.console import Console

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.recipe.load import LoadedRecipe, load_recipe

_TEXTS = ("café naïve 日本語 \U0001f600 of\nrows", "a model\tlearns from text", "the tokens of a row", "")
_RECIPE = """
[run]
dir = "{folder}/run"
[tokenizer.train]
vocab_size = 340
sources = ["web"]
[model]
preset = "tiny-qwen3"
[data]
dir = "{folder}/data"
seq_len = 64
validation = 0.1
workers = 1
[[data.sources]]
name = "web"
weight = 2
files = "{folder}/web.jsonl"
on_bad_line = "skip"
[[data.sources]]
name = "drills"
weight = 1
drills = {{ documents = 60, digits = 1 }}
[train]
steps = 10
global_batch_tokens = 256
micro_batch_size = 2
lr = 1e-3
"""


def tiny_recipe(folder: Path, *overrides: str, prepared: bool = False) -> LoadedRecipe:
    """Write text and recipe into `folder`: 160 documents, some of them empty, and two lines that are no JSON."""
    lines = [
        json.dumps({"text": "; ".join(_TEXTS[(i + k) % 3] + f" {i}" for k in range(i % 11)) if i % 40 else ""})
        for i in range(160)
    ]
    (folder / "web.jsonl").write_text("\n".join([*lines, '{"text":', "oops"]) + "\n", encoding="utf-8")
    path = folder / "tiny.toml"
    path.write_text(_RECIPE.format(folder=folder.as_posix()), encoding="utf-8")
    loaded = load_recipe(path, overrides)
    if prepared:
        prepare_recipe(loaded.recipe, console=Console(file=StringIO()))
    return loaded


def pipe() -> tuple[Console, StringIO]:
    """A console that writes where it cannot see a terminal, and what it wrote."""
    written = StringIO()
    return Console(file=written), written
