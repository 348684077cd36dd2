"""The plain twin: the very same weights under transformers' own attention.

It is what samples are generated with (ours takes no cache), what is saved, and the independent reference the proofs
compare with. Nothing is copied: the twin holds the same parameter objects, so it is always up to date and costs no
memory. Only where adapters are trained, it has the weights they are merged into as they are now, in memory of its own.
"""

import copy

import torch
from transformers import PreTrainedModel

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.lora import plain_modules


def plain_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class with every parameter and buffer of `model`, SDPA attention, in eval mode."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    config.use_cache = True
    try:
        with torch.device("meta"):
            twin = type(model)(config)
    except ValueError as error:
        raise CheaptrainError(
            f"{type(model).__name__}: transformers does not run it with SDPA attention, which checks, samples and "
            "checkpoints need here; take another model class"
        ) from error
    theirs = dict(twin.named_modules())
    for name, parameters, buffers in plain_modules(model):
        other = theirs.pop(name, None)
        if other is None:
            raise CheaptrainError(
                f"{type(model).__name__}: {name} was wrapped or added after building; it has no plain twin"
            )
        other._parameters.update(parameters)  # type: ignore[arg-type]
        other._buffers.update(buffers)
    left = [n for n, t in [*twin.named_parameters(), *twin.named_buffers()] if t.is_meta]
    if theirs or left:
        raise CheaptrainError(
            f"{type(model).__name__}: no plain twin, {next(iter([*theirs, *left]))} is missing in the model"
        )
    if model.generation_config is not None:
        twin.generation_config = copy.deepcopy(model.generation_config)
    return twin.eval()
