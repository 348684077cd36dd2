"""A real model scored by `cheaptrain eval` and by plain `lm_eval`: the same numbers, or something is wrong with ours.

    python -m cheaptrain.model.gguf SmolLM2-135M-Instruct.Q4_1.gguf.zst MODEL --tokenizer FOLDER
    python benchmarks/real_model_scores.py --model MODEL --data shared/data --folder OUTPUTS

DATA holds `bench/lm_eval_tasks`, their data, and `bench/core`. The first rows of each task are asked, of CORE's tasks
in their shuffled order. What is finished in OUTPUTS is not scored again. An hour on two cores.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from results import report

from cheaptrain.evaluate.results import TaskResult, read_evaluation
from cheaptrain.evaluate.task_folders import task_folders

LOCAL = ("arc_easy_local", "hellaswag_local", "piqa_local")
LOCAL_ROWS, CORE_ROWS = 200, 10
BATCH_SIZE = 8


def main() -> None:
    """Score both ways and report."""
    parser = argparse.ArgumentParser()
    for name in ("model", "data", "folder"):
        parser.add_argument(f"--{name}", type=lambda text: Path(text).absolute(), required=True)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    model, bench, folder, dtype = arguments.model, arguments.data / "bench", arguments.folder, arguments.dtype
    for needed in (model / "config.json", bench / "core/core.yaml", bench / "lm_eval_tasks"):
        if not needed.exists():
            sys.exit(f"{needed} is not there: nothing to measure")

    asked = [(name, LOCAL_ROWS) for name in LOCAL] + [("core", CORE_ROWS)]
    for name, rows in asked:
        _ours(model, bench, folder / "ours", name, rows, dtype)
    ours = read_evaluation(folder / "ours").newest()
    theirs: dict[str, Any] = {}
    for name, rows in asked:
        theirs |= _theirs(model, bench, folder / "lm_eval" / f"{name}-{rows}-{dtype}", name, rows, dtype)

    rows, data = [], []
    for name in [*LOCAL, *ours["core"].members, "core"]:
        result = ours[name]
        for metric in _shown(result):
            there = theirs[name]
            value, error = there[f"{metric},none"], there[f"{metric}_stderr,none"]
            mine = next(each for each in result.metrics if each.name == metric)
            same = mine.value == value
            rows.append(
                [
                    name,
                    metric,
                    f"{result.n:,}",
                    _number(mine.value, mine.stderr),
                    _number(value, error),
                    "yes" if same else "no",
                ]
            )
            data.append({"task": name, "metric": metric, "n": result.n, "cheaptrain": mine.value, "lm_eval": value})
    report(
        "real_model_scores",
        title=f"SmolLM2-135M-Instruct, {dtype}, batches of {BATCH_SIZE}, value ± standard error, with no chat template",
        header=["task", "metric", "n", "cheaptrain eval", "lm_eval", "equal"],
        rows=rows,
        data={"model": "SmolLM2-135M-Instruct", "dtype": dtype, "scores": data},
    )


def _ours(model: Path, bench: Path, output: Path, name: str, rows: int, dtype: str) -> None:
    """Results are kept in `output`, and what stands there is not scored again."""
    command = [
        sys.executable, "-c", "from cheaptrain.cli import main; main()", "eval", str(model), "--tasks", name,
        "--task-folder", str(bench / "lm_eval_tasks"), "--metadata", f"core={bench / 'core'}", "--limit", str(rows),
        "--dtype", dtype, "--batch-size", str(BATCH_SIZE), "--device", "cpu", "--output", str(output),
    ]  # fmt: skip
    subprocess.run(command, check=True)


def _theirs(model: Path, bench: Path, output: Path, name: str, rows: int, dtype: str) -> dict[str, Any]:
    """lm-eval's `results` of a task or group and its members, from the command line of lm-eval."""
    if not list(output.glob("**/results_*.json")):
        folders = bench / "lm_eval_tasks" if name in LOCAL else task_folders()[0]
        command = [
            sys.executable, "-m", "lm_eval", "run", "--model", "hf",
            "--model_args", f"pretrained={model},dtype={dtype}", "--tasks", name, "--include_path", str(folders),
            "--metadata", json.dumps({"core": str(bench / "core")}),
            "--limit", str(rows), "--batch_size", str(BATCH_SIZE), "--device", "cpu", "--output_path", str(output),
        ]  # fmt: skip
        # The task files name their data relative to the folder that one stands in.
        paths = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
        subprocess.run(command, check=True, cwd=bench, env={**os.environ, "PYTHONPATH": paths})
    (file,) = output.glob("**/results_*.json")
    return json.loads(file.read_text(encoding="utf-8"))["results"]


def _shown(result: TaskResult) -> list[str]:
    names = [metric.name for metric in result.metrics]
    return [name for name in ("acc", "acc_norm") if name in names] or names[:1]


def _number(value: float, error: Any) -> str:
    return f"{value:.4f} ± {error:.4f}" if isinstance(error, float) else f"{value:.4f}"


if __name__ == "__main__":
    main()
