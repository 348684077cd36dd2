"""What a checkpoint costs a run: how long training waits, and how fast it is written.

    python benchmarks/checkpoint.py

Whole runs of one recipe, saving every 3 of 9 steps, with `checkpoint.asynchronous` on and off, on one and on two
processes, alternating. Every save is hashed, synced to the disk and proven (see docs/checkpoints.md), in the background
or not. The stall is `checkpoint/stall_seconds` of metrics.jsonl: the time the loop stood still for a save, waiting for
an earlier one included. The last save of a run is always waited for, so it is left out. Writes
benchmarks/results/checkpoint.json.
"""

import statistics
import tempfile
from pathlib import Path

from results import report
from runs import launched, prepared, wider

STEPS, EVERY, ROUNDS = 9, 3, 1


def main() -> None:
    stalls: dict[tuple[int, bool], list[float]] = {}
    seconds: dict[tuple[int, bool], list[float]] = {}
    nbytes = 0
    with tempfile.TemporaryDirectory() as name:
        recipe = prepared(Path(name), vocab=8192, seq_len=128, steps=STEPS, batch=128 * 8, rows=4)
        for number in range(ROUNDS):
            for processes in (1, 2):
                for background in (True, False):
                    records = launched(
                        recipe,
                        f"run-{number}-{processes}-{background}",
                        processes,
                        *wider(512, 2048, 8),
                        "train.cpu_threads=1",
                        f"checkpoint.every={EVERY} steps",
                        "checkpoint.keep_last=1",
                        f"checkpoint.asynchronous={str(background).lower()}",
                    )
                    saves = [r for r in records if "checkpoint/bytes" in r and r["checkpoint/step"] < STEPS]
                    stalls.setdefault((processes, background), []).extend(r["checkpoint/stall_seconds"] for r in saves)
                    seconds.setdefault((processes, background), []).extend(r["checkpoint/seconds"] for r in saves)
                    nbytes = saves[-1]["checkpoint/bytes"]
    rows = []
    for processes, background in stalls:
        stall, whole = (statistics.median(values[processes, background]) for values in (stalls, seconds))
        how = "in the background" if background else "training waits"
        rows.append([str(processes), how, f"{stall:.2f}", f"{whole:.2f}", f"{nbytes / whole / 1e6:,.0f}"])
    report(
        "checkpoint",
        title=f"Saving {nbytes / 1e6:,.0f} MB (weights and AdamW), median of {ROUNDS * (STEPS // EVERY - 1)} saves",
        header=["processes", "written", "stall, s", "whole save, s", "MB/s, hashed and proven"],
        rows=rows,
        data={
            "bytes": nbytes,
            "saves": [
                {"processes": p, "background": b, "stall_seconds": stalls[p, b], "seconds": seconds[p, b]}
                for p, b in stalls
            ],
        },
    )


if __name__ == "__main__":
    main()
