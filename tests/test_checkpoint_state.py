"""Optimizer and random states come back bit for bit, on the parameter they belong to, or not at all."""

import random
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

from cheaptrain.checkpoint.state import load_optimizer_tensors, optimizer_tensors, restore_rng, rng_tensors
from cheaptrain.checkpoint.state_files import read_state, write_state
from cheaptrain.errors import PreflightError

Build = Callable[[nn.Module], list[Optimizer]]


def bits(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    return (
        tensor.dtype,
        tuple(tensor.shape),
        tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
    )


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
    return [torch.optim.Muon(hidden, lr=0.02), torch.optim.AdamW(rest, lr=0.01)]


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
    write_state(tmp_path / "state", *optimizer_tensors(optimizers, names_of(straight)))
    weights = {name: value.clone() for name, value in straight.state_dict().items()}
    steps(straight, optimizers, range(5, 10))

    resumed = model_of(2)
    resumed.load_state_dict(weights)
    again = build(resumed)
    load_optimizer_tensors(again, names_of(resumed), *read_state(tmp_path / "state"))
    steps(resumed, again, range(5, 10))

    assert {n: bits(p) for n, p in straight.named_parameters()} == {n: bits(p) for n, p in resumed.named_parameters()}
    one, two = (optimizer_tensors(o, names_of(m)) for o, m in ((optimizers, straight), (again, resumed)))
    assert {n: bits(t) for n, t in one[0].items()} == {n: bits(t) for n, t in two[0].items()}
    assert one[1] == two[1]


def test_step_counts_of_adamw_keep_value_and_kind(tmp_path: Path) -> None:
    model = model_of(1)
    optimizers = adamw(model)
    steps(model, optimizers, range(7))
    write_state(tmp_path / "state", *optimizer_tensors(optimizers, names_of(model)))
    tensors, scalars = read_state(tmp_path / "state")
    fresh = model_of(1)
    again = adamw(fresh)
    load_optimizer_tensors(again, names_of(fresh), tensors, scalars)
    for parameter in fresh.parameters():
        step = again[0].state[parameter]["step"]
        assert (step.item(), step.dtype, step.shape) == (7.0, torch.float32, ())


def test_moments_find_their_parameter_when_the_groups_are_put_together_in_another_order() -> None:
    model = model_of(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    steps(model, [optimizer], range(3))
    other = torch.optim.AdamW(reversed(list(model.parameters())), lr=0.01)  # type: ignore[arg-type]
    load_optimizer_tensors(other, names_of(model), *optimizer_tensors(optimizer, names_of(model)))
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
    load_optimizer_tensors(optimizer, {parameter: "w"}, tensors, {"parameters": {"w": entry}})
    devices = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert devices == {"step": "meta" if capturable else "cpu", "exp_avg": "meta"}


def test_loaded_state_is_no_alias_of_what_it_was_loaded_from() -> None:
    model = model_of(1)
    optimizers = adamw(model)
    steps(model, optimizers, range(3))
    tensors, scalars = optimizer_tensors(optimizers, names_of(model))
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    again = adamw(model)
    load_optimizer_tensors(again, names_of(model), tensors, scalars)
    steps(model, again, range(3, 5))
    assert all(tensors[name].equal(kept[name]) for name in kept)


def test_an_optimizer_that_never_stepped_comes_back_empty(tmp_path: Path) -> None:
    model = model_of(1)
    write_state(tmp_path / "state", *optimizer_tensors(adamw(model), names_of(model)))
    again = adamw(model)
    load_optimizer_tensors(again, names_of(model), *read_state(tmp_path / "state"))
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
        load_optimizer_tensors(again, names_of(model), tensors, scalars)
    assert len(again[0].state) == 0


def test_a_parameter_of_two_optimizers_or_without_a_name_is_refused() -> None:
    model = model_of(1)
    with pytest.raises(ValueError, match="two optimizer groups"):
        optimizer_tensors([*adamw(model), *adamw(model)], names_of(model))
    with pytest.raises(ValueError, match="has no name"):
        optimizer_tensors(adamw(model), names_of(model_of(2)))


def draws() -> list[object]:
    return [
        *(random.random() for _ in range(3)), random.gauss(0, 1), random.getrandbits(200),
        *np.random.random(3).tolist(), float(np.random.standard_normal()), int(np.random.randint(1 << 30)),
        torch.rand(5).tolist(), torch.randn(3).tolist(),
    ]  # fmt: skip


@pytest.mark.parametrize("gauss_drawn", [0, 1])
def test_every_random_stream_goes_on_where_it_was(gauss_drawn: int, tmp_path: Path) -> None:
    random.seed(3), np.random.seed(4), torch.manual_seed(5)
    draws()
    for _ in range(gauss_drawn):  # leaves the second half of a pair waiting in both generators
        random.gauss(0, 1), np.random.standard_normal()
    write_state(tmp_path / "state", rng_tensors(), {})
    expected = draws()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    tensors, _ = read_state(tmp_path / "state")
    assert restore_rng(tensors) == []
    assert draws() == expected


def test_a_random_state_that_is_missing_or_finds_no_place_is_named() -> None:
    state = rng_tensors()
    if not torch.cuda.is_available():
        assert restore_rng(state | {"rng/cuda": torch.zeros(16, dtype=torch.uint8)}) == ["rng/cuda"]
    del state["rng/numpy"]
    with pytest.raises(PreflightError, match="rng/numpy"):
        restore_rng(state)


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
        write_state(Path(folder, "state"), tensors, {"x": 0.1})
        read, scalars = read_state(Path(folder, "state"))
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in tensors.items()}
    assert scalars == {"x": 0.1}


def test_transposed_and_sliced_tensors_are_saved_as_they_read(tmp_path: Path) -> None:
    base = torch.randn(6, 4)
    tensors = {"transposed": base.t(), "slice": base[2:4].clone()[:, 1], "parameter": nn.Parameter(torch.randn(3))}
    write_state(tmp_path / "state", tensors, {})
    read, _ = read_state(tmp_path / "state")
    assert {name: bits(tensor) for name, tensor in read.items()} == {name: bits(t) for name, t in tensors.items()}


def test_a_number_json_cannot_hold_is_not_written_as_another(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_state(tmp_path / "state", {}, {"loss": float("nan")})
