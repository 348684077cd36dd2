"""What a second process brings, and what eight GPUs are predicted to.

    python benchmarks/scaling.py

Measured: whole runs of one recipe (same global batch) on CPU processes of one thread each, alternating: one process,
FSDP on two, HSDP's two copies, tensor and context parallelism on two. The processes share two cores, their memory
bandwidth and caches with each other, and talk over gloo: it is the overhead of the machinery that this shows, not what
NVLink would do. Predicted: `cheaptrain plan` for recipes of this repository on 8 GPUs, from assumed shares of the peak
and bandwidths (docs/plan.md); no GPU has run them. Writes benchmarks/results/scaling.json and predicted.json.
"""

import statistics
import tempfile
from pathlib import Path

from results import report
from runs import launched, prepared, wider

from cheaptrain.recipe.load import load_recipe
from cheaptrain.report.device import device_to_plan_for
from cheaptrain.report.reckon import plan_report
from cheaptrain.train.outlook import survey_leniently

LAYOUTS = {
    "1 process": (1, ()),
    "FSDP, dp_shard = 2": (2, ("parallel.dp_shard=2",)),
    "HSDP, dp_replicate = 2": (2, ("parallel.dp_replicate=2",)),
    "tensor parallel, tp = 2": (2, ("parallel.tp=2",)),
    "context parallel, cp = 2": (2, ("parallel.cp=2",)),
}
ROWS, SEQ_LEN, STEPS, ROUNDS = 8, 256, 12, 2
PREDICTED = {
    "recipes/phase1.toml": (),
    "recipes/360m/phase1.toml": (),
    "recipes/950m/phase1.toml": ("train.micro_batch_size=8",),  # 16 rows, as published, take 88 GiB
}


def main() -> None:
    speeds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    with tempfile.TemporaryDirectory() as folder:
        recipe = prepared(Path(folder), vocab=8192, seq_len=SEQ_LEN, steps=STEPS, batch=SEQ_LEN * ROWS, rows=4)
        for number in range(ROUNDS):
            for index, (name, (processes, keys)) in enumerate(LAYOUTS.items()):
                keys = (
                    *keys,
                    *wider(384, 1536, 6),
                    "train.cpu_threads=1",
                    "checkpoint.every=100%",
                    "validation.every=100%",
                )
                records = launched(recipe, f"run-{number}-{index}", processes, *keys)
                steps = [r["train/tokens_per_second"] for r in records if "train/tokens_per_second" in r]
                speeds[name] += steps[3:]  # the first ones warm up
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    alone = medians["1 process"]
    report(
        "scaling",
        title=f"One recipe, {ROWS} rows of {SEQ_LEN} tokens a step, CPU processes of one thread, fp32, median step",
        header=["layout", "tokens/s", "of one process"],
        rows=[[name, f"{speed:,.0f}", f"{speed / alone:.2f}×"] for name, speed in medians.items()],
        data={"tokens_per_second": speeds},
    )
    predict()


def predict() -> None:
    """The plan's step on eight GPUs."""
    rows, data = [], {}
    for path, keys in PREDICTED.items():
        loaded = load_recipe(path, ["plan.gpus=8", "plan.gpu=H100", *keys])
        found = plan_report(survey_leniently(loaded, 8), device_to_plan_for(loaded.recipe.plan, gpus=True))
        step, batch = found.step, found.outlook.batch
        assert step is not None and found.memory is not None
        data[path] = {"compute_seconds": step.compute, "waiting_seconds": step.waiting, "peak_bytes": found.memory.peak}
        rows.append(
            [
                " ".join((path, *keys)),
                str(batch.layout),
                f"{batch.micro_batch_size} × {batch.accumulation}",
                f"{step.compute + step.waiting:.3f}",
                f"{step.waiting:.3f}",
                f"{batch.tokens_per_step / (step.compute + step.waiting):,.0f}",
                f"{found.memory.peak / 2**30:.1f}",
            ]
        )
    report(
        "predicted",
        title="Predicted, not measured: one step on 8 H100 (assumptions: docs/plan.md)",
        header=["recipe", "layout", "rows × accumulation", "s a step", "of it waiting", "tokens/s", "peak GiB a GPU"],
        rows=rows,
        data=data,
    )


if __name__ == "__main__":
    main()
