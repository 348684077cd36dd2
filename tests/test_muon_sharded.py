"""Muon over sharded matrices must be Muon: an orthogonalised shard is not a shard of the orthogonalised matrix.

Where the gradients are sums that fp32 holds exactly (small whole numbers), a sharded update must have every bit of
torch's on one process: what is gathered is the same bf16 matrix, and the same process works on the whole of it. Where
gradients are real sums, another order of adding changes their last bit, some of these flip a rounding to bf16 (1 part
in 256 of an element), and the updates agree to about that.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from model_helpers import build
from ranks import run_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from transformers import PreTrainedModel

from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.parts import decoder, head
from cheaptrain.parallel.clip import clip_grad_norm
from cheaptrain.parallel.matrices import whole_matrices
from cheaptrain.parallel.mesh import data_rank, make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.vectors import sum_vector_gradients
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Train
from cheaptrain.train import muon
from cheaptrain.train.muon import Muon
from cheaptrain.train.optim import build_optimizers

# [rows, columns]: wide, tall, square, neither divisible, fewer rows than processes.
SHAPES = {"wide": (24, 72), "tall": (66, 18), "square": (40, 40), "odd": (10, 7), "short": (2, 14)}
SETTINGS: dict[str, Any] = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
STEPS = 3
LAYOUTS = [
    Layout(dp_shard=2),
    Layout(dp_shard=3),
    Layout(dp_replicate=2, dp_shard=2),
    Layout(tp=2),
    Layout(dp_shard=2, tp=2),
    Layout(dp_shard=3, tp=2),
    Layout(dp_shard=2, cp=2, tp=2),
    Layout(dp_replicate=2, dp_shard=2, tp=2),
]


class Parallel(nn.Module):
    """One linear map for each of SHAPES, each with an input of its own; a loss whose gradients are whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.maps = nn.ModuleDict({name: nn.Linear(n, m, bias=False) for name, (m, n) in SHAPES.items()})

    def forward(self, step: int, rows: slice) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        loss = torch.zeros(())
        for name, (m, n) in SHAPES.items():
            inputs = torch.randint(-3, 4, (12, n), generator=generator).float()[rows]
            wanted = torch.randint(-3, 4, (12, m), generator=generator).float()[rows]
            loss = loss + (self.maps[name](inputs) * wanted).sum()
        return loss


def _reference() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights and momentum after STEPS of torch's own Muon on one process."""
    model = Parallel()
    optimizer = torch.optim.Muon(model.parameters(), **SETTINGS)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(step, slice(None)).backward()
        optimizer.step()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    momenta = {name: optimizer.state[p]["momentum_buffer"] for name, p in model.named_parameters()}
    return weights, momenta


