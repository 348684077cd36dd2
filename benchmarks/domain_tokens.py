"""The domain-token experiment in small: two conditions, three seeds each, three stages, the probes after every stage.

    python benchmarks/domain_tokens.py

trains what is not trained yet of recipes/domain-tokens/small (its text lies in ../shared/data), scores every run with
`cheaptrain eval`, and holds the conditions against each other with `cheaptrain compare`, once for each stage. What is
there already is neither trained nor scored again. About 25 minutes of one core.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

from results import report

from cheaptrain.compare.comparison import compare, to_json

RECIPES = Path("recipes/domain-tokens/small")
OUTPUTS = Path("outputs/domain-tokens/small")
CONDITIONS = ("baseline", "mul")
STAGES = {"pretrain": "arithmetic_probes", "sft": "arithmetic_probes_chat", "gsm8k": "arithmetic_probes_chat"}
PARTS = {"arithmetic_table": "table", "arithmetic_products": "longer products", "arithmetic_sums": "sums"}
HELD_OUT = {f"held-out text, {source}": source for source in ("edu", "wiki", "math", "table")}
SEEDS = (1, 2, 3)


def main() -> None:
    """Train, score, compare, report."""
    recipes = [str(RECIPES / condition / f"{stage}.toml") for condition in CONDITIONS for stage in STAGES]
    _run(
        "chain", *recipes, "--seeds", ",".join(map(str, SEEDS)), "--prepare", "--processes", "1", "train.cpu_threads=1"
    )
    for stage, tasks in STAGES.items():
        runs = [str(OUTPUTS / condition / f"{stage}-seed{seed}") for condition in CONDITIONS for seed in SEEDS]
        _run("eval", *runs, "--tasks", tasks, "--batch-size", "32", "--device", "cpu")
    rows, data = [], {}
    for stage in STAGES:
        found = to_json(compare([str(OUTPUTS / condition / stage) for condition in CONDITIONS]))
        rows += [row for task in found["pairs"][0]["tasks"] if (row := _row(stage, task))]
        if stage == "pretrain":
            rows += [_held_out(stage, loss) for loss in found["pairs"][0]["held_out"] if loss["task"] in HELD_OUT]
        sides = {side["name"]: {run["seed"]: run["scored"]["hash"] for run in side["runs"]} for side in found["sides"]}
        data[stage] = {"checkpoints": sides, **{key: found["pairs"][0][key] for key in ("tasks", "held_out")}}
    report(
        "domain_tokens",
        title=f"Two conditions, {len(SEEDS)} paired seeds each, a million parameters: answers with the right number",
        header=["after", "questions", "n", "baseline", "mul", "mul − baseline [95%]", "verdict"],
        rows=rows,
        data=data,
    )


def _run(*arguments: str) -> None:
    command = [sys.executable, "-c", "from cheaptrain.cli import main; main()", *arguments]
    if code := subprocess.run(command).returncode:
        sys.exit(f"cheaptrain {' '.join(arguments)} ended with {code}")


def _row(stage: str, task: dict[str, Any]) -> list[str] | None:
    part = PARTS.get(task["task"].removesuffix("_chat"))
    if part is None or task["estimate"] is None:
        return None
    first, second = (f"{100 * task[side]:.1f}%" for side in ("first", "second"))
    estimate = task["estimate"]
    difference, low, high = (100 * estimate[key] for key in ("difference", "low", "high"))
    verdict = f"{task['outcome']}, p = {task['p_corrected']:.2g}"
    return [stage, part, str(task["n"]), first, second, f"{difference:+.1f} [{low:+.1f}, {high:+.1f}]", verdict]


def _held_out(stage: str, loss: dict[str, Any]) -> list[str]:
    estimate = loss["estimate"]
    difference = f"{estimate['difference']:+.4f} [{estimate['low']:+.4f}, {estimate['high']:+.4f}]" if estimate else "–"
    first, second = (f"{loss[side]:.4f}" for side in ("first", "second"))
    return [stage, f"bits a byte, {HELD_OUT[loss['task']]}", "–", first, second, difference, loss["outcome"]]


if __name__ == "__main__":
    main()
