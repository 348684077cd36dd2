"""Whole runs of a small recipe for the benchmarks, started as anyone would: `cheaptrain launch`."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.recipe.load import load_recipe

RECIPE = """
[run]
dir = "{folder}/run"
[tokenizer.train]
vocab_size = {vocab}
sources = ["code"]
max_bytes = "2MB"
[model]
preset = "quickstart"
[data]
dir = "{folder}/data"
seq_len = {seq_len}
[[data.sources]]
name = "code"
packages = ["datasets", "pydantic"]
content = "code"
weight = 1
max_epochs = 1000
[train]
steps = {steps}
global_batch_tokens = {batch}
micro_batch_size = {rows}
lr = 1e-3
[validation]
tokens = 256
"""


def prepared(folder: Path, *, vocab: int, seq_len: int, steps: int, batch: int, rows: int) -> Path:
    """The recipe of these values in `folder`, its data prepared."""
    path = folder / "recipe.toml"
    values = {"vocab": vocab, "seq_len": seq_len, "steps": steps, "batch": batch, "rows": rows}
    path.write_text(RECIPE.format(folder=folder, **values), encoding="utf-8")
    prepare_recipe(load_recipe(path).recipe, console=Console(quiet=True))
    return path


def wider(hidden: int, mlp: int, layers: int) -> list[str]:
    """The keys that make the model of the recipe larger."""
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers}
    return [f"model.overrides.{name}={size}" for name, size in sizes.items()]


def launched(recipe: Path, name: str, processes: int, *keys: str) -> list[dict[str, Any]]:
    """Train on so many processes in a run folder of its own; the records of its metrics.jsonl."""
    run = recipe.parent / name
    command = [sys.executable, "-c", "from cheaptrain.cli import main; main()", "launch", str(recipe)]
    command += [f"run.dir={run}", *keys, "--processes", str(processes)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        sys.exit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
