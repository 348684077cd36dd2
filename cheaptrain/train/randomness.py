"""Random numbers of training (dropout, say) as a function of where it is: no checkpoint has to keep their state.

Each step draws from the seed, its own number and the share of the rows a process reads. Saving, validating or building
a model in between changes nothing; a run that is resumed draws what it would have drawn.
"""

import hashlib

from accelerate.utils import set_seed


def seed_step(seed: int, step: int, share: int) -> None:
    """Seed Python, numpy and torch for `step` of the process that reads share number `share`. Processes that have the
    same tokens (tensor parallelism) must give the same."""
    digest = hashlib.blake2b(f"{seed} {step} {share}".encode(), digest_size=4).digest()
    set_seed(int.from_bytes(digest, "big"))
