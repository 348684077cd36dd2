"""The one account of what was trained: counted from the batches, saved in every checkpoint, read by everything.

Schedules, the end of the run, throughput and metrics all read `tokens_seen` here. Nothing multiplies steps by a batch
size to guess it: a batch that was forgotten, or read twice, would not show. With many processes each knows its own rows
only, so what is entered is summed over them, and held against the batch the recipe asked for: rows that one process
lost, or that two counted, end the run instead of standing in the account.

The ledger also keeps the history of the run: at which step it went on with another batch, another number of processes,
or another layout of them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cheaptrain.errors import CheaptrainError
from cheaptrain.recipe.length import Done, Stretch
from cheaptrain.recipe.resolve import Resolved
from cheaptrain.train.counts import StepCounts
from cheaptrain.train.step import StepResult


@dataclass(frozen=True)
class BatchEntry:
    """How the run was trained from some step on; `step` and `tokens` are those done before."""

    step: int
    tokens: int
    global_batch_tokens: int
    processes: int
    layout: str


@dataclass
class Ledger:
    """Counts since the start of the run, over all processes."""

    step: int = 0
    rows_seen: int = 0
    tokens_seen: int = 0
    supervised_tokens: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    failed_saves: int = 0
    train_seconds: float = 0.0
    source_tokens: dict[str, int] = field(default_factory=dict)
    batches: list[BatchEntry] = field(default_factory=list)

    def begin(self, resolved: Resolved) -> BatchEntry | None:
        """Enter how the run goes on from here; returns what was entered, None when nothing is new."""
        batch, processes, layout = resolved.tokens_per_step, resolved.world_size, str(resolved.layout)
        while self.batches and self.batches[-1].step == self.step:
            self.batches.pop()  # not a step was done that way
        entry = BatchEntry(self.step, self.tokens_seen, batch, processes, layout)
        if self.batches and _as(self.batches[-1]) == _as(entry):
            return None
        self.batches.append(entry)
        return entry

    def add(self, counts: StepCounts, names: Sequence[str], result: StepResult, seconds: float) -> None:
        """Enter one step; `names` are the sources in the order of `counts.source_rows`.

        Raises CheaptrainError when all processes together did not read exactly one global batch.
        """
        asked = self.batches[-1].global_batch_tokens
        if counts.tokens != asked:
            raise CheaptrainError(
                f"step {self.step + 1}: the processes together read {counts.tokens:,} tokens in {counts.rows:,} rows, "
                f"and train.global_batch_tokens is {asked:,}: rows were left out or read twice"
            )
        self.step += 1
        self.rows_seen += counts.rows
        self.tokens_seen += counts.tokens
        self.supervised_tokens += counts.supervised
        for name, rows in zip(names, counts.source_rows, strict=True):
            if rows:
                self.source_tokens[name] = self.source_tokens.get(name, 0) + rows * (counts.tokens // counts.rows)
        self.skipped_steps += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.train_seconds += seconds

    def done(self) -> Done | None:
        """What the length of the rest is reckoned from; None before the first step."""
        if self.step == 0:
            return None
        stretches: list[Stretch] = []
        for entry in self.batches:
            if not stretches or stretches[-1].global_batch_tokens != entry.global_batch_tokens:
                stretches.append(Stretch(entry.step, entry.tokens, entry.global_batch_tokens))
        return Done(self.step, self.tokens_seen, self.rows_seen, tuple(stretches))

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Ledger":
        """From a checkpoint; raises TypeError on counts it does not know."""
        return Ledger(**{**values, "batches": [BatchEntry(**entry) for entry in values["batches"]]})


def _as(entry: BatchEntry) -> tuple[int, int, str]:
    return entry.global_batch_tokens, entry.processes, entry.layout
