"""Matrix products of the decoder layers in 8-bit floats, by torchao.

Inputs, weights and gradients are scaled to the range of the format, each tensor by its own largest number, when a
product needs them; weights and their gradients are kept as they were. Only what is trained with is so: without
gradients (validation, samples, the proof of a save) the products are those of the checkpoint as anybody will load it. A
proof that compared 8-bit products with the file's would have to allow more than a wrong export shows. Embedding and
head stay in bf16: the loss depends on the head's own numbers.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from cheaptrain.errors import PreflightError
from cheaptrain.model.parts import decoder_layers

_MULTIPLE = 16  # of both sides of a matrix, for the products of the hardware
_CAPABILITY = (8, 9)  # compute capability from which on a GPU has them


def multiplies_in_fp8(device: torch.device) -> bool:
    """Whether `device` is a GPU that has products of 8-bit floats."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _CAPABILITY


def refuse_fp8(device: torch.device, *, tp: int) -> None:
    """Raise PreflightError where train.fp8 cannot be had."""
    if importlib.util.find_spec("torchao") is None:
        raise PreflightError("train.fp8 needs torchao; run: pip install torchao")
    if not multiplies_in_fp8(device):
        raise PreflightError(
            "train.fp8 needs a GPU that computes in 8-bit floats (Ada, Hopper or newer): set train.fp8 = false"
        )
    if tp > 1:
        raise PreflightError(
            f"train.fp8 scales whole tensors, and parallel.tp = {tp} splits them: set parallel.tp = 1, or "
            "train.fp8 = false"
        )


def to_fp8(model: PreTrainedModel, *, emulate: bool = False) -> tuple[int, int]:
    """Give the linear layers of the decoder layers 8-bit products, in place; parameters and their names stay.

    Returns how many have them and how many could not: those with a side that is no multiple of 16. `emulate`: the same
    rounding on any device, by slow products, for tests. Raises PreflightError for a model without a linear layer to
    convert.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=emulate)
    converted = left = 0
    for layer in decoder_layers(model):
        fitting = [
            name
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear) and all(side % _MULTIPLE == 0 for side in module.weight.shape)
        ]
        left += sum(isinstance(module, nn.Linear) for module in layer.modules()) - len(fitting)
        convert_to_float8_training(layer, module_filter_fn=lambda _, name: name in fitting, config=config)  # noqa: B023
        for name in fitting:
            _only_with_gradients(layer.get_submodule(name))
        converted += len(fitting)
    if not converted:
        raise PreflightError(
            f"train.fp8: {type(model).__name__} has no linear layer with sides that are multiples of {_MULTIPLE}; "
            "set train.fp8 = false"
        )
    return converted, left


def _only_with_gradients(module: Any) -> None:
    eight_bit = module.forward

    def forward(given: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return functional.linear(given, module.weight, module.bias)
        product: Tensor = eight_bit(given)
        return product

    module.forward = forward
