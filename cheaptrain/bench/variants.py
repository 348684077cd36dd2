"""Which function puts which variant together.

Imported by name when it is built: liger patches transformers, TRL reads half of Hugging Face, and neither may come near
a process that measures something else.
"""

from collections.abc import Callable
from importlib import import_module

import torch

from cheaptrain.bench import works
from cheaptrain.bench.trial import Trial
from cheaptrain.bench.works import Work

_BUILDERS = {
    works.CHEAPTRAIN: "ours:cheaptrain_trial",
    works.PLAIN: "ours:cheaptrain_trial",
    works.FP8: "ours:cheaptrain_trial",
    works.LAYER_KERNELS: "ours:cheaptrain_trial",
    works.CUDA_GRAPHS: "ours:cheaptrain_trial",
    works.TRANSFORMERS: "theirs:transformers_trial",
    works.LIGER: "theirs:transformers_trial",
    works.GPT2_LOOP: "gpt2_loop:gpt2_loop_trial",
    works.FULL_LOGITS: "distilling:distilling_trial",
    works.LIGER_JSD: "distilling:distilling_trial",
    works.TRL: "with_trl:trl_trial",
    works.TRL_FLEX: "with_trl:trl_trial",
}


def prepare(variant: str) -> Callable[[Work, str, torch.device, int], Trial]:
    """The function that puts `variant` together, its imports done."""
    module, _, name = _BUILDERS[variant].partition(":")
    builder: Callable[[Work, str, torch.device, int], Trial] = getattr(
        import_module(f"cheaptrain.bench.{module}"), name
    )
    return builder
