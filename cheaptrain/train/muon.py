"""Muon: momentum, orthogonalised (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon/).

The momentum of a matrix is replaced by roughly the nearest orthogonal matrix, through five Newton-Schulz steps in
bf16, and scaled by sqrt(max(1, rows / columns)) (the "original" adjustment; arXiv 2502.16982 compares it with others).
On plain tensors every bit is that of torch.optim.Muon, which knows nothing of shards; here parameters may be DTensors.
The trap is that an orthogonalised shard is not a shard of the orthogonalised matrix: each matrix has to be whole
somewhere.

What a step sends: the momentum, rounded to bf16 (the Newton-Schulz steps begin with that), goes to the process that
its matrix was dealt to, and the update comes back in bf16. Each process sends, and receives, 4 bytes for each matrix
element that it holds (2 of its own pieces, 2 for its share of whole matrices): no process gathers the model. What a
step holds: the momentum, sharded like the parameter, 4 bytes an element for good; for the moment about six times the
stack of matrices that is worked on at once (`matrices.STACK_BYTES`), or of the largest matrix, if that is more.

Matrices of one shape go through the Newton-Schulz steps as one stack: five steps of three products for each of a
hundred matrices are 1,500 launches, most of them too small to fill a GPU. Stacked products give the bits of
single ones on a CPU, which is tested; a GPU may choose another kernel for a stack, and then differs by rounding to
bf16.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
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

    # As fused AdamW has it: a scalar on the device; 1: the step leaves every weight and momentum as it is. Nobody waits
    # for the device to know. None: no such question.
    found_inf: Tensor | None = None

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
        void = None if self.found_inf is None else self.found_inf.reshape(()) != 0

        def directions(numbers: Sequence[int]) -> list[Tensor]:
            """Nesterov momentum of these parameters, this process's pieces, rounded to bf16."""
            some = [parameters[i] for i in numbers]
            for parameter in some:
                if "momentum_buffer" not in self.state[parameter]:
                    self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            grads = [_grad(parameter) for parameter in some]
            buffers = [_local(self.state[parameter]["momentum_buffer"]) for parameter in some]
            averaged = _stepped(buffers, lambda these: torch._foreach_lerp_(these, grads, 1 - momentum), void)
            return [each.bfloat16() for each in torch._foreach_lerp(grads, averaged, momentum)]

        def move(pieces: list[Tensor], numbers: Sequence[int], updates: Sequence[Tensor]) -> None:
            torch._foreach_mul_(pieces, 1 - lr * weight_decay)
            for i, piece, update in zip(numbers, pieces, updates, strict=True):
                rows, columns = parameters[i].shape
                piece.add_(update, alpha=-lr * math.sqrt(max(1, rows / columns)))

        for numbers, updates in whole_matrices(parameters, directions, orthogonalise):
            pieces = [_local(parameters[i]) for i in numbers]
            _stepped(pieces, partial(move, numbers=numbers, updates=updates), void)


def orthogonalise(matrices: Tensor) -> Tensor:
    """U S' Vᵀ for each of the bf16 `matrices` `[n, rows, columns]` = U S Vᵀ, with S' between about 0.5 and 1.5;
    overwrites `matrices`.

    The coefficients are chosen for the steepest slope at zero, so five steps are enough.
    """
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    del matrices  # so that its memory goes with the first x
    norms = torch.stack(torch._foreach_norm(list(x.unbind())))
    x.div_(norms.clamp_(min=_TINY)[:, None, None])  # no singular value above 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _stepped(tensors: list[Tensor], change: Callable[[list[Tensor]], Any], void: Tensor | None) -> list[Tensor]:
    """`change` made to `tensors` in place, and they; where `void` is true, they keep every bit."""
    if void is None:
        change(tensors)
        return tensors
    changed = [tensor.clone() for tensor in tensors]
    change(changed)
    for tensor, new in zip(tensors, changed, strict=True):
        torch.where(void, tensor, new, out=tensor)
    return tensors


def _grad(parameter: nn.Parameter) -> Tensor:
    """This process's piece of the gradient, laid out like the parameter."""
    grad = parameter.grad
    if isinstance(grad, DTensor) and isinstance(parameter, DTensor) and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    assert grad is not None
    return _local(grad)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