def _sharded(model: Parallel, mesh: DeviceMesh) -> None:
    """As `parallelize` does it for transformers models: tall by its inputs over tp, the others by their outputs."""
    if mesh["tp"].size() > 1:
        plan = {
            f"maps.{name}": RowwiseParallel(input_layouts=Replicate())
            if name == "tall"
            else ColwiseParallel(output_layouts=Replicate())
            for name in SHAPES
        }
        parallelize_module(model, mesh["tp"], plan)  # type: ignore[arg-type]
    shard = "dp_shard"
    if mesh["cp"].size() > 1:
        shard = "dp_shard_cp"
        mesh["dp_shard", "cp"]._flatten(shard)
    over = mesh["dp_replicate", shard] if mesh["dp_replicate"].size() > 1 else mesh[shard]
    if over.size() > 1:
        for layer in model.maps.values():
            fully_shard(layer, mesh=over)
        fully_shard(model, mesh=over)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _own_piece(whole: Tensor, name: str, mesh: DeviceMesh) -> Tensor:
    """What this process should hold: first split over tp, then over the processes that share it."""
    by = 1 if "tall" in name else 0
    split = whole.tensor_split(mesh["tp"].size(), dim=by)[mesh["tp"].get_local_rank()]
    shards = mesh["dp_shard"].size() * mesh["cp"].size()
    chunks = split.chunk(shards)
    at = mesh["dp_shard"].get_local_rank() * mesh["cp"].size() + mesh["cp"].get_local_rank()
    return chunks[at] if at < len(chunks) else split[:0]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _train_sharded(rank: int, size: int, layout: Layout) -> tuple[list[str], list[str]]:
    mesh = make_mesh(layout, "cpu")
    model = Parallel()
    _sharded(model, mesh)
    optimizer = Muon(model.parameters(), **SETTINGS)
    share = 12 // (layout.data_parallel * layout.cp)  # here processes along cp read rows of their own as well
    at = (data_rank(mesh) * layout.cp + mesh["cp"].get_local_rank()) * share
    for step in range(STEPS):
        optimizer.zero_grad()
        model(step, slice(at, at + share)).backward()
        optimizer.step()
    weights, momenta = _reference()
    wrong = []
    for name, parameter in model.named_parameters():
        assert list(optimizer.state[parameter]) == ["momentum_buffer"]
        kept = optimizer.state[parameter]["momentum_buffer"]
        assert isinstance(parameter, DTensor) and kept.placements == parameter.placements
        for what, ours, whole in (("weight", parameter.detach(), weights[name]), ("momentum", kept, momenta[name])):
            if not torch.equal(_local(ours), _own_piece(whole, name, mesh)):
                wrong.append(f"{what} of {name}, {list(parameter.shape)} over {parameter.placements}")
    return wrong, [type(p).__name__ for p in model.maps["odd"].weight.placements]  # type: ignore[union-attr]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_sharding_changes_a_bit_of_the_update(layout: Layout) -> None:
    results = run_ranks(_train_sharded, layout.world_size, layout)
    assert [wrong for wrong, _ in results] == [[]] * layout.world_size
    if layout.tp > 1 and layout.dp_shard > 1:
        assert all("_StridedShard" in placements for _, placements in results), "the case this is for is not here"


def _matrices() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter(torch.randn(shape, generator=generator)) for shape in [*SHAPES.values(), (129, 65), (1, 5), (5, 1)]
    ]


def _groups(matrices: list[nn.Parameter]) -> list[dict[str, Any]]:
    return [{"params": matrices[:3]}, {"params": matrices[3:], "weight_decay": 0.0}]


def test_plain_matrices_are_updated_to_other_bits_than_torchs() -> None:
    ours, theirs = _matrices(), _matrices()
    one, other = Muon(_groups(ours), **SETTINGS), torch.optim.Muon(_groups(theirs), **SETTINGS)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for mine, its in zip(ours, theirs, strict=True):
            grad = torch.randn(mine.shape, generator=generator) * 10.0 ** (step - 2)
            mine.grad, its.grad = grad, grad.clone()
        if step == 2:
            ours[1].grad = theirs[1].grad = None
        for optimizer in (one, other):
            for group in optimizer.param_groups:
                group["lr"] = 0.05 / (step + 1)
            optimizer.step()
        for mine, its in zip(ours, theirs, strict=True):
            assert torch.equal(mine, its), (step, mine.shape)
            assert one.state[mine].keys() == other.state[its].keys() == {"momentum_buffer"}
            assert torch.equal(one.state[mine]["momentum_buffer"], other.state[its]["momentum_buffer"])


def test_a_vector_is_accepted() -> None:
    with pytest.raises(ValueError, match=r"not a tensor of shape \[3\]"):
        Muon([nn.Parameter(torch.ones(3))])


