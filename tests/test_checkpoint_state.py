"""Optimizer states come back bit for bit, on the parameter they belong to, or not at all."""

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from cheaptrain.checkpoint.blocks import Block, Piece, Place, deal, places_of
from cheaptrain.checkpoint.snapshot import live_blocks
from cheaptrain.checkpoint.state import load_optimizer_tensors, optimizer_tensors
from cheaptrain.checkpoint.state_files import read_tensors, stored_tensors, write_state
from cheaptrain.checkpoint.tensor_files import Entry
from cheaptrain.errors import PreflightError
from cheaptrain.train.muon import Muon

Tensors = dict[str, Tensor]
Scalars = dict[str, Any]
Build = Callable[[nn.Module], list[Optimizer]]


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


def write(folder: Path, tensors: Tensors) -> None:
    """Write tensors of one process."""
    folder.mkdir()
    blocks = live_blocks(tensors)
    write_state(folder, deal([places_of(blocks)]), blocks, rank=0)


def read(folder: Path) -> Tensors:
    """Everything in a folder."""
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored_tensors(folder).items()}
    read_tensors(folder, tensors)
    return tensors


def load(optimizers: Any, names: Any, tensors: Tensors, scalars: Scalars) -> None:
    """Put state back from tensors in memory."""

    def fill(rooms: Mapping[str, Tensor]) -> None:
        for name, room in rooms.items():
            room.copy_(tensors[name])

    stored = {name: Entry(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    load_optimizer_tensors(optimizers, names, stored, scalars, fill)


def model_of(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 16))


def adamw(model: nn.Module, fused: bool = False) -> list[Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=0.01, fused=fused)]


def fused_adamw(model: nn.Module) -> list[Optimizer]:
    return adamw(model, fused=True)


def muon_and_adamw(model: nn.Module) -> list[Optimizer]:
    hidden = [model.get_parameter("1.weight"), model.get_parameter("2.weight")]
    rest = [p for p in model.parameters() if not any(p is h for h in hidden)]
    return [Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


def names_of(model: nn.Module) -> dict[nn.Parameter, str]:
    return {parameter: name for name, parameter in model.named_parameters()}


def steps(model: nn.Module, optimizers: Iterable[Optimizer], batches: range) -> None:
    for number in batches:
        ids = torch.randint(16, (4, 5), generator=torch.Generator().manual_seed(number))
        nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("build", [adamw, fused_adamw, muon_and_adamw])
def test_training_on_from_a_checkpoint_is_bitwise_the_run_never_stopped(build: Build, tmp_path: Path) -> None:
    straight = model_of(1)
    optimizers = build(straight)
    steps(straight, optimizers, range(5))
    tensors, scalars = optimizer_tensors(optimizers, names_of(straight))
    write(tmp_path / "state", tensors)
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    steps(straight, optimizers, range(5, 10))

    resumed = model_of(2)
    resumed.load_state_dict(weights)
    again = build(resumed)
    load(again, names_of(resumed), read(tmp_path / "state"), scalars)
    steps(resumed, again, range(5, 10))

    assert {n: bits(p) for n, p in straight.named_parameters()} == {n: bits(p) for n, p in resumed.named_parameters()}
    one, two = (optimizer_tensors(o, names_of(m)) for o, m in ((optimizers, straight), (again, resumed)))
    assert {n: bits(t) for n, t in one[0].items()} == {n: bits(t) for n, t in two[0].items()}
    assert one[1] == two[1]


def test_step_counts_of_adamw_keep_value_and_kind(tmp_path: Path) -> None:
    model = model_of(1)
    optimizers = adamw(model)
    steps(model, optimizers, range(7))
    tensors, scalars = optimizer_tensors(optimizers, names_of(model))
    write(tmp_path / "state", tensors)
    fresh = model_of(1)
    again = adamw(fresh)
    load(again, names_of(fresh), read(tmp_path / "state"), scalars)
    for parameter in fresh.parameters():
        step = again[0].state[parameter]["step"]
        assert (step.item(), step.dtype, step.shape) == (7.0, torch.float32, ())


def test_moments_find_their_parameter_when_the_groups_are_put_together_in_another_order() -> None:
    model = model_of(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, [optimizer], range(3))
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.01)  # type: ignore[arg-type]
    load(other, names_of(model), *optimizer_tensors(optimizer, names_of(model)))
    for parameter in model.parameters():
        assert other.state[parameter]["exp_avg"].equal(optimizer.state[parameter]["exp_avg"])


