"""Optimizers: AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

Matrices decay, vectors (norm gains, biases) do not. Muon orthogonalises a matrix's update, which means something only
for the matrices inside the decoder layers: embeddings and head always belong to AdamW. Every parameter belongs to
exactly one group, and that is checked, because a parameter in none would silently never train. Both take parameters
that are sharded over processes.
"""

from collections.abc import Sequence

import torch
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cheaptrain.errors import RecipeError
from cheaptrain.model.parts import hidden_matrices
from cheaptrain.recipe.schema import Train
from cheaptrain.train.muon import Muon

DEFAULT_MUON_LR = 0.02
DEFAULT_MUON_MOMENTUM = 0.95


def build_optimizers(model: PreTrainedModel, train: Train) -> list[Optimizer]:
    """The optimizers of `train` over the trainable parameters of `model`; each group keeps its peak as `peak_lr`.

    Raises RecipeError when Muon is asked for and the model has no hidden matrices.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers: list[Optimizer] = []
    if train.optimizer == "muon":
        matrices = hidden_matrices(model)
        chosen = {id(parameter) for parameter in matrices}
        if not chosen:
            raise RecipeError(
                'train.optimizer = "muon": this model has no matrices inside its decoder layers; use "adamw"'
            )
        optimizers.append(
            Muon(
                [parameter for parameter in named.values() if id(parameter) in chosen],
                lr=train.muon_lr or DEFAULT_MUON_LR,
                momentum=DEFAULT_MUON_MOMENTUM if train.muon_momentum is None else train.muon_momentum,
                weight_decay=train.weight_decay,
            )
        )
        named = {name: parameter for name, parameter in named.items() if id(parameter) not in chosen}
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": train.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if groups:
        optimizers.append(torch.optim.AdamW(groups, lr=train.lr, betas=train.betas, eps=train.eps, fused=True))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    _check_each_once(model, optimizers)
    return optimizers


def set_learning_rate(optimizers: Sequence[Optimizer], factor: float) -> float:
    """Set every group to its peak times `factor`; returns the rate of the last group (AdamW's), which is reported."""
    rate = 0.0
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate = group["peak_lr"] * factor
    return rate


def _check_each_once(model: PreTrainedModel, optimizers: Sequence[Optimizer]) -> None:
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p) for p in model.parameters() if p.requires_grad}
    if len(held) != len(set(held)) or set(held) != wanted:
        raise AssertionError("every trainable parameter must belong to exactly one optimizer group")