def _placed(whole: Tensor, mesh: DeviceMesh, placements: list[Placement]) -> DTensor:
    spread = DTensor.from_local(whole.clone(), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return spread.redistribute(placements=placements)


CASES: list[list[Placement]] = [
    [_StridedShard(0, split_factor=2), Shard(0)],  # FSDP over TP by outputs
    [Shard(0), Shard(1)],  # FSDP over TP by inputs
    [Shard(1), Shard(0)],
    [Shard(0), Shard(0)],
    [Shard(1), Replicate()],
    [Replicate(), Replicate()],
    [Replicate(), _StridedShard(0, split_factor=2)],  # nobody makes these; all gather the whole
    [Shard(0), _StridedShard(0, split_factor=3)],
]


def _assemble(rank: int, size: int, stack_bytes: int) -> list[str]:
    mesh = make_mesh(Layout(dp_shard=2, tp=2), "cpu")["dp_shard", "tp"]
    cases = [*CASES, *CASES[:5], *CASES[:5]]
    shapes = [(12, 10) if i < len(CASES) else (8, 6) if i % 2 else (9, 11) for i in range(len(cases))]
    wholes = [torch.arange(m * n).view(m, n) * (i + 1) for i, (m, n) in enumerate(shapes)]
    spread = [_placed(whole, mesh, case) for whole, case in zip(wholes, cases, strict=True)]
    asked: list[int] = []

    def pieces(numbers: Sequence[int]) -> list[Tensor]:
        asked.extend(numbers)
        return [_local(spread[i]).clone() for i in numbers]

    def work(stack: Tensor) -> Tensor:
        return stack.cumsum(1).cumsum(2)

    results: dict[int, Tensor] = {}
    for numbers, parts in whole_matrices(spread, pieces, work, stack_bytes=stack_bytes):
        results |= zip(numbers, parts, strict=True)
    assert sorted(asked) == sorted(results) == list(range(len(cases)))
    return [
        f"{shapes[i]} {cases[i]}"
        for i, result in results.items()
        if not torch.equal(result, _local(_placed(wholes[i].cumsum(0).cumsum(1), mesh, cases[i])))
    ]


@pytest.mark.parametrize("stack_bytes", [1, 600, 1 << 20])
def test_a_whole_matrix_has_its_rows_in_another_order(stack_bytes: int) -> None:
    """Orthogonalising forgives that, up to rounding; sums along the rows and columns do not. One matrix at a time, a
    few of several shapes, and all in one round."""
    assert run_ranks(_assemble, 4, stack_bytes) == [[]] * 4


def _odd_placements(rank: int, size: int) -> list[str]:
    mesh = make_mesh(Layout(dp_shard=2, tp=2), "cpu")["dp_shard", "tp"]
    torch.manual_seed(3)
    wholes = [torch.randn(12, 10) for _ in CASES]
    grads = [torch.randn(12, 10) for _ in CASES]
    plain = [nn.Parameter(whole.clone()) for whole in wholes]
    spread = [nn.Parameter(_placed(whole, mesh, case)) for whole, case in zip(wholes, CASES, strict=True)]
    for parameter, grad in zip(plain, grads, strict=True):
        parameter.grad = grad
    for parameter, grad, case in zip(spread, grads, CASES, strict=True):
        parameter.grad = _placed(grad, mesh, case)
    # A gradient that is still to be summed: all of it comes from one process.
    half = DTensor.from_local(grads[0] * (rank % 2), mesh, [Replicate(), Partial()], run_check=False)
    spread[0].grad = half
    theirs, ours = torch.optim.Muon(plain, **SETTINGS), Muon(spread, **SETTINGS)
    theirs.step()
    ours.step()
    return [
        str(case)
        for case, parameter, other in zip(CASES, spread, plain, strict=True)
        if not torch.equal(_local(parameter.detach()), _local(_placed(other.detach(), mesh, case)))
    ]


def test_a_placement_that_training_does_not_make_is_updated_as_something_else() -> None:
    assert run_ranks(_odd_placements, 4) == [[]] * 4


def _count_work(rank: int, size: int) -> tuple[list[list[int]], int, int, Counter[str]]:
    mesh = make_mesh(Layout(dp_shard=size), "cpu")["dp_shard"]
    parameters = []
    for i in range(2 * size):
        whole = torch.randn(32, 16, generator=torch.Generator().manual_seed(i))
        parameters.append(nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)))
        parameters[-1].grad = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    made, orthogonalise = [], muon.orthogonalise
    sent, exchange = [], dist.all_to_all_single

    def counted(matrices: Tensor) -> Tensor:
        made.append(list(matrices.shape))
        return orthogonalise(matrices)

    def weighed(output: Tensor, source: Tensor, **splits: Any) -> None:
        sent.append((source.numel() * source.element_size(), output.numel() * output.element_size()))
        exchange(output, source, **splits)

    with pytest.MonkeyPatch.context() as patch, CommDebugMode() as communication:
        patch.setattr(muon, "orthogonalise", counted)
        patch.setattr(dist, "all_to_all_single", weighed)
        Muon(parameters).step()
    calls = Counter({str(op).rpartition(".")[2]: n for op, n in communication.get_comm_counts().items()})
    return made, sum(out for out, _ in sent), sum(into for _, into in sent), calls