@pytest.mark.parametrize("capturable", [False, True])
def test_moments_go_to_the_parameters_device_and_step_counts_only_where_the_optimizer_wants_them(
    capturable: bool,
) -> None:
    parameter = nn.Parameter(torch.empty(3, device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0]["capturable"] = capturable
    tensors = {f"optimizer/w/{key}": torch.zeros(() if key == "step" else 3) for key in ("step", "exp_avg")}
    entry = {"optimizer": "AdamW", "shape": [3], "tensors": ["step", "exp_avg"], "values": {}}
    load(optimizer, {parameter: "w"}, tensors, {"parameters": {"w": entry}})
    devices = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert devices == {"step": "meta" if capturable else "cpu", "exp_avg": "meta"}


def test_loaded_state_is_no_alias_of_what_it_was_loaded_from() -> None:
    model = model_of(1)
    optimizers = adamw(model)
    steps(model, optimizers, range(3))
    tensors, scalars = optimizer_tensors(optimizers, names_of(model))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    again = adamw(model)
    load(again, names_of(model), tensors, scalars)
    steps(model, again, range(3, 5))
    assert all(tensors[name].equal(kept[name]) for name in kept)


def test_an_optimizer_that_never_stepped_comes_back_empty(tmp_path: Path) -> None:
    model = model_of(1)
    tensors, scalars = optimizer_tensors(adamw(model), names_of(model))
    write(tmp_path / "state", tensors)
    again = adamw(model)
    load(again, names_of(model), read(tmp_path / "state"), scalars)
    assert len(again[0].state) == 0


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda t, s: t.pop("optimizer/1.weight/exp_avg"), "optimizer/1.weight/exp_avg: missing"),
        (lambda t, s: s["parameters"].pop("3.bias"), "3.bias: not in the checkpoint"),
        (
            lambda t, s: s["parameters"].update(extra=s["parameters"]["3.bias"]),
            "extra: in the checkpoint, not in the model",
        ),
        (
            lambda t, s: t.update({"optimizer/x/exp_avg": torch.zeros(1)}),
            "optimizer/x/exp_avg: belongs to no parameter",
        ),
        (
            lambda t, s: s["parameters"]["1.weight"].update(shape=[9, 9]),
            r"1.weight: saved of AdamW with shape \[9, 9\]",
        ),
        (lambda t, s: s["parameters"]["1.weight"].update(optimizer="Muon"), "1.weight: saved of Muon"),
    ],
)
def test_state_that_does_not_fit_is_named_and_nothing_is_loaded(damage: Callable, said: str) -> None:
    model = model_of(1)
    optimizers = adamw(model)
    steps(model, optimizers, range(2))
    tensors, scalars = optimizer_tensors(optimizers, names_of(model))
    damage(tensors, scalars)
    again = adamw(model)
    with pytest.raises(PreflightError, match=said):
        load(again, names_of(model), tensors, scalars)
    assert len(again[0].state) == 0


def test_a_parameter_of_two_optimizers_or_without_a_name_is_refused() -> None:
    model = model_of(1)
    with pytest.raises(ValueError, match="two optimizer groups"):
        optimizer_tensors([*adamw(model), *adamw(model)], names_of(model))
    with pytest.raises(ValueError, match="has no name"):
        optimizer_tensors(adamw(model), names_of(model_of(2)))


