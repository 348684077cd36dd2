"""Compiled layers: the same numbers, fewer products, one graph for all layers, and never a silent fallback."""

import copy
import functools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from model_helpers import LAYOUTS, build, packed_logits, positions_and_documents, tokens
from ranks import run_ranks
from test_parallel_parity import _global_batch, _mine
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from cheaptrain.errors import CheaptrainError
from cheaptrain.model import attention, compiled
from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.attention import kernels as attention_kernels
from cheaptrain.model.attention.packing import packing_of
from cheaptrain.model.compiled import compile_counts, compile_layers, use_compile_cache
from cheaptrain.model.compiled.merging import merge_linears
from cheaptrain.model.parts import decoder, decoder_layers
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Model
from cheaptrain.train.objective import OBJECTIVES, Compute

aot_eager = torch._dynamo.lookup_backend("aot_eager")  # as right or wrong as inductor, and fast


@pytest.fixture(autouse=True)
def _fresh(monkeypatch, tmp_path: Path) -> Iterator[None]:
    from torch._dynamo import config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setattr(compiled, "lower", aot_eager)
    torch._dynamo.reset()
    counters.clear()
    with config.patch(recompile_limit=config.recompile_limit, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def _graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(
    ("preset", "saved"), [("tiny-qwen3", 3), ("tiny-llama", 3), ("tiny-llama4", 3), ("tiny-gpt2", 0)]
)
def test_merged_products_give_the_same_outputs_and_gradients(preset: str, saved: int, half: bool, monkeypatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(compiled, "merge_linears", lambda module: found.append(merge_linears(module)))
    plain, merged, ids = build(preset), build(preset), tokens()
    compile_layers(decoder_layers(merged))
    for model in (plain, merged):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            model.last = packed_logits(model, ids).float()
        model.last.square().sum().backward()
    assert found == [saved]  # gate and up; query, key and value
    assert (plain.last - merged.last).abs().max() <= (0.02 if half else 1e-5) * plain.last.abs().max()
    for p, q in zip(plain.parameters(), merged.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= (0.03 if half else 1e-5) * p.grad.abs().max()


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama4"])
def test_a_merged_layer_that_is_recomputed_saves_something_else_the_second_time(preset: str) -> None:
    """The first forward pass is the one that compiles, inside of what is to be run again."""
    plain, merged, ids = build(preset), build(preset), tokens()
    compile_layers(decoder_layers(merged))
    for layer in decoder_layers(merged):
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    for model in (plain, merged):
        packed_logits(model, ids).square().sum().backward()
    for p, q in zip(plain.parameters(), merged.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * p.grad.abs().max()


@pytest.mark.parametrize("merge", [False, True])
def test_products_are_really_fewer_in_both_passes(merge: bool, monkeypatch) -> None:
    products: list[int] = []

    def count(module: fx.GraphModule, _: Any) -> Any:
        names = [str(node.target) for node in module.graph.nodes]
        products.append(sum(name in ("aten.mm.default", "aten.addmm.default") for name in names))
        return make_boxed_func(module.forward)

    monkeypatch.setattr(compiled, "lower", aot_autograd(fw_compiler=count, bw_compiler=count))
    model = build()
    compile_layers(decoder_layers(model), merge=merge)
    packed_logits(model, tokens()).sum().backward()
    # q, k, v, o, gate, up, down: each once forward and twice backward. Merged: qkv, o, gate-up, down.
    assert products == ([4, 8] if merge else [7, 14])


class _TwoWays(nn.Module):
    """Two linear layers on one input, and what a class may do with their outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, bias = kind, kind != "no bias"
        self.first, self.second = nn.Linear(8, 6, bias=bias), nn.Linear(8, 10, bias=bias and kind != "one bias")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "writes":
            return torch.cat([self.first(x).mul_(2), self.second(x)], -1)
        a, b = self.first(x), self.second(x)
        if self.kind == "odd views":  # [2, 5, 6] and [2, 5, 10]: across what is no longer contiguous
            return torch.cat([a.view(2, 30).view(size=(2, 15, 2)).view(60), b.view(-1)])
        return torch.cat([a, b], -1)


@pytest.mark.parametrize(
    ("kind", "saved"),
    [("plain", 1), ("no bias", 1), ("odd views", 1), ("one bias", 0), ("writes", 0), ("two dtypes", 0)],
)
def test_what_cannot_be_merged_is_left_alone_and_what_can_is_right(kind: str, saved: int, monkeypatch) -> None:
    found: list[int] = []
    monkeypatch.setattr(compiled, "merge_linears", lambda module: found.append(merge_linears(module)))
    torch.manual_seed(1)
    plain = _TwoWays(kind)
    if kind == "two dtypes":
        plain.second.to(torch.bfloat16)
    merged = copy.deepcopy(plain)
    compile_layers([merged])
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "two dtypes"):
        x = torch.randn(2, 5, 8)
        a, b = plain(x), merged(x)
    torch.testing.assert_close(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(plain.parameters(), merged.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert found == [saved]


def test_all_layers_share_one_graph_and_evaluation_compiles_nothing() -> None:
    model = build(Model(preset="tiny-qwen3", overrides={"num_hidden_layers": 10}))
    compile_layers(decoder_layers(model))
    with torch.no_grad():
        before = [packed_logits(model, tokens(layouts), layouts) for layouts in (LAYOUTS, [[9]], [[31, 1]])]
    assert _graphs() == 0
    packed_logits(model, tokens()).sum().backward()
    assert _graphs() == 1 and not counters["graph_break"]
    with torch.no_grad():
        after = [packed_logits(model, tokens(layouts), layouts) for layouts in (LAYOUTS, [[9]], [[31, 1]])]
    assert _graphs() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_frozen_teacher_is_compiled_and_copies_no_weights(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "merge_linears", lambda module: pytest.fail("weights would be copied for nothing"))
    plain, teacher = build().eval(), build().eval()
    compile_layers(decoder_layers(teacher), frozen=True)
    with torch.no_grad():
        wanted, got = packed_logits(plain, tokens()), packed_logits(teacher, tokens())
    assert _graphs() == 1
    assert (wanted - got).abs().max() <= 1e-5


def _by_mask(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, _: Tensor, *rest: Any, scale: float, **more: Any
) -> Tensor:
    """What the GPU's kernel for documents laid end to end computes, `[tokens, heads, dim]`."""
    place = torch.arange(len(q))
    document = torch.bucketize(place, starts, right=True)
    mask = (document[:, None] == document[None]) & (place[:, None] >= place[None])
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def test_the_number_of_documents_compiles_nothing_anew(monkeypatch) -> None:
    monkeypatch.setattr(attention_kernels, "varlen_attn", _by_mask)
    plain, model = build(), build()
    compile_layers(decoder_layers(model))
    lengths = set()
    for longest in (5, 3, 2, 1):
        layouts = [[longest] * (30 // longest) + [2]] * 3
        positions, documents = positions_and_documents(layouts)
        inputs = attention_inputs(documents, True)
        boundaries = packing_of(documents, True).boundaries
        lengths.add(len(boundaries))
        inputs |= {"packing": attention.VARLEN, "packing_boundaries": boundaries, "packing_mask": None}
        with torch.autocast("cpu", torch.bfloat16):
            a, b = (
                decoder(m)(input_ids=tokens(layouts), position_ids=positions, **inputs).last_hidden_state
                for m in (plain, model)
            )
        assert (a - b).abs().max() <= 0.1
        b.float().sum().backward()
    assert len(lengths) > 2
    assert _graphs() == 1


def test_a_layer_compiled_again_and_again_is_an_error() -> None:
    model = build()
    compile_layers(decoder_layers(model))
    torch._dynamo.config.recompile_limit = 2
    for seq in (8, 9):
        packed_logits(model, tokens([[seq]]), [[seq]])
    with pytest.raises(CheaptrainError, match=r"Qwen3DecoderLayer was compiled 2 times.*TORCH_LOGS=recompiles"):
        packed_logits(model, tokens([[10]]), [[10]])


def _merged_on_ranks(rank: int, size: int, layout: Layout) -> list[int]:
    join(60)
    found: list[int] = []
    compiled.merge_linears = lambda module: found.append(merge_linears(module))
    root = parallelize(build(), make_mesh(layout, "cpu"), dtype=torch.bfloat16, compile_layers=True)
    compute = Compute(torch.device("cpu"), torch.bfloat16, True, 64)
    root(OBJECTIVES["next_token"], _mine(_global_batch(0), range(2)), compute).loss.backward()
    return found


@pytest.mark.parametrize(
    ("layout", "saved"), [(Layout(dp_shard=2), 3), pytest.param(Layout(tp=2), 0, marks=pytest.mark.slow)]
)
def test_sharded_layers_are_merged_and_split_tensors_are_not(layout: Layout, saved: int) -> None:
    assert run_ranks(functools.partial(_merged_on_ranks, layout=layout), 2) == [[saved]] * 2


def test_the_cache_outlives_a_restart_and_never_overrules_its_user(monkeypatch, tmp_path: Path) -> None:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    assert use_compile_cache() == tmp_path / "compiled"  # asked for
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    for unasked in ("", default_cache_dir()):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", unasked)
        assert use_compile_cache() == tmp_path / "home" / "cheaptrain" / "compiled"
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "home" / "cheaptrain" / "compiled")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    with pytest.warns(UserWarning, match="compiled layers are kept in"):
        assert use_compile_cache() == Path(default_cache_dir())
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", _nowhere)  # a container's user without a name and without HOME
    with pytest.warns(UserWarning, match="compiled layers are kept in"):
        assert use_compile_cache() == Path(default_cache_dir())


def _nowhere() -> Path:
    raise RuntimeError("Could not determine home directory.")


def _curve(model: PreTrainedModel, rows: tuple[int, ...]) -> list[float]:
    """Losses of 200 steps on the same batches, whose rows come, and are added up, in this order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(200):
        ids = tokens([[33]] * len(rows), seed=step % 20)[list(rows)]
        logits = packed_logits(model, ids[:, :-1], [[20, 12]] * len(rows))
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("how", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_two_hundred_steps_stay_within_the_noise_of_adding_up_in_another_order(how: str, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "lower", torch._dynamo.lookup_backend(how))
    plain = torch.tensor(_curve(build(), (0, 1, 2, 3)))
    others = [torch.tensor(_curve(build(), rows)) for rows in ((3, 1, 0, 2), (2, 3, 1, 0))]
    noise = max((other - plain).abs().max().item() for other in others)
    model = build()
    compile_layers(decoder_layers(model))
    fast = torch.tensor(_curve(model, (0, 1, 2, 3)))
    assert 0 < noise < 1e-3 and plain[-1] < plain[0] - 2  # it learns, and the order of the rows is only noise
    # Rounding grows with the steps: two ways of adding up are as far apart as two others give or take that growth.
    # Fused kernels round at other places as well. One product in bf16 instead of fp32 is hundreds of times as far.
    assert (fast - plain).abs().max() <= (3 if how == "aot_eager" else 10) * noise


@pytest.mark.slow
def test_a_second_start_finds_its_graphs_on_disk(monkeypatch) -> None:
    monkeypatch.setattr(compiled, "lower", torch._dynamo.lookup_backend("inductor"))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        before, model = compile_counts(), build()
        compile_layers(decoder_layers(model))
        packed_logits(model, tokens()).sum().backward()
        after = compile_counts()
        found.append((after.graphs - before.graphs, after.from_cache - before.from_cache))
        assert after.seconds > before.seconds
    assert found == [(1, 0), (1, 1)]
