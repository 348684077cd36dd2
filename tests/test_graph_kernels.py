"""Layers whose norms, rotations and gates run as operators: the same numbers, and really those operators."""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cheaptrain_kernels.rms_norm
import cheaptrain_kernels.rope
import cheaptrain_kernels.swiglu  # noqa: F401
import pytest
import torch
from cheaptrain_kernels import use_backend
from functorch.compile import make_boxed_func
from model_helpers import LAYOUTS, build, packed_logits, tokens
from test_layer_kernels import needs_triton
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from cheaptrain.model import compiled
from cheaptrain.model.compiled import compile_counts, compile_layers
from cheaptrain.model.compiled.layer_kernels import Found, LayerKernels, use_kernels
from cheaptrain.model.parts import decoder_layers

OPERATORS = LayerKernels(
    torch.ops.cheaptrain.rms_norm.default, torch.ops.cheaptrain.rope.default, torch.ops.cheaptrain.swiglu.default
)
WHOLE = Found(norms=2, sums=1, rotations=2, gates=1)
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path: Path) -> Iterator[None]:
    from torch._dynamo import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(compiled, "lower", torch._dynamo.lookup_backend("aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def _model(preset: str) -> PreTrainedModel:
    """With gains that differ: of ones, nobody would see one taken for another."""
    model = build(preset)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5)
    return model


def _compiled(model: nn.Module, layers: Any = None) -> list[Found]:
    found: list[Found] = []

    def with_kernels(module: fx.GraphModule) -> None:
        found.append(use_kernels(module, OPERATORS))

    compile_layers(decoder_layers(model) if layers is None else layers, passes=(with_kernels,))
    return found


def _compare(preset: str, layouts: list[list[int]], half: bool) -> None:
    plain, other, ids = _model(preset), _model(preset), tokens(layouts)
    found = _compiled(other)
    for model in (plain, other):
        with torch.autocast("cpu", HALF, enabled=half):
            model.last = packed_logits(model, ids, layouts).float()
        model.last.square().sum().backward()
    assert found == [WHOLE]
    assert (plain.last - other.last).abs().max() <= (0.02 if half else 1e-5) * plain.last.abs().max()
    for (name, p), q in zip(plain.named_parameters(), other.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= (0.04 if half else 1e-5) * p.grad.abs().max(), name


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("layouts", [LAYOUTS, [[32]] * 3], ids=["packed", "causal"])
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-llama4"])
def test_operators_give_the_outputs_and_gradients_of_the_plain_layers(
    preset: str, layouts: list[list[int]], half: bool
) -> None:
    _compare(preset, layouts, half)


@needs_triton
@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama4"])
def test_the_kernels_themselves_take_what_the_graph_hands_them(preset: str) -> None:
    """Slices of a merged projection, say, whose heads do not lie where those of a tensor of their own would."""
    with use_backend("triton"):
        _compare(preset, [[5, 3]], half=False)


def _is_plain(name: str) -> bool:
    return any(part in name for part in ("rsqrt", "neg", "silu", "sigmoid", "flip"))


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama4"])
def test_operators_are_in_both_passes_and_nothing_of_what_they_replace(preset: str, monkeypatch) -> None:
    passes: list[Counter[str]] = []
    dtypes: set[torch.dtype] = set()

    def count(module: fx.GraphModule, _: Any) -> Any:
        passes.append(Counter(str(node.target) for node in module.graph.nodes if node.op == "call_function"))
        for node in module.graph.nodes:
            if node.target is OPERATORS.rms_norm:
                dtypes.add(node.meta["val"][0].dtype)
        return make_boxed_func(module.forward)

    monkeypatch.setattr(compiled, "lower", aot_autograd(fw_compiler=count, bw_compiler=count))
    model = _model(preset)
    _compiled(model)
    with torch.autocast("cpu", HALF):
        packed_logits(model, tokens()).sum().backward()
    forward, backward = passes
    for name, times in (("rms_norm", 2), ("rope", 2), ("swiglu", 1)):
        assert forward[f"cheaptrain.{name}.default"] == backward[f"cheaptrain.{name}_backward.default"] == times
    assert not [name for name in (*forward, *backward) if _is_plain(name)]
    assert dtypes == {HALF}  # written once, as the products read it


class _Odd(nn.Module):
    """What looks like a norm or a gate."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.gain = kind, nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.gate, self.up = nn.Linear(6, 8), nn.Linear(6, 8 if kind != "halves of two sizes" else 1)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind in ("the other half is the gate", "halves of two sizes"):
            gate, up = self.gate(x), self.up(x)
            return F.silu(up) * gate
        if self.kind == "one sum, two norms":
            total = x + x.flip(-1)
            return self._norm(total) + self._norm(total).square() + total
        if self.kind == "norm of a norm":
            return self._norm(self._norm(x))
        if self.kind == "read twice":
            normed = self._norm(x + 1)
            return self.gate(normed).sum(-1, keepdim=True) + normed
        if self.kind == "written to":
            return self._norm(x).mul_(2)
        return self._norm(x)

    def _norm(self, x: Tensor) -> Tensor:
        power = 4 if self.kind == "another power" else 2
        dim = 1 if self.kind == "another dimension" else -1
        unit = x * torch.rsqrt(x.pow(power).mean(dim, keepdim=True) + 1e-5)
        return unit * (self.gain[0] if self.kind == "one gain for all" else self.gain)


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("plain", Found(norms=1)),
        ("another power", Found()),
        ("another dimension", Found()),
        ("one gain for all", Found()),
        ("written to", Found()),
        ("the other half is the gate", Found()),
        ("halves of two sizes", Found()),
        ("one sum, two norms", Found(norms=2, sums=2)),
        ("norm of a norm", Found(norms=2)),
        ("read twice", Found(norms=1)),
    ],
)
def test_what_only_looks_alike_stays_and_what_is_found_is_right(kind: str, found: Found) -> None:
    torch.manual_seed(1)
    plain, other = _Odd(kind), _Odd(kind)
    other.load_state_dict(plain.state_dict())
    said = _compiled(other, [other])
    x = torch.randn(2, 5, 6, requires_grad=True)
    # Under autocast products read bf16, and what else reads the same norm does not.
    with torch.autocast("cpu", HALF, enabled=kind == "read twice"):
        outputs = [module(x) for module in (plain, other)]
    gradients = [torch.autograd.grad(output.square().sum(), (x, module.gain), allow_unused=True)
                 for module, output in zip((plain, other), outputs, strict=True)]  # fmt: skip
    assert said == [found]
    torch.testing.assert_close(*outputs)
    for p, q in zip(*gradients, strict=True):
        assert (p is None) == (q is None)
        if p is not None:
            torch.testing.assert_close(p, q)


def test_the_choice_of_attention_is_not_taken_for_dead_code() -> None:
    """Its nodes have no users; without them SDPA runs what it picks by itself."""
    chosen: list[int] = []

    def choices(module: fx.GraphModule) -> None:
        chosen.append(sum("sdpa_kernel" in str(node.target) for node in module.graph.nodes))

    class Chosen(_Odd):
        def forward(self, x: Tensor) -> Tensor:
            normed = self._norm(x)[:, None]
            with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
                return F.scaled_dot_product_attention(normed, normed, normed, is_causal=True)

    module = Chosen("plain")
    passes = choices, lambda graph: use_kernels(graph, OPERATORS), choices
    compile_layers([module], passes=passes)
    module(torch.randn(2, 5, 6))
    assert chosen[0] > 0 and chosen[0] == chosen[1]


@pytest.mark.slow
def test_a_second_start_finds_the_graphs_with_operators_on_disk(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "lower", torch._dynamo.lookup_backend("inductor"))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        before, model = compile_counts(), _model("tiny-qwen3")
        _compiled(model)
        packed_logits(model, tokens()).sum().backward()
        after = compile_counts()
        found.append((after.graphs - before.graphs, after.from_cache - before.from_cache))
    assert found == [(1, 0), (1, 1)]