DTYPES = [
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.uint8, torch.int8, torch.int16, torch.int32,
    torch.int64, torch.bool,
]  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=3)), max_size=6), st.integers(0)
)
def test_any_tensor_survives_the_disk_bit_for_bit(kinds: list[tuple[torch.dtype, list[int]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    tensors = {}
    for number, (dtype, shape) in enumerate(kinds):
        item = torch.empty((), dtype=dtype).element_size()
        raw = rng.integers(0, 2 if dtype == torch.bool else 256, int(np.prod(shape, dtype=int)) * item, np.uint8)
        tensors[f"a.b/{number}"] = (
            torch.from_numpy(raw).view(dtype).reshape(shape) if raw.size else torch.empty(shape, dtype=dtype)
        )
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "state"), tensors)
        again = read(Path(folder, "state"))
    assert {name: bits(tensor) for name, tensor in again.items()} == {name: bits(t) for name, t in tensors.items()}


def test_transposed_and_sliced_tensors_are_saved_as_they_read(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"transposed": base.t(), "slice": base[2:4].clone()[:, 1], "parameter": nn.Parameter(torch.randn(3))}
    write(tmp_path / "state", tensors)
    again = read(tmp_path / "state")
    assert {name: bits(tensor) for name, tensor in again.items()} == {name: bits(t) for name, t in tensors.items()}


def test_a_file_of_state_that_is_missing_or_stands_twice_is_not_read_around(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(6, 2)
    for rank in (0, 1):
        place = Place(torch.float32, (6, 2), (3 * rank, 0), (3, 2))
        pieces = {"w": (Piece(rank, place),)}
        (tmp_path / "state").mkdir(exist_ok=True)
        write_state(tmp_path / "state", pieces, {"w": Block(place, whole[3 * rank : 3 * rank + 3])}, rank)
    assert read(tmp_path / "state")["w"].equal(whole)
    first, second = sorted((tmp_path / "state").iterdir())
    shutil.copy(second, tmp_path / "state" / "process-00002-00000.safetensors")
    with pytest.raises(PreflightError, match="one is there that does not belong"):
        read(tmp_path / "state")
    (tmp_path / "state" / "process-00002-00000.safetensors").unlink()
    first.unlink()
    with pytest.raises(PreflightError, match="w has 6 numbers in its files and 12"):
        read(tmp_path / "state")


def place(offsets: tuple[int, ...], sizes: tuple[int, ...], shape: tuple[int, ...] = (4, 6)) -> Place:
    return Place(torch.float32, shape, offsets, sizes)


@pytest.mark.parametrize(
    "places",
    [
        [place((0, 0), (2, 6))],  # the rest on nobody
        [place((0, 0), (2, 6)), place((2, 0), (1, 6))],
        [place((0, 0), (3, 6)), place((2, 0), (2, 6))],  # row 2 twice
        [place((0, 0), (2, 3)), place((0, 3), (2, 3)), place((2, 0), (2, 3))],
        [place((1, 0), (3, 6))],
        [place((0, 0), (4, 6)), place((0, 0), (4, 6), (4, 7))],  # not the same tensor
    ],
)
def test_blocks_that_leave_a_gap_or_overlap_are_not_saved(places: list[Place]) -> None:
    with pytest.raises(ValueError, match=r"gap or overlap|not the same tensor"):
        deal([{"w": place} for place in places])


def test_of_equal_blocks_one_is_written() -> None:
    held = [{"w": place((2 * (rank % 2), 0), (2, 6)), "step": place((), (), ())} for rank in range(4)]
    pieces = deal(held)
    assert [piece.place.offsets for piece in pieces["w"]] == [(0, 0), (2, 0)]
    assert pieces["step"] == (Piece(0, place((), (), ())),)
    assert deal(held, {"w": 3, "step": 2}.__getitem__)["w"] == (Piece(0, held[0]["w"]), Piece(3, held[1]["w"]))
