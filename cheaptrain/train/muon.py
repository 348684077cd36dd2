"""Muon: momentum, orthogonalised (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/).

The momentum of a matrix is replaced by roughly the nearest orthogonal matrix, through five Newton-Schulz steps in
bf16, and scaled by sqrt(max(1, rows / columns)) (the "original" adjustment; arXiv 2502.16982 compares it with others).
On plain tensors every bit is that of torch.optim.Muon, which knows nothing of shards; here parameters may be DTensors.
The trap is that an orthogonalised shard is not a shard of the orthogonalised matrix: each matrix has to be whole
somewhere.

What a step sends: the momentum, rounded to bf16 (the Newton-Schulz steps begin with that), goes to the process that
its matrix was dealt to, and the update comes back in bf16. Each process sends, and receives, 4 bytes for each matrix
element that it holds (2 of its own pieces, 2 for its share of whole matrices): no process gathers the model. What a
step holds: the momentum, sharded like the parameter, 4 bytes an element for good; for the moment 8 to 12 bytes for
each element of the largest matrix.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from cheaptrain.parallel.matrices import whole_matrices

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
_TINY = 1e-7


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, for matrices `[rows, columns]`, whole or sharded.

    All processes step together, over the same matrices in the same order. State: `momentum_buffer`, laid out like the
    parameter.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon updates matrices, not a tensor of shape {list(parameter.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient. Returns what `closure` returns, called with gradients on."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            self._update(parameters, group["lr"], group["weight_decay"], group["momentum"])
        return loss

    def _update(self, parameters: list[nn.Parameter], lr: float, weight_decay: float, momentum: float) -> None:
        def direction(i: int) -> Tensor:
            """Nesterov momentum of parameter i, this process's piece, rounded to bf16."""
            parameter = parameters[i]
            grad, state = _grad(parameter), self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            buffer = _local(state["momentum_buffer"])
            buffer.lerp_(grad, 1 - momentum)
            return grad.lerp(buffer, momentum).bfloat16()

        for i, update in whole_matrices(parameters, direction, orthogonalise):
            rows, columns = parameters[i].shape
            piece = _local(parameters[i])
            piece.mul_(1 - lr * weight_decay)
            piece.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))


def orthogonalise(matrix: Tensor) -> Tensor:
    """U S' Vᵀ for a bf16 `matrix` `[rows, columns]` = U S Vᵀ, with S' between about 0.5 and 1.5; overwrites `matrix`.

    The coefficients are chosen for the steepest slope at zero, so five steps are enough.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    del matrix  # so that its memory goes with the first x
    x.div_(x.norm().clamp(min=_TINY))  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def _grad(parameter: nn.Parameter) -> Tensor:
    """This process's piece of the gradient, laid out like the parameter."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    assert grad is not None
    return _local(grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
