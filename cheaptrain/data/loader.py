"""From a global position to this process's batches.

The loader remembers nothing: a step is asked for by the global number of its first row, and that number is all the
state of the data in a checkpoint. Processes that share their rows (tensor and context parallelism) are one data rank.
Micro-step m of data rank r takes the rows first_row + (m * data_parallel + r) * micro_batch_size + j, so the data ranks
together always take exactly the rows [first_row, first_row + rows_per_step), whatever their number. The trap: a reader
thread that fails quietly leaves the training waiting for ever; here each step is a future, and a failure is raised,
with its own traceback, where the step is awaited.
"""

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.rows import RowBatch, build_rows, build_validation_rows
from cheaptrain.data.stream import TokenStream
from cheaptrain.errors import RecipeError


@dataclass(frozen=True)
class Loader:
    """The rows of one data rank. `streams` stand in the order of `order.names`; batch sizes are in rows."""

    order: MixtureOrder
    streams: Sequence[TokenStream]
    seq_len: int
    rows_per_step: int
    micro_batch_size: int
    data_rank: int
    data_parallel: int
    document_mask: bool

    def __post_init__(self) -> None:
        _check_division(self.rows_per_step, self.micro_batch_size, self.data_parallel)
        if not 0 <= self.data_rank < self.data_parallel:
            raise ValueError(f"data rank {self.data_rank} of {self.data_parallel}")
        for name, rows, stream in zip(self.order.names, self.order.rows, self.streams, strict=True):
            if rows * self.seq_len >= max(stream.tokens, 1):
                raise ValueError(f"source {name!r}: {rows} rows of {self.seq_len} + 1 tokens asked of {stream.tokens}")

    def step(self, first_row: int) -> list[RowBatch]:
        """This data rank's micro-batches of the step whose first row is the global row `first_row`."""
        micro, ranks = self.micro_batch_size, self.data_parallel
        accumulation = self.rows_per_step // (micro * ranks)
        chunks = np.arange(accumulation)[:, None] * ranks + self.data_rank  # [accumulation, 1]
        positions = first_row + chunks * micro + np.arange(micro)  # [accumulation, micro]
        sources, rows, _ = self.order.locate(positions.reshape(-1))
        return [
            build_rows(self.streams, sources[m : m + micro], rows[m : m + micro], self.seq_len, self.document_mask)
            for m in range(0, len(rows), micro)
        ]

    def prefetch(self, first_row: int, steps: int, ahead: int = 2) -> Generator[list[RowBatch], None, None]:
        """`steps` steps from `first_row` on, read in a background thread up to `ahead` steps before they are asked for.

        What fails in the thread is raised here. Leaving early (closing or dropping the iterator) ends the thread.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="rows") as reader:
            waiting: deque[Future[list[RowBatch]]] = deque()
            try:
                for step in range(steps + ahead):
                    if step < steps:
                        waiting.append(reader.submit(self.step, first_row + step * self.rows_per_step))
                    if step >= ahead:
                        yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()


def validation_batches(
    stream: TokenStream,
    seq_len: int,
    micro_batch_size: int,
    max_tokens: int,
    document_mask: bool,
    data_rank: int = 0,
    data_parallel: int = 1,
) -> Iterator[RowBatch]:
    """The first `max_tokens` input positions of a stream as batches [micro_batch_size, seq_len], in order: every
    `data_parallel`th of them, from number `data_rank` on.

    Each data rank gets the same number of batches, because sharded models run forward together; where the batches do
    not divide, the last is padding alone. Every token of a short stream counts: what a batch lacks is padding with
    labels of -100. A stream without any target yields nothing, on every rank. `sources` is 0 throughout.
    """
    inputs = max(0, min(max_tokens, stream.tokens - 1))
    if inputs == 0 or (document_mask and len(stream.document_starts(0, inputs + 1)) == inputs):
        return  # every next token starts a document, so none is a target
    rounds = -(-inputs // (seq_len * micro_batch_size * data_parallel))
    for number in range(data_rank, rounds * data_parallel, data_parallel):
        rows = range(number * micro_batch_size, (number + 1) * micro_batch_size)
        yield build_validation_rows(stream, rows, seq_len, inputs, document_mask)


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
