"""Disk that checkpoints take, reckoned once for the plan, for the check before step 0, and before each save."""

from collections.abc import Sequence
from dataclasses import dataclass

from cheaptrain.recipe.resolve import ModelFacts, Resolved
from cheaptrain.recipe.schema import Checkpoint, Train

_SMALL_FILES = 16_000_000  # tokenizer, configs, records; generous


def checkpoint_bytes(facts: ModelFacts, train: Train) -> int:
    """About what one checkpoint takes: fp32 weights, adapters beside them, the optimizer's moments, and small files."""
    return 4 * (facts.parameters + facts.adapters) + moment_bytes(facts, train) + _SMALL_FILES


def moment_bytes(facts: ModelFacts, train: Train) -> int:
    """What the optimizer keeps of each parameter that trains: AdamW two fp32 numbers, Muon one for hidden matrices."""
    hidden = facts.by_part.get("attention", 0) + facts.by_part.get("mlp", 0) if train.optimizer == "muon" else 0
    return 8 * (facts.adapters or facts.parameters) - 4 * hidden


def checkpoints_at_once(resolved: Resolved, checkpoint: Checkpoint) -> int:
    """Most checkpoints that lie on the disk at one moment: those kept, and the one written before the oldest goes."""
    return min(_saves(resolved), checkpoint.keep_last + 1 + _kept_for_good(resolved))


def checkpoints_left(resolved: Resolved, checkpoint: Checkpoint) -> int:
    """Checkpoints that lie on the disk when the run is done."""
    return min(_saves(resolved), checkpoint.keep_last + _kept_for_good(resolved))


@dataclass(frozen=True)
class StageSpace:
    """What one stage takes of a disk: bytes of a checkpoint, how many there are at once and in the end, and how many
    lie there already."""

    name: str
    each: int
    at_once: int
    left: int
    there: int


def most_at_once(stages: Sequence[StageSpace]) -> tuple[int, str]:
    """Bytes that stages, one after the other on one disk, take of it beyond what is there now, at the worst moment, and
    the stage it falls in: what the earlier ones leave behind is still there."""
    before, worst = 0, (0, "")
    for stage in stages:
        worst = max(worst, (before + stage.each * max(0, stage.at_once - stage.there), stage.name))
        before += stage.each * max(0, stage.left - stage.there)
    return worst


def _kept_for_good(resolved: Resolved) -> int:
    return resolved.steps // resolved.keep_every if resolved.keep_every else 0


def _saves(resolved: Resolved) -> int:
    return -(-resolved.steps // resolved.save_every)
