"""One variant of one work, put together and ready to step; and what all variants have in common.

All start from the same weights, drawn by name and not by order, so that a class whose modules were exchanged for
somebody's kernels has them as well. All use AdamW at the same settings, clip at the same norm, and run in bf16 autocast
over fp32 weights on a GPU, in fp32 on a CPU.
"""

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from cheaptrain.bench.works import Shape, Work
from cheaptrain.model.config import model_config
from cheaptrain.recipe.schema import Model

LEARNING_RATE, BETAS, WEIGHT_DECAY, EPS, CLIP = 3e-4, (0.9, 0.95), 0.1, 1e-8, 1.0
WEIGHT_SPREAD = 0.02


class Figures(NamedTuple):
    """What a step says of itself: the mean loss over supervised positions, and the norm of all gradients before
    clipping."""

    loss: float
    grad_norm: float


class Unavailable(Exception):
    """A variant that cannot be measured here; the text says why."""


Clock = Callable[[Callable[[], Figures]], bool]


@dataclass(frozen=True)
class Trial:
    """`run` does one step after the other and hands the clock, after each, what reads its figures (and waits for the
    device); it goes on as long as the clock says True. `note`: what the reader of the table should know."""

    run: Callable[[Clock], None]
    note: str = ""


def repeated(step: Callable[[int], Callable[[], Figures]]) -> Callable[[Clock], None]:
    """`run` of a trial that steps when it is told to: step 0, 1, 2 and so on."""

    def run(clock: Clock) -> None:
        number = 0
        while clock(step(number)):
            number += 1

    return run


def spec_of(shape: Shape) -> Model:
    """The recipe's `[model]` for a shape; the vocabularies here are padded already."""
    return Model(preset=shape.preset, overrides=dict(shape.overrides), vocab_multiple=1)


def config_of(work: Work, shape: Shape) -> PreTrainedConfig:
    """The config of `shape` for the vocabulary and the rows of a work."""
    return model_config(spec_of(shape), vocab_size=work.vocab, seq_len=work.seq_len, eot_id=0)


def plain_model(
    work: Work, shape: Shape, device: torch.device, *, attention: str = "sdpa", dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """transformers' own model of `shape`, as it comes, with the weights of the work, in training mode."""
    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config_of(work, shape), dtype=dtype, attn_implementation=attention
        )
    model.config.use_cache = False
    fill(model)
    return model.train()  # type: ignore[no-any-return]


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Weights that follow from each parameter's name and shape: matrices are normal, gains 1, biases 0."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            parameter.normal_(std=WEIGHT_SPREAD, generator=generator)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of every variant that brings none of its own: fused, matrices decay, vectors do not."""
    every = list(parameters)
    groups = [
        {"params": [p for p in every if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in every if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, fused=True)


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, nothing on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
