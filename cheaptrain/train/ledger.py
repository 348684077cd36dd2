"""The one account of what was trained: counted from the batches, saved in every checkpoint, read by everything.

Schedules, the end of the run, throughput and metrics all read `tokens_seen` here. Nothing multiplies steps by a batch
size to guess it: a batch that was forgotten, or read twice, would not show.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cheaptrain.data.rows import RowBatch
from cheaptrain.train.step import StepResult


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

    def add(self, batches: Sequence[RowBatch], names: Sequence[str], result: StepResult, seconds: float) -> None:
        """Enter one step; `names` are the sources in the order of `RowBatch.sources`."""
        self.step += 1
        for batch in batches:
            rows, seq = batch.input_ids.shape
            self.rows_seen += rows
            self.tokens_seen += rows * seq
            self.supervised_tokens += batch.supervised
            for index in batch.sources.tolist():
                self.source_tokens[names[index]] = self.source_tokens.get(names[index], 0) + seq
        self.skipped_steps += not result.applied
        self.skipped_in_a_row = 0 if result.applied else self.skipped_in_a_row + 1
        self.train_seconds += seconds

    def to_json(self) -> dict[str, Any]:
        """For the checkpoint."""
        return asdict(self)

    @staticmethod
    def from_json(values: dict[str, Any]) -> "Ledger":
        """From a checkpoint; raises TypeError on counts it does not know."""
        return Ledger(**values)
