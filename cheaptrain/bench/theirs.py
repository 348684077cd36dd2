"""What people would otherwise use for pretraining: transformers as it comes, and with liger's kernels.

As a loop of one's own is usually written: bf16 autocast, `model(input_ids, labels=...)`, backward, clip, fused AdamW.
Nothing is read from the device in the step, and the batches are there already: the loop of a Trainer is slower.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cheaptrain.bench.rows import DISTINCT, Rows, step_rows
from cheaptrain.bench.trial import CLIP, Figures, Trial, Unavailable, adamw, autocast, plain_model, repeated
from cheaptrain.bench.works import LIGER, Shape, Work

Loss = Callable[[Rows], Tensor]  # sum over the supervised positions of a micro-batch on the device


def transformers_trial(work: Work, variant: str, device: torch.device, micro_rows: int) -> Trial:
    """transformers as it comes, or with every patch liger has for the class. Raises Unavailable without liger."""
    if work.documents is not None:
        raise Unavailable("rows of several documents are measured with TRL, which packs them")
    if variant == LIGER:
        patch_with_liger(work.model, device, fused_loss=True)
    model = plain_model(work, work.model, device)

    def loss(rows: Rows) -> Tensor:
        # The labels as they come: the model shifts them itself, and rows end without a target here.
        mean: Tensor = model(input_ids=rows.input_ids, labels=rows.input_ids, use_cache=False).loss
        return mean * rows.supervised

    return loop_trial(work, device, micro_rows, model, loss, "SDPA, full logits" if variant != LIGER else "")


def loop_trial(
    work: Work,
    device: torch.device,
    micro_rows: int,
    model: nn.Module,
    loss: Loss,
    note: str = "",
) -> Trial:
    """A plain training loop around `loss`: accumulate over micro-batches, clip, step."""
    optimizer = adamw(model.parameters())
    parameters = list(model.parameters())
    batches = [on_device(step_rows(work, number, micro_rows), device) for number in range(DISTINCT)]

    def step(number: int) -> Callable[[], Figures]:
        here = batches[number % DISTINCT]
        supervised = sum(rows.supervised for rows in here)
        total = torch.zeros((), device=device)
        for rows in here:
            with autocast(device):
                mean = loss(rows) / supervised
            mean.backward()
            total += mean.detach()
        norm = nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return lambda: Figures(total.item(), norm.item())

    return Trial(repeated(step), note)


def on_device(micro_batches: list[Rows], device: torch.device) -> list[Rows]:
    """The rows with what a model reads on the device."""
    names = ("input_ids", "labels", "position_ids")
    return [replace(rows, **{name: getattr(rows, name).to(device) for name in names}) for rows in micro_batches]


def patch_with_liger(shape: Shape, device: torch.device, *, fused_loss: bool) -> None:
    """Every patch liger has for the class of a model, in this process for good. Call before the model is built. Raises
    Unavailable without liger, without a GPU, or without patches for the class."""
    refuse_without("liger_kernel", "liger-kernel")
    if device.type != "cuda":
        raise Unavailable("liger's kernels are Triton's, and need a GPU")
    from liger_kernel.transformers import monkey_patch

    from cheaptrain.model.presets import find_preset

    kind = find_preset(shape.preset).model_type
    patches = {
        "qwen3": "apply_liger_kernel_to_qwen3",
        "llama": "apply_liger_kernel_to_llama",
        "llama4_text": "apply_liger_kernel_to_llama4",
    }
    if kind not in patches:
        raise Unavailable(f"liger has no patches for {kind}")
    getattr(monkey_patch, patches[kind])(fused_linear_cross_entropy=fused_loss)


def refuse_without(module: str, package: str) -> None:
    """Raise Unavailable when a package is not installed."""
    if importlib.util.find_spec(module) is None:
        raise Unavailable(f"{package} is not installed: pip install {package}")