def test_every_process_gathers_the_whole_model() -> None:
    """8 matrices of 1 KiB (bf16) over 4 processes: 2 are worked on by each, which sends and gets 4 KiB, half of all."""
    for made, sent, received, calls in run_ranks(_count_work, 4):
        assert made == [[2, 32, 16]]
        # Once the pieces of all 8 (a quarter each), once the results of the own 2.
        assert sent == received == 8 * 1024 // 4 + 2 * 1024
        assert set(calls) == {"alltoall_base_"} and sum(calls.values()) == 2, calls


def _loss(model: PreTrainedModel, ids: Tensor) -> Tensor:
    inputs = attention_inputs(torch.zeros_like(ids, dtype=torch.int32), document_mask=True)
    hidden = decoder(model)(input_ids=ids, position_ids=torch.arange(24).expand_as(ids), **inputs).last_hidden_state
    logits = head(model)(hidden)[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")


def _train_model(rank: int, size: int, layout: Layout) -> tuple[list[float], list[float], dict[str, Tensor]]:
    if not dist.is_initialized() and size == 1:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = make_mesh(layout, "cpu")
    model = build("tiny-qwen3")
    root = parallelize(model, mesh)
    settings = {"steps": 1, "global_batch_tokens": 64, "lr": 3e-3, "optimizer": "muon", "weight_decay": 0.1}
    optimizers = build_optimizers(model, Train.model_validate(settings))
    assert [type(optimizer).__name__ for optimizer in optimizers] == ["Muon", "AdamW"]
    losses, norms = [], []
    for step in range(4):
        ids = torch.randint(0, 500, (12, 24), generator=torch.Generator().manual_seed(step % 2))
        share = 12 // layout.data_parallel
        loss = root(_loss, ids[data_rank(mesh) * share :][:share]) / (12 * 23)
        loss.backward()
        sum_vector_gradients(root, mesh)
        parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
        norms.append(clip_grad_norm(parameters, 1.0).item())
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        total = loss.detach().clone()
        dist.all_reduce(total)
        losses.append(total.item() / layout.tp)
    whole = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return losses, norms, {name: tensor.detach().clone() for name, tensor in whole.items()}


@pytest.fixture(scope="module")
def one_process() -> tuple[list[float], list[float], dict[str, Tensor]]:
    outcome: tuple[list[float], list[float], dict[str, Tensor]] = run_ranks(_train_model, 1, Layout())[0]
    return outcome


@pytest.mark.parametrize("layout", [LAYOUTS[i] for i in (0, 1, 2, 3, 4)], ids=str)
def test_a_model_learns_otherwise_on_several_processes(
    layout: Layout, one_process: tuple[list[float], list[float], dict[str, Tensor]]
) -> None:
    losses, norms, weights = one_process
    start = dict(build("tiny-qwen3").named_parameters())
    for ours, our_norms, our_weights in run_ranks(_train_model, layout.world_size, layout):
        astray = {n: ((our_weights[n] - w).norm() / (w - start[n]).norm()).item() for n, w in weights.items()}
        assert ours == pytest.approx(losses, abs=3e-4)
        assert our_norms == pytest.approx(norms, rel=1e-3)
        # Of the way that it went, each weight is off by 1.4 % at most; orthogonalised shards were off by 60 %.
        assert max(astray.values()) < 0.04, astray
