"""The norm of all gradients together, and clipping by it, whatever the layout.

A sharded gradient counts once over all its shards, one that several processes hold alike counts once, not once each;
torch's own clipping refuses parameters of different meshes. Every process adds up the squares of what it holds, each
weighted by how many times it is there, and one number is summed over all processes: so all of them get the same norm,
bit for bit, and a NaN on any of them, even in a copy that should equal the others', reaches all.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

_TINY = 1e-6


@torch.no_grad()
def clip_grad_norm(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients of `parameters` in place so that their norm is at most `max_norm`; 0 or less: only measure.

    Returns the norm before, 0-dim on the gradients' device, the same on every process; nothing waits for the device.
    Without a DTensor among `parameters` each process is on its own and every bit is that of
    torch.nn.utils.clip_grad_norm_. With one, all processes must call, and hold the same parameters.
    """
    parameters = list(parameters)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        norm = _norm_over_processes(grads, parameters[0].device)
    else:
        norm = torch.nn.utils.get_total_norm(grads, 2.0, foreach=True)
    if max_norm > 0 and grads:
        # Multiplying by 1 as well costs less than asking the device whether it is 1.
        factor = torch.clamp(max_norm / (norm + _TINY), max=1.0)
        torch._foreach_mul_([_local(grad) for grad in grads], factor)
    return norm


def _norm_over_processes(grads: Iterable[Tensor], device: torch.device) -> Tensor:
    by_shards: dict[int, list[Tensor]] = {}  # pieces that a copy is cut into → local pieces
    for grad in grads:
        shards = 1
        if isinstance(grad, DTensor):
            if any(placement.is_partial() for placement in grad.placements):
                whole = [Replicate() if placement.is_partial() else placement for placement in grad.placements]
                grad = grad.redistribute(placements=whole)
            for axis, placement in enumerate(grad.placements):
                shards *= 1 if placement.is_replicate() else grad.device_mesh.size(axis)
        piece = _local(grad)
        if piece.numel():
            by_shards.setdefault(shards, []).append(piece)
    total = torch.zeros((), dtype=torch.float64, device=device)
    for shards, pieces in by_shards.items():
        norms = torch.stack(torch._foreach_norm(pieces, 2.0, dtype=torch.float32))
        # All processes together hold world / shards copies. In fp64: a norm that fits fp32 has a square that may not.
        total += norms.double().square().sum() * (shards / dist.get_world_size())
    dist.all_reduce(total)
    return total.sqrt().float()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
