"""The norm of all gradients must be the same number on every layout and on every process."""

import math

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

from cheaptrain.parallel.clip import clip_grad_norm
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.recipe.layout import Layout

SHAPES = [(16, 12), (7, 5), (1, 9), (33,), (4, 4)]


def _grads() -> list[Tensor]:
    generator = torch.Generator().manual_seed(11)
    return [torch.randn(shape, generator=generator) * 10.0**i for i, shape in enumerate(SHAPES)]


def _parameter(grad: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(grad))
    parameter.grad = grad
    return parameter


@pytest.mark.parametrize("max_norm", [0.5, 1e9, 0.0, -1.0])
def test_plain_gradients_are_clipped_to_other_bits_than_torch_clips_them(max_norm: float) -> None:
    ours, theirs = ([*map(_parameter, _grads()), nn.Parameter(torch.zeros(3))] for _ in range(2))
    reference = torch.nn.utils.clip_grad_norm_(theirs, max_norm if max_norm > 0 else math.inf, foreach=True)
    norm = clip_grad_norm(iter(ours), max_norm)
    assert torch.equal(norm, reference) and norm.dtype == torch.float32 and norm.dim() == 0
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.grad is None) == (other.grad is None)
        assert mine.grad is None or other.grad is None or torch.equal(mine.grad, other.grad)


def test_no_gradient_at_all_has_no_norm() -> None:
    assert clip_grad_norm([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0


def _mixed(mesh: DeviceMesh) -> list[tuple[DeviceMesh | None, list[Placement]]]:
    """One way to lie for each of SHAPES: FSDP x TP, HSDP with an empty shard, TP, on every process, plain."""
    both, all_three, tp = mesh["dp_shard", "tp"], mesh["dp_replicate", "dp_shard", "tp"], mesh["tp"]
    return [
        (all_three, [Replicate(), Shard(0), Shard(1)]),
        (mesh["dp_replicate", "dp_shard"], [Replicate(), Shard(0)]),
        (both, [Shard(0), Replicate()]),
        (tp, [Replicate()]),
        (None, []),
    ]


def _lay_out(grads: list[Tensor], mesh: DeviceMesh) -> list[nn.Parameter]:
    return [
        _parameter(grad if over is None else distribute_tensor(grad, over, placements, src_data_rank=None))
        for grad, (over, placements) in zip(grads, _mixed(mesh), strict=True)
    ]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _measure_and_clip(rank: int, size: int, layout: Layout) -> tuple[float, float, list[Tensor], int]:
    mesh = make_mesh(layout, "cpu")
    parameters = _lay_out(_grads(), mesh)
    with CommDebugMode() as communication:
        measured = clip_grad_norm(parameters, 0.0)
    sent = communication.get_total_counts()
    norm = clip_grad_norm(parameters, 0.5)
    assert norm.dtype == torch.float32 and norm.dim() == 0
    return measured.item(), norm.item(), [_whole(p.grad) for p in parameters if p.grad is not None], sent


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=2),
        Layout(dp_shard=3),
        Layout(tp=2),
        Layout(dp_shard=2, tp=2),
        Layout(dp_replicate=2, dp_shard=2),
        Layout(dp_replicate=2, dp_shard=2, tp=2),
    ],
    ids=str,
)
def test_a_gradient_is_counted_twice_or_not_at_all_on_a_mixed_layout(layout: Layout) -> None:
    grads = _grads()
    exact = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    results = run_ranks(_measure_and_clip, layout.world_size, layout)
    assert len({norm for norm, *_ in results}) == 1, "processes disagree"
    for measured, norm, clipped, sent in results:
        assert measured == norm == pytest.approx(exact, rel=3e-7)  # fp32 norms of the pieces
        assert sent == 1, "one message for all meshes together"
        for mine, grad in zip(clipped, grads, strict=True):
            torch.testing.assert_close(mine, grad * (0.5 / (exact + 1e-6)), rtol=1e-6, atol=0)


def _spoil_one(rank: int, size: int, index: int, value: float) -> float:
    mesh = make_mesh(Layout(dp_shard=2, tp=2), "cpu")
    parameters = _lay_out(_grads(), mesh)
    if rank == 2:
        grad = parameters[index].grad
        assert grad is not None
        (grad.to_local() if isinstance(grad, DTensor) else grad).view(-1)[0] = value
    return clip_grad_norm(parameters, 1.0).item()


@pytest.mark.parametrize(("index", "value"), [(0, math.nan), (0, math.inf), (3, math.nan), (4, -math.inf)])
def test_one_process_steps_on_because_the_nan_is_another_ones(index: int, value: float) -> None:
    norms = run_ranks(_spoil_one, 4, index, value)
    assert not any(math.isfinite(norm) for norm in norms), norms


def _half_summed(rank: int, size: int) -> tuple[float, Tensor]:
    mesh = make_mesh(Layout(tp=2), "cpu")["tp"]
    grad = torch.tensor([[3.0, -4.0]]) if rank == 0 else torch.tensor([[0.0, 16.0]])
    parameter = nn.Parameter(DTensor.from_local(torch.zeros(1, 2), mesh, [Replicate()], run_check=False))
    parameter.grad = DTensor.from_local(grad, mesh, [Partial()], run_check=False)
    return clip_grad_norm([parameter], 0.0).item(), parameter.grad.full_tensor()


def test_the_norm_of_an_unfinished_sum_is_that_of_its_terms() -> None:
    for norm, grad in run_ranks(_half_summed, 2):
        assert grad.tolist() == [[3.0, 12.0]]
        assert norm == pytest.approx(math.sqrt(153.0), rel=1e-6)


def _large(rank: int, size: int) -> tuple[float, float]:
    mesh = make_mesh(Layout(dp_shard=2), "cpu")["dp_shard"]
    parameter = _parameter(distribute_tensor(torch.full((2, 1), 3e30), mesh, [Shard(0)], src_data_rank=None))
    norm = clip_grad_norm([parameter], 1.0)
    return norm.item(), _whole(parameter.grad)[0, 0].item()  # type: ignore[arg-type]


def test_a_large_norm_overflows_when_it_is_squared() -> None:
    for norm, clipped in run_ranks(_large, 2):
        assert norm == pytest.approx(3e30 * math.sqrt(2), rel=1e-6)
        assert clipped == pytest.approx(1 / math.sqrt(2), rel=1e-6)
