"""Disk that checkpoints take, reckoned once for the plan, for the check before step 0, and before each save."""

from cheaptrain.recipe.resolve import ModelFacts, Resolved
from cheaptrain.recipe.schema import Checkpoint, Train

_SMALL_FILES = 16_000_000  # tokenizer, configs, records; generous


def checkpoint_bytes(facts: ModelFacts, train: Train) -> int:
    """About what one checkpoint takes: fp32 weights, the optimizer's moments, and small files."""
    return 4 * facts.parameters + moment_bytes(facts, train) + _SMALL_FILES


def moment_bytes(facts: ModelFacts, train: Train) -> int:
    """What the optimizer keeps of each parameter: AdamW two fp32 numbers, Muon one for the hidden matrices."""
    hidden = facts.by_part.get("attention", 0) + facts.by_part.get("mlp", 0) if train.optimizer == "muon" else 0
    return 8 * facts.parameters - 4 * hidden


def checkpoints_at_once(resolved: Resolved, checkpoint: Checkpoint) -> int:
    """Most checkpoints that lie on the disk at one moment: those kept, and the one written before the oldest goes."""
    kept_for_good = resolved.steps // resolved.keep_every if resolved.keep_every else 0
    saves = -(-resolved.steps // resolved.save_every)
    return min(saves, checkpoint.keep_last + 1 + kept_for_good)
