"""The module that FSDP wraps whole: a model, and whatever is computed with it while its weights are there.

FSDP gathers a module's weights when its forward begins and drops them when it ends. The loss needs the head's weight
after the decoder's forward, so it is computed inside the forward of this one:

    root(work, batch)   →   work(model, batch), with embedding, final norm and head whole

On one process it only calls `work`.
"""

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

T = TypeVar("T")


class Root(nn.Module):
    """Runs work with the model. What `work` returns must hold its tensors in tuples, lists or dicts, where FSDP
    finds them."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., T], *arguments: Any) -> T:
        """`work(model, *arguments)`."""
        return work(self.model, *arguments)


def last_micro_batch(root: Root, last: bool) -> None:
    """Gradients are summed over processes in the backward pass of the last micro-batch of a step only."""
    if isinstance(root, FSDPModule):
        root.set_requires_gradient_sync(last)


def forget_gathered(root: Root) -> None:
    """Drop what a forward pass without a backward pass left gathered, so that parameters are their shards again."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
