"""A step that does not count must leave no trace, and the question whether it counts must not change one that does.

`found_inf` is a number on the device that nobody reads: every weight and momentum is chosen by it, bit by bit.
"""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.recipe.layout import Layout
from cheaptrain.train.muon import Muon

torch.set_num_threads(1)

SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
SHAPES = [(24, 72), (24, 72), (66, 18), (40, 40), (24, 72)]


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    matrices = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    with torch.no_grad():
        matrices[0][0, :4] = torch.tensor([0.0, -0.0, 1e-42, -1e-42])  # signs of zeros and denormals are bits too
    return matrices


def _give_gradients(matrices: Sequence[nn.Parameter], seed: int, spoilt: float | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape, generator=generator)
        if spoilt is not None:
            matrix.grad[0, 0] = spoilt


def _bits(matrices: Sequence[nn.Parameter], optimizer: Muon) -> list[Tensor]:
    kept = [*matrices, *(optimizer.state[m]["momentum_buffer"] for m in matrices if m in optimizer.state)]
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in kept]
    return [tensor.detach().clone().view(torch.int32) for tensor in local]


@pytest.mark.parametrize("spoilt", [None, float("nan"), float("inf")])
def test_a_flagged_step_changes_a_bit(spoilt: float | None) -> None:
    matrices = _matrices()
    optimizer = Muon(matrices, **SETTINGS)
    _give_gradients(matrices, 1)
    optimizer.step()
    before = _bits(matrices, optimizer)
    _give_gradients(matrices, 2, spoilt)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    after = _bits(matrices, optimizer)
    assert len(before) == len(after) == 2 * len(SHAPES)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_flagged_first_step_makes_the_next_one_another() -> None:
    """It leaves a momentum of zeros behind, which is what the first step that counts begins with anyway."""
    ours, others = _matrices(), _matrices()
    flagged, plain = Muon(ours, **SETTINGS), Muon(others, **SETTINGS)
    _give_gradients(ours, 1, float("nan"))
    flagged.found_inf = torch.ones(1)
    flagged.step()
    for matrices in (ours, others):
        _give_gradients(matrices, 2)
    flagged.found_inf = torch.zeros(1)
    flagged.step()
    plain.step()
    assert all(torch.equal(a, b) for a, b in zip(_bits(ours, flagged), _bits(others, plain), strict=True))


def test_the_question_changes_a_step_that_counts() -> None:
    ours, others = _matrices(), _matrices()
    asked, plain = Muon(ours, **SETTINGS), Muon(others, **SETTINGS)
    for step in range(3):
        _give_gradients(ours, step)
        _give_gradients(others, step)
        asked.found_inf = torch.zeros(())
        asked.step()
        plain.step()
    start = _matrices()
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(_bits(ours, asked), _bits(others, plain), strict=True))


def _sharded(rank: int, size: int) -> list[bool]:
    mesh = make_mesh(Layout(dp_shard=size), "cpu")["dp_shard"]
    wholes = _matrices()
    matrices = [nn.Parameter(distribute_tensor(m.detach(), mesh, [Shard(0)], src_data_rank=None)) for m in wholes]
    optimizer = Muon(matrices, **SETTINGS)
    kept = []
    for step, flag in enumerate((0.0, 1.0, 0.0)):
        _give_gradients(wholes, step, float("nan") if flag else None)
        for matrix, whole in zip(matrices, wholes, strict=True):
            assert whole.grad is not None
            matrix.grad = distribute_tensor(whole.grad, mesh, [Shard(0)], src_data_rank=None)
        optimizer.found_inf = torch.tensor(flag)
        optimizer.step()
        kept.append(_bits(matrices, optimizer))
    first, flagged, last = kept
    assert dist.get_world_size() == size
    same = all(torch.equal(a, b) for a, b in zip(first, flagged, strict=True))
    return [same, all(torch.equal(a, b) for a, b in zip(flagged, last, strict=True))]


def test_a_flagged_step_changes_a_bit_of_a_shard() -> None:
    assert run_ranks(_sharded, 2) == [[True, False]] * 2
