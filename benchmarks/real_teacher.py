"""A small student with and without a real teacher, for the same tokens.

SmolLM2-135M-Instruct teaches a student of the quickstart's shape, which has its tokenizer. Both students read the same
rows, two seeds each; what is compared is the loss on held-out text, the student's own cross-entropy either way.

    python -m cheaptrain.model.gguf SmolLM2-135M-Instruct.Q4_1.gguf.zst TEACHER --tokenizer FOLDER
    python benchmarks/real_teacher.py --teacher TEACHER --text FOLDER --folder OUTPUTS

TEXT holds `edu.parquet` and `web.parquet`. Runs that are finished in OUTPUTS are not run again. An hour on two cores.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from results import report
from rich.console import Console
from runs import launched

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.recipe.load import load_recipe

RECIPE = """
[run]
dir = "{folder}/run"
[tokenizer]
path = "{teacher}"
[model]
preset = "quickstart"
[data]
dir = "{folder}/data"
seq_len = 256
validation = 0.02
unit_bytes = "4MB"
[[data.sources]]
name = "edu"
files = "{text}/edu.parquet"
weight = 60
[[data.sources]]
name = "web"
files = "{text}/web.parquet"
weight = 40
[validation]
every = "50%"
tokens = "8Ki"
[checkpoint]
every = "50%"
keep_last = 1
[train]
steps = 60
global_batch_tokens = 2048
micro_batch_size = 8
optimizer = "muon"
lr = 6e-3
muon_lr = 0.03
schedule = "linear"
warmup = "5%"
cpu_threads = 1
"""
TAUGHT = '[distill]\nteacher = "{teacher}"\n[train]\nobjective = "distill"\n'
SEEDS = (1, 2)


def main() -> None:
    """Run both students for each seed and report."""
    parser = argparse.ArgumentParser()
    for name in ("teacher", "text", "folder"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    folder = arguments.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    values = {"folder": folder, "teacher": arguments.teacher, "text": arguments.text}
    plain, taught = folder / "plain.toml", folder / "taught.toml"
    plain.write_text(RECIPE.format(**values), encoding="utf-8")
    taught.write_text('extends = "plain.toml"\n' + TAUGHT.format(**values), encoding="utf-8")
    prepare_recipe(load_recipe(plain).recipe, console=Console(quiet=True))

    rows, data = [], []
    for seed in SEEDS:
        for name, recipe in (("alone", plain), ("taught", taught)):
            scores = _scores(launched(recipe, f"{recipe.stem}-{seed}", 1, f"seed={seed}"))
            rows.append(
                [
                    str(seed),
                    name,
                    f"{scores[0]['val/loss']:.3f} → {scores[-1]['val/loss']:.3f}",
                    f"{scores[-1]['val/bpb']:.4f}",
                ]
            )
            data.append({"seed": seed, "student": name, "validation": scores})
    report(
        "real_teacher",
        title="A student of the quickstart's shape after 122,880 tokens, alone and taught by SmolLM2-135M-Instruct",
        header=["seed", "student", "validation loss", "bits per byte"],
        rows=rows,
        data={"runs": json.loads(json.dumps(data))},
    )


def _scores(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    keys = ("step", "val/loss", "val/bpb")
    return [{key: record[key] for key in keys} for record in records if "val/loss" in record]


if __name__ == "__main__":
    main()
