"""Folders of runs as training leaves them, written in a millisecond: for tests of what is read from them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from small_runs import recipe_table, write_recipe

from cheaptrain.checkpoint.verify import seal, stated_fingerprint
from cheaptrain.durable import canonical_json, sha256_of
from cheaptrain.evaluate.results import (
    Evaluation,
    Item,
    Metric,
    Scored,
    TaskResult,
    read_evaluation,
    write_evaluation,
    write_items,
)  # fmt: skip
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.load import load_recipe

BEGAN = 1_800_000_000.0
TOKENS = 256  # a step


def fake_run(
    folder: Path,
    *,
    losses: Sequence[float | None] = (3.0, 2.5, 2.0),
    launches: Sequence[Mapping[str, Any]] | None = None,
    inputs: Mapping[str, Any] | None = None,
    table: Mapping[str, Any] | None = None,
    more: Mapping[str, Sequence[float]] | None = None,
    log_every: int = 1,
) -> Path:
    """A run in `folder`: a line of metrics for each of `losses`, `more` columns beside them, and the last launch's
    record with those before it. `table`: tables of the recipe to replace. No checkpoint."""
    folder.mkdir(parents=True)
    recipe = {**recipe_table(folder.parent, folder.name), **(table or {})}
    loaded = load_recipe(write_recipe(folder.parent / f"{folder.name}.toml", recipe))
    kept = {
        "format_version": 1,
        "recipe": loaded.recipe.model_dump(mode="json"),
        "provenance": loaded.provenance,
        "identity": identity(loaded.recipe),
        "inputs": dict(inputs or {}),
    }
    (folder / "recipe.json").write_text(json.dumps(seal(json.loads(canonical_json(kept)))))
    lines = []
    for number, loss in enumerate(losses):
        step = (number + 1) * log_every
        tokens = step * TOKENS
        line = {
            "step": step,
            "train/loss": loss,
            "train/tokens": tokens,
            "train/supervised_tokens": tokens - step,
            "train/tokens_per_second": 1000.0,
            "train/step_seconds": 0.25,
            "train/learning_rate": 1e-3,
            "train/grad_norm": 1.0,
            "system/memory": 1e9,
            "data/prose/tokens": tokens * 3 // 4,
            "data/notes/tokens": tokens // 4,
        }
        lines.append(line | {key: values[number] for key, values in (more or {}).items()})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "samples.jsonl").write_text("")
    if launches is None:
        launches = [{"exit_code": 0, "ended": BEGAN + 60}]
    *earlier, last = [{"name": folder.name, "began": BEGAN + 100 * n, **each} for n, each in enumerate(launches)]
    (folder / "launch.json").write_text(json.dumps(last | {"earlier": earlier}))
    return folder


def validated(run: Path, losses: Mapping[int, float]) -> None:
    """Lines of validation, by step, at the end of the metrics: of two sources, the second a tenth higher."""
    with (run / "metrics.jsonl").open("a") as file:
        for step, loss in losses.items():
            line = {"step": step, "train/tokens": step * TOKENS, "val/loss": loss, "val/bpb": loss / 2}
            line |= {"val/prose/loss": loss, "val/prose/bpb": loss / 2}
            line |= {"val/notes/loss": loss * 1.1, "val/notes/bpb": loss / 2 * 1.1}
            file.write(json.dumps(line) + "\n")


def sampled(run: Path, samples: Sequence[tuple[int, str, str]]) -> None:
    """Samples: step, prompt, text."""
    lines = [json.dumps({"step": step, "prompt": prompt, "text": text}) + "\n" for step, prompt, text in samples]
    (run / "samples.jsonl").write_text("".join(lines), encoding="utf-8")


def checkpointed(run: Path, step: int, weight: float, *, final: bool = True) -> Path:
    """A checkpoint as its manifest states it: one matrix of 6 numbers."""
    folder = run / "checkpoints" / f"step-{step:06d}"
    folder.mkdir(parents=True)
    save_file({"matrix": np.full((2, 3), weight, dtype=np.float32)}, folder / "model.safetensors")
    (folder / "recipe.json").write_bytes((run / "recipe.json").read_bytes())
    files = {f.name: {"bytes": f.stat().st_size, "sha256": sha256_of(f)} for f in sorted(folder.iterdir())}
    manifest = {
        "format": "cheaptrain checkpoint", "format_version": 2, "step": step, "tokens_seen": step * TOKENS,
        "files": files, "lineage": {},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(seal(manifest)))
    if final:
        (run / "final").symlink_to(Path("checkpoints") / folder.name)
    return folder


def scored(
    run: Path,
    step: int,
    tasks: Mapping[str, tuple[float, float | None, int]],
    *,
    settings: Mapping[str, Any] | None = None,
    add: bool = False,
    **more: Any,
) -> None:
    """An evaluation of the checkpoint of `step`, by its hash if it is there: value, standard error and n of each task;
    `more` are fields of all results. In the place of what was scored of it before, or with `add` beside it."""
    folder = run / "eval" / f"step-{step:06d}"
    results = [
        TaskResult(
            task=task, key="k", n=n, metrics=(Metric("acc", value, error),), settings={"shots": 0, **(settings or {})},
            seconds=1.0, harness="lm-eval 0.4.13", when=f"2026-11-20T00:00:{number:02d}+00:00",
            **({"version": "1"} | more),
        )
        for number, (task, (value, error, n)) in enumerate(tasks.items())
    ]  # fmt: skip
    weights = run / "checkpoints" / folder.name
    checkpoint = Scored(str(weights), stated_fingerprint(weights) or f"{step:064d}", step, step * TOKENS)
    before = read_evaluation(folder).results if add else ()
    write_evaluation(Evaluation(folder, checkpoint, (*before, *results)))
    if more.get("shown"):
        write_items(folder / more["items"], [Item(0, "d", {}, answer="blue", extra={"prompt": "The sky is"})])
