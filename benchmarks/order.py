"""How fast rows are found and built, on one core: `python benchmarks/order.py`.

The order is computed afresh for every step, so it must cost nothing beside a training step. Next to it stands what
people write otherwise: `rng.choice` for the source and a shuffled index of every source in memory, which cannot seek
and holds 8 bytes a row. Row building is measured on generated documents, in tokens a second. Times are CPU seconds of
this process, the best of several runs.
"""

import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from results import report

from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import StreamRows, build_rows
from cheaptrain.data.stream import Shard, TokenStream

REPEATS = 7


def main() -> None:
    order = [_order(sources, block) for sources in (1, 7, 14) for block in (256, 4096, 65536)]
    shapes = ((128, 30), (1024, 700), (4096, 700))
    rows = [_rows(seq_len, mean, selected) for seq_len, mean in shapes for selected in (False, True)]
    report(
        "order",
        title="Finding rows: rows/s on one core, beside the shuffled index in memory",
        header=["sources", "rows a call", "cheaptrain", "in memory"],
        rows=[[f"{row[key]:,}" for key in row if key != "microseconds_per_call"] for row in order],
        data={"order": order},
    )
    report(
        "rows",
        title="Building rows: tokens/s on one core, files in the page cache",
        header=["seq_len", "mean document", "selected documents", "tokens/s"],
        rows=[[str(v) if isinstance(v, bool) else f"{v:,}" for v in row.values()] for row in rows],
        data={"rows": rows},
    )


def _order(sources: int, block: int) -> dict[str, int | float]:
    """Rows a second of `MixtureOrder.locate` in calls of `block` positions, and of the way in memory."""
    weights = {f"source-{k}": 1 / (k + 1) for k in range(sources)}
    rows = {name: 100_003 * (k + 1) for k, name in enumerate(weights)}
    order = MixtureOrder(1337, weights, rows)
    calls = max(1, 65536 // block)
    positions = [np.arange(k * block, (k + 1) * block) for k in range(calls)]
    seconds = _best(lambda: [order.locate(some) for some in positions]) / calls

    rng = np.random.default_rng(1337)
    shares = np.array(list(weights.values())) / math.fsum(weights.values())
    shuffled = [rng.permutation(count) for count in rows.values()]
    drawn = np.zeros(sources, np.int64)

    def in_memory() -> None:
        drawn[:] = 0
        for _ in range(calls):
            chosen = rng.choice(sources, block, p=shares)
            out = np.empty(block, np.int64)
            for source in range(sources):
                of_source = chosen == source
                count = int(of_source.sum())
                out[of_source] = shuffled[source][(drawn[source] + np.arange(count)) % len(shuffled[source])]
                drawn[source] += count

    return {
        "sources": sources,
        "rows_per_call": block,
        "microseconds_per_call": round(seconds * 1e6, 1),
        "rows_per_second": round(block / seconds),
        "in_memory_rows_per_second": round(block * calls / _best(in_memory)),
    }


def _rows(seq_len: int, mean_document: int, selected: bool) -> dict[str, int | float]:
    """Tokens a second of `build_rows`, 16 rows at a time, rows in random order, files in the page cache."""
    rng = np.random.default_rng(1337)
    lengths = rng.geometric(1 / mean_document, 8_000_000 // mean_document)
    ends = np.cumsum(lengths, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "train.bin"
        rng.integers(0, 50_000, int(ends[-1]), dtype=np.uint16).tofile(path)
        shard = Shard(path, "<u2", ends)
        if selected:
            shard = shard.select(np.flatnonzero(rng.random(len(ends)) < 0.99))
        stream = TokenStream([shard])
        batches = rng.permutation((stream.tokens - 1) // seq_len)[: 16 * max(1, 2_000_000 // (16 * seq_len))].reshape(
            -1, 16
        )
        sources = np.zeros(16, np.int64)
        source = StreamRows.whole(stream, seq_len, document_mask=True)
        seconds = _best(lambda: [build_rows([source], sources, rows) for rows in batches])
    return {
        "seq_len": seq_len,
        "mean_document_tokens": mean_document,
        "selected_documents": selected,
        "tokens_per_second": round(batches.size * seq_len / seconds),
    }


def _best(work: Callable[[], object]) -> float:
    """CPU seconds of the fastest of REPEATS runs, after one that does not count."""
    work()
    taken = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


if __name__ == "__main__":
    main()
