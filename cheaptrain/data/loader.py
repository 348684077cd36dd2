"""From a global position to this process's batches.

The loader remembers nothing: a step is asked for by the global number of its first row, and that number is all the
state of the data in a checkpoint. Processes that share their rows (tensor and context parallelism) are one data rank.
Micro-step m of data rank r takes the rows first_row + (m * data_parallel + r) * micro_batch_size + j, so the data ranks
together always take exactly the rows [first_row, first_row + rows_per_step), whatever their number. The trap: a reader
thread that fails quietly leaves the training waiting for ever; here each step is a future, and a failure is raised,
with its own traceback, where the step is awaited.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from cheaptrain.data.align import Aligner
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import RowBatch, RowSource, build_rows
from cheaptrain.errors import RecipeError


@dataclass(frozen=True)
class Loader:
    """The rows of one data rank. `sources` stand in the order of `order.names`; batch sizes are in rows. `by_example`:
    each document weighs the same in the loss; `aligner`: for a teacher whose tokens are others."""

    order: MixtureOrder
    sources: Sequence[RowSource]
    rows_per_step: int
    micro_batch_size: int
    data_rank: int
    data_parallel: int
    by_example: bool = False
    aligner: Aligner | None = None

    def __post_init__(self) -> None:
        _check_division(self.rows_per_step, self.micro_batch_size, self.data_parallel)
        if not 0 <= self.data_rank < self.data_parallel:
            raise ValueError(f"data rank {self.data_rank} of {self.data_parallel}")
        for name, rows, source in zip(self.order.names, self.order.rows, self.sources, strict=True):
            if rows > source.rows:
                raise ValueError(f"source {name!r}: {rows} rows asked of {source.rows}")

    def step(self, first_row: int) -> list[RowBatch]:
        """This data rank's micro-batches of the step whose first row is the global row `first_row`."""
        micro, ranks = self.micro_batch_size, self.data_parallel
        accumulation = self.rows_per_step // (micro * ranks)
        chunks = np.arange(accumulation)[:, None] * ranks + self.data_rank  # [accumulation, 1]
        positions = first_row + chunks * micro + np.arange(micro)  # [accumulation, micro]
        sources, rows, _ = self.order.locate(positions.reshape(-1))
        numbers = positions.reshape(-1)
        batches = [
            replace(
                build_rows(self.sources, sources[m : m + micro], rows[m : m + micro], self.by_example),
                numbers=numbers[m : m + micro],
            )
            for m in range(0, len(rows), micro)
        ]
        return [_with_spans(batch, self.aligner) for batch in batches] if self.aligner else batches

    def prefetch(
        self,
        first_row: int,
        steps: int,
        ready: Callable[[list[RowBatch]], list[RowBatch]] = list,
        *,
        ahead: int = 2,
    ) -> Generator[list[RowBatch], None, None]:
        """`steps` steps from `first_row` on, read and made `ready` in a background thread up to `ahead` steps before
        they are asked for.

        What fails in the thread is raised here. Leaving early (closing or dropping the iterator) ends the thread.
        """

        def read(step: int) -> list[RowBatch]:
            return ready(self.step(first_row + step * self.rows_per_step))

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as reader:
            waiting: deque[Future[list[RowBatch]]] = deque()
            try:
                for step in range(steps + ahead):
                    if step < steps:
                        waiting.append(reader.submit(read, step))
                    if step >= ahead:
                        yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def validation_batches(
    source: RowSource, micro_batch_size: int, data_rank: int = 0, data_parallel: int = 1
) -> Iterator[RowBatch]:
    """All rows of held-out documents as batches of `micro_batch_size`, in order: every `data_parallel`th batch, from
    number `data_rank` on.

    Each data rank gets the same number of batches, because sharded models run forward together: what is missing is
    padding with labels of -100. A source without rows yields nothing, on every rank. `sources` is 0 throughout.
    """
    rounds = -(-source.rows // (micro_batch_size * data_parallel))
    for number in range(data_rank, rounds * data_parallel, data_parallel):
        rows = np.arange(number * micro_batch_size, (number + 1) * micro_batch_size)
        yield build_rows([source], np.zeros(micro_batch_size, np.int64), rows)


def _with_spans(batch: RowBatch, aligner: Aligner) -> RowBatch:
    texts = (batch.input_ids.numpy(), batch.labels.numpy(), batch.document_ids.numpy())
    return replace(batch, aligned=aligner.align(*texts))


def _check_division(rows_per_step: int, micro_batch_size: int, data_parallel: int) -> None:
    """Refuse a step that data ranks and micro-batches cannot share evenly, naming what would do."""
    if rows_per_step % (micro_batch_size * data_parallel) == 0:
        return
    remedies = []
    if rows_per_step % data_parallel == 0:
        remedies.append(f"train.micro_batch_size {_largest_divisor(rows_per_step // data_parallel, micro_batch_size)}")
    if rows_per_step % micro_batch_size == 0:
        ranks = _largest_divisor(rows_per_step // micro_batch_size, data_parallel)
        remedies.append(f"{ranks} data-parallel group{'s' * (ranks > 1)}")
    remedies.append(f"a train.global_batch_tokens of a multiple of {micro_batch_size * data_parallel} rows")
    raise RecipeError(
        f"{rows_per_step} rows a step do not divide over {data_parallel} data-parallel groups x micro_batch_size "
        f"{micro_batch_size}: use {', or '.join(remedies)}"
    )


def _largest_divisor(number: int, at_most: int) -> int:
    return next(candidate for candidate in range(at_most, 0, -1) if number % candidate == 0)
