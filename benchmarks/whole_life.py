"""What each stage of recipes/local/ gives: held-out loss before and after, and lm-eval before and after.

    cheaptrain chain --prepare recipes/local/*.toml
    python benchmarks/whole_life.py --tasks-in ../shared/data/bench/lm_eval_tasks

Scores the last checkpoint of every stage (what stands is not scored again); what a stage began with is what its
parent ended with. Two hours on two cores that are shared.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import report

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.units import duration, human

STAGES = {
    "teacher": None,
    "phase1": None,
    "phase2": "phase1",
    "midtrain": "phase2",
    "sft_general": "midtrain",
    "sft_reasoning": "sft_general",
}
TASKS = ("arc_easy_local", "piqa_local", "hellaswag_local", "social_iqa_local")
QUESTIONS = 1000


def main() -> None:
    """Score the stages and report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path, default=Path("outputs/local"))
    parser.add_argument("--tasks-in", type=Path, required=True)
    arguments = parser.parse_args()
    runs = {name: RunDirectory(arguments.runs / name) for name in STAGES}
    scores = _scores(list(runs.values()), arguments.tasks_in)
    rows, data = [], []
    for name, parent in STAGES.items():
        records = read_records(runs[name].metrics)
        losses = [record["val/loss"] for record in records if "val/loss" in record]
        last = [record for record in records if "train/loss" in record][-1]
        seconds = sum(record.get("train/step_seconds") or 0.0 for record in records)
        rows.append(
            [
                f"{name} ← {parent}" if parent else name,
                human(last["train/tokens"]),
                duration(seconds),
                f"{losses[0]:.3f} → {losses[-1]:.3f}",
                *(_change(scores[parent][task] if parent else None, scores[name][task]) for task in TASKS),
            ]
        )
        data.append({"stage": name, "from": parent, "validation": losses, "seconds": seconds, "scores": scores[name]})
    report(
        "whole_life",
        title=f"recipes/local: a whole life on real text; accuracy in per cent, n = {QUESTIONS} a task",
        header=["stage", "tokens", "time", "validation loss", *(task.removesuffix("_local") for task in TASKS)],
        rows=rows,
        data={"stages": data},
    )


def _scores(runs: list[RunDirectory], tasks_in: Path) -> dict[str, dict[str, Any]]:
    """By stage and task: the first metric with its error, and what was scored."""
    command = [
        sys.executable,
        "-c",
        "from cheaptrain.cli import main; main()",
        "eval",
        *(str(run.path) for run in runs),
    ]
    command += ["--tasks", ",".join(TASKS), "--task-folder", str(tasks_in), "--limit", str(QUESTIONS), "--json"]
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return {
        run.path.name: {result["task"]: {**result["metrics"][0], "n": result["n"]} for result in entry["results"]}
        | {"checkpoint": {"hash": entry["checkpoint"]["hash"], "step": entry["checkpoint"]["step"]}}
        for run, entry in zip(runs, json.loads(told.stdout), strict=True)
    }


def _change(before: dict[str, Any] | None, after: dict[str, Any]) -> str:
    """The score a stage began with, and the one it ended with and its error."""
    known = f"{100 * before['value']:.1f} → " if before else ""
    return f"{known}{100 * after['value']:.1f} ± {100 * after['stderr']:.1f}"


if __name__ == "__main__":
    main()
