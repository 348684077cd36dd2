"""Small whole runs for the tests: a recipe over generated text, prepared once, trained in forked children.

A child is forked from a process that has imported everything and has computed nothing, so starting one takes tens of
milliseconds instead of seconds, and it can be killed at any moment.
"""

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.errors import CheaptrainError
from cheaptrain.recipe.load import load_recipe

WORDS = [
    "the",
    "a",
    "of",
    "river",
    "stone",
    "light",
    "under",
    "over",
    "quick",
    "slow",
    "green",
    "small",
    "bright",
    "and",
    "then",
    "when",
    "it",
    "was",
    "is",
    "not",
]


def write_texts(folder: Path, documents: int = 400) -> None:
    """Two jsonl sources of unlike texts; every document is different, so a row read twice shows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, salt in (("prose", 1), ("notes", 2)):
        generator = torch.Generator().manual_seed(salt)
        lines = []
        for number in range(documents):
            length = int(torch.randint(5, 60, (1,), generator=generator))
            picks = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
            lines.append(json.dumps({"text": f"{name} {number}: " + " ".join(WORDS[pick] for pick in picks)}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def recipe_table(folder: Path, run: str = "run") -> dict[str, Any]:
    """A recipe of a tiny model over the texts of `folder`: 60 steps of 4 rows of 64 tokens."""
    return {
        "seed": 11,
        "run": {"dir": str(folder / run)},
        "tokenizer": {"train": {"vocab_size": 400, "sources": ["prose", "notes"]}},
        "model": {"preset": "tiny-qwen3"},
        "data": {
            "dir": str(folder / "data"),
            "seq_len": 64,
            "validation": 0.05,
            "workers": 1,
            "sources": [
                {"name": "prose", "files": str(folder / "prose.jsonl"), "weight": 2, "max_epochs": 9.0},
                {"name": "notes", "files": str(folder / "notes.jsonl"), "weight": 1, "max_epochs": 9.0},
            ],
        },
        "train": {
            "steps": 60,
            "global_batch_tokens": 256,
            "micro_batch_size": 2,
            "lr": 3e-3,
            "warmup": "4 steps",
            "cpu_threads": 1,
        },
        "validation": {"every": "20 steps", "tokens": 256},
        "checkpoint": {"every": "5 steps", "keep_last": 3},
    }


def write_recipe(path: Path, table: dict[str, Any]) -> str:
    """Write `table` as a recipe; returns its path."""
    path.write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)


def prepare(path: str) -> None:
    """Prepare the data of the recipe at `path`, quietly."""
    prepare_recipe(load_recipe(path).recipe, console=Console(quiet=True))


def in_child(work: Callable[[], None], log: Path) -> int:
    """Start `work` in a forked child with its output in `log`; returns its pid. Errors become the documented exit
    code."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1, closefd=False)  # pytest has put its own there
        torch.set_num_threads(1)
        work()
        code = 0
    except CheaptrainError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        code = error.exit_code
    except BaseException as error:
        traceback.print_exc()
        print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(code)


def run_child(work: Callable[[], None], log: Path, kill_after: float | None = None) -> int:
    """Run `work` to its end, or kill it (-9) after so many seconds; returns the exit code, -9 when killed."""
    pid = in_child(work, log)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return os.waitstatus_to_exitcode(status)


def train(*arguments: str) -> Callable[[], None]:
    """Work for a child: what `launch/run.py` does with these recipes and overrides."""

    def work() -> None:
        from cheaptrain.train.chain import run_chain

        run_chain([a for a in arguments if "=" not in a], [a for a in arguments if "=" in a])

    return work


def tail(log: Path) -> str:
    """The end of a child's output."""
    return log.read_text(encoding="utf-8")[-3000:]


def train_with_spy(paths: list[str], spy: Path, overrides: tuple[str, ...] = ()) -> Callable[[], None]:
    """Work for a child: train, and note for each step the step number, its tokens, and a hash of what the model was
    fed."""

    def work() -> None:
        from cheaptrain.train import loop
        from cheaptrain.train.chain import run_chain

        plain = loop.train_step

        def spied(model: Any, optimizers: Any, batches: Any, **rest: Any) -> Any:
            rows = [hashlib.sha256(row.numpy().tobytes()).hexdigest()[:16] for b in batches for row in b.input_ids]
            record = {"rows": rows, "tokens": sum(batch.input_ids.numel() for batch in batches)}
            with spy.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
            return plain(model, optimizers, batches, **rest)

        loop.train_step = spied
        run_chain(paths, overrides)

    return work


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Records of a jsonl file; a torn last line, as a kill leaves one, is left out."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """Weights of the finished run."""
    return load_file(run / "final" / "model.safetensors")


def final_state(run: Path) -> dict[str, torch.Tensor]:
    """Optimizer moments and random states of the finished run."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted((run / "final" / "state").glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors
