"""The learning rate as a function of tokens seen.

Tokens, not steps, so that a run that changes its batch in the middle stays on the same curve (`recipe/length.py`). The
rate of a step is read at the tokens seen when the step *ends* during warm-up (the first step is not wasted at a rate of
zero) and when it *starts* afterwards (the last step is not wasted either).
"""

import math
from collections.abc import Callable

from cheaptrain.recipe.resolve import Resolved
from cheaptrain.recipe.schema import Train


def learning_rate(train: Train, resolved: Resolved) -> Callable[[int], float]:
    """`factor(tokens_seen)` in [0, 1]: what to multiply every peak learning rate with for the step that starts
    there."""
    curve, final = resolved.curve, train.final_lr_ratio
    total, warmup, decay = curve.length, curve.warmup, curve.decay

    def factor(tokens_seen: int) -> float:
        place = curve.place(tokens_seen)
        if place < warmup:
            return min(1.0, float(curve.place(tokens_seen + resolved.tokens_per_step) / warmup))
        if train.schedule == "constant":
            return 1.0
        if train.schedule == "wsd":
            done = float((place - (total - decay)) / max(1, decay))
        else:
            done = float((place - warmup) / max(1, total - warmup))
        done = min(1.0, max(0.0, done))
        falling = 0.5 * (1 + math.cos(math.pi * done)) if train.schedule == "cosine" else 1 - done
        return final + (1 - final) * falling

    return factor
