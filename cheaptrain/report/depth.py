"""How deep a stack has to be run to know what a deeper one takes: layers that are alike cost alike."""

import copy
from typing import Any

from transformers import PreTrainedConfig

from cheaptrain.model.build import meta_model
from cheaptrain.model.parts import decoder_layers


def alike_at_the_end(config: PreTrainedConfig) -> int:
    """How many of the last layers are of one kind: the same parameters, and the same entries in lists of the config
    that have one for each layer."""
    lists = _layer_lists(config)
    kinds = [
        (
            type(layer),
            [(name, p.shape) for name, p in layer.named_parameters()],
            [values[i] for values in lists.values()],
        )
        for i, layer in enumerate(decoder_layers(meta_model(config)))
    ]
    return next((n for n, kind in enumerate(reversed(kinds)) if kind != kinds[-1]), len(kinds))


def _layer_lists(config: PreTrainedConfig) -> dict[str, list[Any]]:
    count = config.num_hidden_layers
    return {name: value for name, value in vars(config).items() if isinstance(value, list) and len(value) == count}


def shortened(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The same model with its first `layers` layers."""
    short = copy.deepcopy(config)
    for name, values in _layer_lists(config).items():
        setattr(short, name, values[:layers])
    short.num_hidden_layers = layers
    return short
