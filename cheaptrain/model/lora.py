"""LoRA: small matrices beside the frozen ones of a model, merged into them in what is saved.

peft puts an adapter around each linear layer that is named, in place: the layer's weight W stays as it was loaded, and
W x becomes W x + (alpha / rank) B A x with A and B trained. Everything else here asks for the model as its own class
has it (its twin, its checkpoints), so `plain_modules` shows the adapted model that way, with the merged weights
W + (alpha / rank) B A in fp32 in their places. The trap: peft passes over a name that fits no layer as long as another
one fits, and that layer then silently never trains.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.parts import decoder_layers
from cheaptrain.recipe.schema import Lora

_ADAPTER = "default"  # peft's name for the only one


def add_adapters(model: PreTrainedModel, lora: Lora, seed: int) -> int:
    """Put adapters around the linear layers `lora.targets` of all decoder layers, in place, and freeze all else;
    returns how many numbers train. Their first weights depend on the seed alone: A is drawn, B is zero, so nothing of
    the model has changed yet.

    Raises RecipeError naming a target that is no linear layer of this model, PreflightError when peft is missing.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise PreflightError("[lora] needs peft: pip install 'cheaptrain[lora]'") from error
    layers = decoder_layers(model)
    linear = {name.rpartition(".")[2]: m for name, m in layers.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    if unknown := [name for name in lora.targets if name not in linear]:
        raise RecipeError(
            f"lora.targets: {', '.join(unknown)} is no linear layer of {type(model).__name__}; there are "
            f"{', '.join(sorted(linear))}"
        )
    inside = set(layers.modules())
    transposed = {isinstance(linear[name], Conv1D) for name in lora.targets}
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type] # peft divides by the rank, and takes any number
        lora_dropout=lora.dropout,
        target_modules=[
            name
            for name, module in model.named_modules()
            if name.rpartition(".")[2] in lora.targets and module in inside
        ],
        fan_in_fan_out=transposed == {True},
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        inject_adapter_in_model(config, model, adapter_name=_ADAPTER)
    trained = adapters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for tensor in trained.values():
        tensor.requires_grad_(True)
    return sum(tensor.numel() for tensor in trained.values())


def adapters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The matrices A and B of all adapters by name; empty for a model without."""
    kept: dict[str, nn.Parameter] = {}
    for name, layer in _adapted(model).items():
        for part in ("lora_A", "lora_B"):
            kept[f"{name}.{part}.{_ADAPTER}.weight"] = getattr(layer, part)[_ADAPTER].weight
    return kept


Tensors = Mapping[str, Tensor | None]


def plain_modules(model: nn.Module) -> Iterator[tuple[str, Tensors, Tensors]]:
    """The modules of the model as its class has them: name, parameters and buffers of each. Adapters are merged into
    the weights they belong to, in new memory; all else is the very same tensors."""
    adapted = _adapted(model)
    for name, module in model.named_modules():
        if name in adapted:
            base = module.get_base_layer()  # type: ignore[operator]
            yield name, {**base._parameters, "weight": _merged(module)}, base._buffers
        elif not any(name.startswith(f"{outer}.") for outer in adapted):
            yield name, module._parameters, module._buffers


@torch.no_grad()
def _merged(layer: Any) -> nn.Parameter:
    weight = layer.get_base_layer().weight
    return nn.Parameter(weight + layer.get_delta_weight(_ADAPTER).to(weight.dtype), requires_grad=False)


def _adapted(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by the name that the layer inside has in a model without."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
