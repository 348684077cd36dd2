"""What the training loop costs over the barest PyTorch loop of the same model.

    python benchmarks/loop_overhead.py [--steps 40] [--rounds 3]

Ours: the real thing, a whole run of a recipe over prepared text: loader, packing and document mask, ledger, metrics,
display. The time of a step is from the start of one to the start of the next, so everything between counts.
Barest: forward, cross-entropy over full logits, backward, clipping, fused AdamW, over tokens already in memory, with
transformers' own SDPA attention; once with the same document mask, once plainly causal (documents see each other).
Rounds alternate in one process, the medians are compared. Prints a table and writes
benchmarks/results/loop_overhead.json.
"""

import argparse
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from results import report
from runs import prepared
from torch.nn import functional

from cheaptrain.model.build import build_model
from cheaptrain.model.twin import plain_twin
from cheaptrain.train import loop
from cheaptrain.train.chain import run_chain

SEQ_LEN, ROWS = 256, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    seconds: dict[str, list[float]] = {"cheaptrain": [], "barest, same document mask": [], "barest, causal only": []}
    with tempfile.TemporaryDirectory() as folder:
        path = prepared(
            Path(folder), vocab=2048, seq_len=SEQ_LEN, steps=arguments.steps, batch=SEQ_LEN * ROWS, rows=ROWS
        )
        for number in range(arguments.rounds):
            ours, batches = our_steps(str(path), f"run.dir={folder}/run-{number}")
            seconds["cheaptrain"] += ours
            seconds["barest, same document mask"] += barest_steps(batches, masked=True)
            seconds["barest, causal only"] += barest_steps(batches, masked=False)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = medians["cheaptrain"]
    tokens = SEQ_LEN * ROWS
    report(
        "loop_overhead",
        title=f"The loop: preset quickstart, {ROWS} rows of {SEQ_LEN} tokens a step, fp32, median step",
        header=["loop", "ms a step", "tokens/s", "cheaptrain takes"],
        rows=[
            [name, f"{value * 1000:.1f}", f"{tokens / value:,.0f}", "" if value == ours else f"{ours / value - 1:+.1%}"]
            for name, value in medians.items()
        ],
        data={"seconds_a_step": medians, "tokens_a_step": tokens},
    )


def our_steps(path: str, override: str) -> tuple[list[float], list[Any]]:
    """Seconds from step to step of a real run, and the batches it read."""
    starts: list[float] = []
    seen: list[Any] = []
    plain = loop.train_step

    def watched(model: Any, optimizers: Any, batches: Any, **rest: Any) -> Any:
        starts.append(time.perf_counter())
        seen.extend(batches)
        return plain(model, optimizers, batches, **rest)

    loop.train_step = watched
    try:
        run_chain([path], [override])
    finally:
        loop.train_step = plain
    # The first steps warm up; validation and saving happen around some others and are not the loop's cost.
    gaps = [later - earlier for earlier, later in pairwise(starts)]
    every = max(1, len(starts) // 10)
    return [gap for number, gap in enumerate(gaps, start=1) if number > 3 and number % every], seen


def barest_steps(batches: list[Any], *, masked: bool) -> list[float]:
    """Seconds of each step of the barest loop over the same rows."""
    from cheaptrain.recipe.schema import Model

    model = plain_twin(
        build_model(Model(preset="quickstart"), vocab_size=2048, seq_len=SEQ_LEN, seed=1, eot_id=0)
    ).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    causal = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).tril()
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        mask = None
        if masked:
            ids = batch.document_ids
            mask = ((ids[:, :, None] == ids[:, None, :]) & causal)[:, None]  # [rows, 1, seq, seq]
        positions = batch.position_ids if masked else None
        logits = model(batch.input_ids, position_ids=positions, attention_mask=mask).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds[3:]


if __name__ == "__main__":
    main()
