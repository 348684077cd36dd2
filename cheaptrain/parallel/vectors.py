"""Parameters that are not sharded: gains of norms and biases, a thousandth of a model.

Layers are gathered in bf16, which for a matrix is the rounding that its product does anyway. The gain of a norm is
multiplied in fp32: rounded to bf16 it would be another gain, and training on two processes would differ from training
on one. So vectors stay whole, in fp32, on every process, and their gradients are summed here, in one message.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from cheaptrain.parallel.root import Root


def vectors(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of fewer than two dimensions, in order."""
    return [parameter for parameter in module.parameters() if parameter.dim() < 2]


def sum_vector_gradients(root: Root, mesh: DeviceMesh) -> None:
    """Sum over processes the gradients that FSDP does not. After the last backward pass of a step. Collective."""
    if mesh.size() == 1:
        return
    with torch.no_grad():
        gradients = [_local(parameter) for parameter in vectors(root) if parameter.grad is not None]
        if not gradients:
            return
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        # Processes of the tp axis have either the same gradient or each its own part: they never add theirs up.
        dist.all_reduce(flat, group=_data_group(mesh))
        for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(total.view_as(gradient))


def _local(parameter: nn.Parameter) -> Tensor:
    """What this process holds of the gradient, whole over the tp axis where the parameter is."""
    gradient = parameter.grad
    assert gradient is not None
    if not isinstance(gradient, DTensor):
        return gradient
    if any(placement.is_partial() for placement in gradient.placements):
        placements = parameter.placements if isinstance(parameter, DTensor) else [Replicate()]
        parameter.grad = gradient = gradient.redistribute(placements=placements)
    return gradient.to_local()


def _data_group(mesh: DeviceMesh) -> dist.ProcessGroup:
    """All processes that hold the same part of each matrix split over the tp axis."""
    if mesh["tp"].size() == 1:
        return dist.group.WORLD  # type: ignore[return-value]
    return mesh["dp_replicate", "dp_shard", "cp"]._flatten("data").get_group()
