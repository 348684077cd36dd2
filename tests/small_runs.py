"""Small whole runs for the tests: a recipe over generated text, prepared once, trained in forked children.

A child is forked from a process that has imported everything and has computed nothing, so starting one takes tens of
milliseconds instead of seconds, and it can be killed at any moment.
"""

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import tomli_w
import torch
from ranks import end_ranks
from rich.console import Console
from safetensors.torch import load_file

from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.errors import CheaptrainError
from cheaptrain.exits import guarded
from cheaptrain.recipe.load import load_recipe
from cheaptrain.train import chain as stages

# A report takes seconds, and each of the hundreds of runs here would write one. tests/test_report_run.py has them.
REPORT_AT_THE_END, stages.report_at_the_end = stages.report_at_the_end, lambda *_: None

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


def train_together(
    size: int,
    arguments: Sequence[str],
    log: Path,
    before: Callable[[int], None] = lambda rank: None,
    timeout: float = 240,
) -> dict[int, int | str]:
    """What `launch/run.py` does with these recipes and overrides, in `size` processes; how each of them ended.

    `before` is called in each with its rank, to put spies and faults in place. Output of all goes to `log`.
    """
    # Here, so that no child has to import them.
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    def one(rank: int, _: int) -> None:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout = sys.stderr = os.fdopen(handle, "w", buffering=1, closefd=False)
        # Several seconds in a process of its own, and no part of what is tested with this.
        stages.print_plan = lambda *_: None
        before(rank)
        guarded(train(*arguments))

    with tempfile.TemporaryDirectory(prefix="together-") as notes:
        return end_ranks(one, size, folder=Path(notes), timeout=timeout)


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


def on_call(where: Any, name: str, call: int, act: Callable[[], None]) -> None:
    """In this process, call `act` just before the `call`th call of the function `name` of the module `where`."""
    plain, calls = getattr(where, name), [0]

    def spied(*arguments: Any, **rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == call:
            act()
        return plain(*arguments, **rest)

    setattr(where, name, spied)


def at_step(step: int, act: Callable[[Any], None]) -> None:
    """In this process, call `act` with the stage just before it does the step of that number."""
    from cheaptrain.train import loop

    plain = loop._step

    def spied(stage: Any, *rest: Any) -> Any:
        if stage.ledger.step + 1 == step:
            act(stage)
        return plain(stage, *rest)

    loop._step = spied


def signal_at_step(step: int, number: int = signal.SIGTERM) -> None:
    """In this process, get a signal just before the step of that number, which is then the last one done."""
    at_step(step, lambda stage: os.kill(os.getpid(), number))


def train_until(recipe: str, step: int) -> Callable[[], None]:
    """Work for a child: train, and be asked to stop just before the step of that number."""

    def work() -> None:
        signal_at_step(step)
        train(recipe)()

    return work


def note_rows(file: Path) -> None:
    """In this process, append to `file` what the model is fed in each step: `step`, `place` on the mesh, and `rows`,
    token ids by micro-batch and row (with context parallelism this process's stretch of each)."""
    from cheaptrain.train import loop

    plain_step, plain, now = loop._step, loop.train_step, [0]

    def spied_step(stage: Any, batches: Any, number: int, factor: float) -> Any:
        now[0] = number
        return plain_step(stage, batches, number, factor)

    def spied(root: Any, optimizers: Any, batches: Any, *, mesh: Any, **rest: Any) -> Any:
        rows = [batch.input_ids.tolist() for batch in batches]
        line = json.dumps({"step": now[0], "place": mesh.get_coordinate(), "rows": rows}) + "\n"
        with file.open("ab", buffering=0) as notes:
            notes.write(line.encode())
        return plain(root, optimizers, batches, mesh=mesh, **rest)

    loop._step, loop.train_step = spied_step, spied


def rows_of_steps(file: Path) -> dict[int, list[list[int]]]:
    """The rows of each step in their global order, put together from what `note_rows` wrote in all processes."""
    steps: dict[int, dict[tuple[int, ...], list[list[list[int]]]]] = {}
    for note in read_lines(file):
        places = steps.setdefault(note["step"], {})
        assert tuple(note["place"]) not in places, f"step {note['step']} was done twice at {note['place']}"
        places[tuple(note["place"])] = note["rows"]
    return {step: _together(places) for step, places in steps.items()}


def _together(places: dict[tuple[int, ...], list[list[list[int]]]]) -> list[list[int]]:
    groups: dict[tuple[int, int], dict[tuple[int, int], list[list[list[int]]]]] = {}
    for (replicate, shard, cp, tp), rows in sorted(places.items()):
        groups.setdefault((replicate, shard), {})[cp, tp] = rows
    whole = []
    for shares in groups.values():
        for (cp, _), rows in shares.items():
            assert rows == shares[cp, 0], "processes that share matrices were fed different tokens"
        stretches = [rows for (_, tp), rows in shares.items() if tp == 0]
        micros = [zip(*micro, strict=True) for micro in zip(*stretches, strict=True)]
        whole.append([[list(chain.from_iterable(parts)) for parts in rows] for rows in micros])
    return [row for micro_step in zip(*whole, strict=True) for micro in micro_step for row in micro]


def ledger_of(folder: Path) -> dict[str, Any]:
    """The ledger in a checkpoint."""
    ledger: dict[str, Any] = json.loads((folder / "state" / "trainer.json").read_text(encoding="utf-8"))["ledger"]
    return ledger


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
