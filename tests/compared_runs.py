"""Runs and scored checkpoints as they lie on the disk, without a model: recipe, metrics and answers are made up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cheaptrain.checkpoint.verify import seal
from cheaptrain.evaluate.results import Evaluation, Item, Metric, Scored, TaskResult, write_evaluation, write_items
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.schema import Recipe


def recipe_of(folder: Path, seed: int, **train: Any) -> Recipe:
    """A small recipe; `train` changes keys of [train]."""
    return Recipe.model_validate(
        {
            "seed": seed,
            "run": {"dir": str(folder)},
            "tokenizer": {"path": "gpt2"},
            "model": {"preset": "tiny-qwen3"},
            "data": {"seq_len": 64, "sources": [{"name": "web", "weight": 1.0, "files": "web.jsonl"}]},
            "train": {"steps": 40, "global_batch_tokens": 256, "lr": 3e-4} | train,
        }
    )


def make_run(
    folder: Path,
    *,
    seed: int = 1,
    loss: float = 3.0,
    tokenizer: str = "a" * 64,
    recipe: Recipe | None = None,
    scores: Mapping[str, Sequence[float]] | None = None,
    **told: Any,
) -> Path:
    """A finished run of 40 steps whose held-out loss ends at `loss`, with a scored last checkpoint."""
    folder.mkdir(parents=True)
    recipe = recipe or recipe_of(folder, seed)
    kept = {
        "format_version": 1,
        "recipe": recipe.model_dump(mode="json"),
        "provenance": {},
        "identity": identity(recipe),
        "inputs": {"tokenizer": tokenizer, "data": {"web": "d" * 64}},
    }
    (folder / "recipe.json").write_text(json.dumps(seal(json.loads(json.dumps(kept)))), encoding="utf-8")
    (folder / "launch.json").write_text(json.dumps({"steps": 40, "tokens": 40 * 256, "plan": {"flops_per_token": 6e6}}))
    lines = list[dict[str, Any]]()
    for step in range(41):
        if step:
            now = {"train/loss": loss + 2 / step, "train/tokens_per_second": 512.0}
            lines.append({"step": step, "train/tokens": 256 * step, **now})
        if step % 10 == 0:
            held_out = {"val/loss": loss + (40 - step) / 40, "val/bpb": (loss + (40 - step) / 40) / 3}
            lines.append({"step": step, "train/tokens": 256 * step, **held_out})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    if scores is not None:
        score(folder, 40, scores, **told)
    return folder


def score(
    run: Path, step: int, scores: Mapping[str, Sequence[float]], *, checkpoint: str | None = None, **told: Any
) -> Path:
    """Results of a checkpoint: of each task the scores of its questions. `told` changes fields of the results."""
    folder = run / "eval" / f"step-{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    results = [task_result(folder, task, values, **told) for task, values in scores.items()]
    scored = Scored(str(run / "checkpoints" / folder.name), checkpoint or f"{run.name}-{step}", step, 256 * step, 1000)
    write_evaluation(Evaluation(folder, scored, tuple(results)))
    return folder


def task_result(
    folder: Path, task: str, values: Sequence[float], *, docs: Sequence[str] | None = None, **told: Any
) -> TaskResult:
    """One task and its items, question i being `docs[i]`."""
    docs = docs or [f"{task}-{number}" for number in range(len(values))]
    items = [Item(number, doc, {"acc": value}) for number, (doc, value) in enumerate(zip(docs, values, strict=True))]
    write_items(folder / f"{task}.items.jsonl", items)
    fields: dict[str, Any] = {
        "task": task,
        "key": "k",
        "version": "1.0",
        "n": len(values),
        "metrics": (Metric("acc", float(np.mean(values)), 0.03),),
        "settings": {"shots": 0, "limit": None, "batch_size": 16, "dtype": "float32"},
        "seconds": 1.0,
        "harness": "lm-eval 0.4.13",
        "when": "2026-11-20T00:00:00",
        "items": f"{task}.items.jsonl",
    }
    return TaskResult(**fields | told)


def answers(accuracy: float, seed: int, questions: int = 200) -> list[float]:
    """Right (1) and wrong (0) answers with a chance of `accuracy` each."""
    return list(map(float, np.random.default_rng(seed).random(questions) < accuracy))
