"""What the forward pass keeps for the backward pass, counted on the real model without its memory.

The decoder is run on fake tensors, which have shapes and storage sizes but no storage, and every tensor that
autograd saves is written down. So it is right for any model class, with or without QK-norm, gated MLP or attention
mask, where a formula from a paper would be right for one. The trap: under autocast the bf16 copies of the weights are
saved too, and do not grow with the batch. Two counts, of one row and of two, tell the two kinds apart.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cheaptrain.model import attention
from cheaptrain.model.parts import decoder, decoder_layers


@dataclass(frozen=True)
class Activations:
    """Bytes kept from the forward pass of one row. `layers`: of each decoder layer; `outside`: embedding, final norm.

    `layer_input`: all that is kept of a layer that will be recomputed. `weight_copies`: bf16 weights, not a row's.
    """

    layers: tuple[int, ...]
    outside: int
    layer_input: int
    weight_copies: int

    def kept_of_row(self, checkpointing: bool) -> int:
        """What is kept at the end of the forward pass; with activation checkpointing the input of every layer."""
        return self.outside + (len(self.layers) * self.layer_input if checkpointing else sum(self.layers))


def count_activations(config: PreTrainedConfig, seq_len: int, *, bf16: bool, mask: bool) -> Activations:
    """Count for rows of `seq_len`. `mask`: attention keeps documents apart by a boolean mask, as on a CPU."""
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation=attention.NAME
        ).train()
        one, two = (_saved(model, rows, seq_len, bf16=bf16, mask=mask) for rows in (1, 2))
    grown = [b - a for a, b in zip(one, two, strict=True)]
    return Activations(
        layers=tuple(grown[1:]),
        outside=grown[0],
        layer_input=4 * seq_len * config.hidden_size,  # the residual stream stays fp32 under autocast
        weight_copies=sum(one) - sum(grown),
    )


def _saved(model: PreTrainedModel, rows: int, seq_len: int, *, bf16: bool, mask: bool) -> list[int]:
    """Bytes that autograd saves: outside the layers, then of each layer."""
    layers = list(decoder_layers(model))
    place = [0]  # 0: outside, n: inside layer n
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}  # the tensor too, so that no address is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, (place[0], tensor))
        return tensor

    def enter(number: int) -> Any:
        return lambda *_: place.__setitem__(0, number)

    hooks = [layer.register_forward_pre_hook(enter(number)) for number, layer in enumerate(layers, 1)]
    hooks += [layer.register_forward_hook(enter(0)) for layer in layers]
    inputs = attention.attention_inputs(torch.zeros(1, 1), document_mask=False)
    if mask:
        inputs |= {"packing": attention.DENSE}
        inputs["packing_mask"] = torch.zeros(rows, 1, seq_len, seq_len, dtype=torch.bool)
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        positions = torch.zeros(rows, seq_len, dtype=torch.int64)
        decoder(model)(input_ids=positions, position_ids=positions, **inputs)
    for hook in hooks:
        hook.remove()
    counts = [0] * (len(layers) + 1)
    for where, tensor in kept.values():
        counts[where] += tensor.untyped_storage().nbytes()
    return counts
