"""A row shared by several processes trains the model that one process would train: same loss, same gradients, and the
documents in it as far apart as before, wherever the row is cut."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cheaptrain_kernels import linear_cross_entropy
from model_helpers import LAYOUTS, TINY, build, positions_and_documents, tokens
from ranks import run_ranks
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, PreTrainedModel, Qwen3Config

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model import attention
from cheaptrain.model import context as context_parallel
from cheaptrain.model.attention import attention_inputs, cheaptrain_attention
from cheaptrain.model.attention import kernels as attention_kernels
from cheaptrain.model.attention.packing import boundaries_of
from cheaptrain.model.context import Context, check_context, heads_for_tokens, tokens_for_heads
from cheaptrain.model.parts import decoder, decoder_layers, head
from cheaptrain.recipe.schema import Model

torch.set_num_threads(1)

# Documents that end before, at and after each cut of a row of 32 tokens into 2 or 4; and rows of one document each.
CUTS = [*LAYOUTS, [16, 16], [8, 8, 1, 15], [9, 6, 2, 15]]
LONG = [[32], [32]]
HEADS = {2: ((4, 2), (8, 4)), 4: ((4, 4), (8, 4), (16, 8))}  # (heads, kv heads) of each cp: as many, and more


def _context(rank: int, size: int) -> Context:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    context = Context.of(dist.group.WORLD)
    assert context is not None
    return context


def _stretch(rows: Tensor, context: Context) -> Tensor:
    """This process's part of `rows` `[rows, seq, ...]`."""
    return rows.chunk(context.size, 1)[context.rank]


def _spec(preset: str, heads: int, kv_heads: int) -> Model:
    if preset == "tiny-gpt2":
        return Model(preset=preset, overrides={"n_head": heads})
    return Model(
        preset=preset, overrides={"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": 8}
    )


def _loss(model: PreTrainedModel, layouts: list[list[int]], context: Context | None, document_mask: bool) -> Tensor:
    """Sum of the losses of the row, or of this process's stretch of it."""
    ids, (positions, documents) = tokens(layouts), positions_and_documents(layouts)
    if not document_mask:
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    labels = ids.roll(-1, 1)
    labels[:, -1] = -100
    inputs = attention_inputs(documents, document_mask, context=context)
    if context is not None:
        ids, positions, labels = (_stretch(x, context) for x in (ids, positions, labels))
    hidden = decoder(model)(input_ids=ids, position_ids=positions, **inputs).last_hidden_state
    return linear_cross_entropy(hidden.flatten(0, 1), head(model).weight, labels.flatten())[0]


def _gradients(model: PreTrainedModel, loss: Tensor, context: Context | None) -> tuple[float, list[Tensor]]:
    """The loss and the gradients of the whole rows."""
    model.zero_grad()
    loss.backward()
    total = loss.detach().clone()
    found = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(found) == len(list(model.parameters()))
    if context is not None:
        for value in (total, *found):
            dist.all_reduce(value)
    return total.item(), found


def _compare(shared: Any, alone: Any, context: Context, what: str, tolerance: float = 2e-6, **of: Any) -> None:
    ours, gradients = _gradients(shared, _loss(shared, context=context, **of), context)
    plain, plain_gradients = _gradients(alone, _loss(alone, context=None, **of), None)
    assert ours == pytest.approx(plain, rel=tolerance), what
    for (name, _), a, b in zip(alone.named_parameters(), gradients, plain_gradients, strict=True):
        assert (a - b).abs().max() <= tolerance * b.abs().max(), f"{what}: {name}"


def _equal_to_one_process(rank: int, size: int, preset: str) -> None:
    context = _context(rank, size)
    for heads, kv_heads in HEADS[size]:
        model = build(_spec(preset, heads, kv_heads))
        for layouts in (CUTS, LONG):
            for document_mask in (True, False):
                what = f"{preset}, {heads} heads, {kv_heads} kv heads, {layouts}, {document_mask=}"
                _compare(model, model, context, what, layouts=layouts, document_mask=document_mask)


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("size", [2, 4])
def test_a_shared_row_gives_the_loss_and_gradients_of_a_whole_one(preset: str, size: int) -> None:
    run_ranks(_equal_to_one_process, size, preset)


def _moved_by_another_document(rank: int, size: int) -> Tensor:
    context = _context(rank, size)
    model = build().eval()
    layouts = [[7, 12, 1, 12]]
    positions, documents = positions_and_documents(layouts)
    hidden = []
    for shift in (0, 1):
        ids = tokens(layouts)
        ids[0, 10] = (ids[0, 10] + shift) % 500  # in the document of positions 7 to 18, which goes on beyond the cut
        with torch.no_grad():
            output = decoder(model)(
                input_ids=_stretch(ids, context),
                position_ids=_stretch(positions, context),
                **attention_inputs(documents, True, context=context),
            )
        hidden.append(output.last_hidden_state[0])
    return (hidden[0] - hidden[1]).abs().amax(-1)


def test_a_document_moves_its_tokens_beyond_the_cut_and_no_other_document() -> None:
    moved = torch.cat(run_ranks(_moved_by_another_document, 2))
    assert (moved[10:19] > 0).all()
    moved[10:19] = 0
    assert moved.max() == 0.0


def _exchanged(rank: int, size: int) -> tuple[bool, list[list[int]]]:
    context = _context(rank, size)
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(2, heads, 12, dim, generator=generator) for heads, dim in ((8, 6), (4, 6), (4, 3))]
    got = heads_for_tokens([_stretch(x.transpose(1, 2), context).transpose(1, 2) for x in whole], context)
    for mine, x in zip(got, whole, strict=True):
        assert torch.equal(mine, x.chunk(size, 1)[rank])
    back = tokens_for_heads(got[0].transpose(1, 2), context)
    return torch.equal(back, _stretch(whole[0].transpose(1, 2), context)), [list(x.shape) for x in got]


def test_every_process_gets_its_heads_of_all_tokens_in_order_and_its_tokens_back() -> None:
    shapes = [[2, 4, 12, 6], [2, 2, 12, 6], [2, 2, 12, 3]]  # the dims of values may be others
    assert run_ranks(_exchanged, 2) == [(True, shapes)] * 2


def _compiled(rank: int, size: int, preset: str, backend: str) -> dict[str, int]:
    torch._inductor.config.compile_threads = 1
    context = _context(rank, size)
    eager, compiled = (build(_spec(preset, *HEADS[size][-1])) for _ in range(2))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for layer in decoder_layers(compiled):
        layer.compile(fullgraph=True, backend=backend)
    for layouts in (CUTS, LONG):
        for model in (eager, compiled):
            model.zero_grad()
        a, b = (_loss(model, layouts, context, True) for model in (eager, compiled))
        assert b.item() == pytest.approx(a.item(), rel=2e-6)
        (a, first), (b, second) = (_gradients(m, x, context) for m, x in ((eager, a), (compiled, b)))
        for (name, _), p, q in zip(eager.named_parameters(), first, second, strict=True):
            assert (p - q).abs().max() <= 4e-6 * p.abs().max(), f"{layouts}: {name}"
    return {
        "graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"],
        "breaks": len(torch._dynamo.utils.counters["graph_break"]),
    }


@pytest.mark.parametrize(
    ("preset", "size", "backend"),
    [
        pytest.param("tiny-qwen3", 2, "aot_eager", marks=pytest.mark.slow),
        pytest.param("tiny-llama4", 4, "aot_eager", marks=pytest.mark.slow),
        *(
            pytest.param(preset, size, "inductor", marks=pytest.mark.slow)
            for preset in ("tiny-qwen3", "tiny-llama4")
            for size in (2, 4)
        ),
    ],
)
def test_compiled_layers_give_the_eager_gradients(preset: str, size: int, backend: str) -> None:
    # One graph for masked and one for causal rows, however many layers.
    assert run_ranks(_compiled, size, preset, backend, timeout=1200) == [{"graphs": 2, "breaks": 0}] * size


def _recomputed(rank: int, size: int) -> None:
    context = _context(rank, size)
    recomputing, alone = build(), build()
    recomputing.gradient_checkpointing_enable({"use_reentrant": False})
    _compare(recomputing.train(), alone, context, "recomputed", layouts=CUTS, document_mask=True)


def test_layers_that_run_again_in_the_backward_pass_exchange_again() -> None:
    run_ranks(_recomputed, 2)


def _in_bf16(rank: int, size: int) -> None:
    context = _context(rank, size)
    model = build()
    sent, plain = [], context_parallel._exchange

    def watched(blocks: Tensor, group: str) -> Tensor:
        sent.append(blocks.dtype)
        return plain(blocks, group)

    context_parallel._exchange = watched
    with torch.autocast("cpu", torch.bfloat16):
        _compare(model, model, context, "bf16", tolerance=0.05, layouts=CUTS, document_mask=True)
    assert set(sent) == {torch.bfloat16} and len(sent) == 2 * 2 * 2  # layers, there and back, forward and backward


def test_heads_travel_in_half_precision_under_autocast() -> None:
    run_ranks(_in_bf16, 2)


def _variable_length(rank: int, size: int) -> float:
    """The GPU's way through, with a CPU stand-in for its kernel."""

    def kernel(q, k, v, starts, _, longest, __, *, scale, window_size, **extra):
        assert longest == 32 and starts[-1] == len(q) == len(k) == 32 * len(CUTS)
        parts = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            a, b, c = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            if end > start:
                out = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=True)
                parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    context = _context(rank, size)
    attention_kernels.varlen_attn = kernel
    documents = positions_and_documents(CUTS)[1]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(len(CUTS), heads, 32, 8, generator=generator).bfloat16() for heads in (4, 2, 2)]
    dense = attention_inputs(documents, True)
    expected, _ = cheaptrain_attention(torch.nn.Module(), *whole, None, **dense)
    boundaries = boundaries_of(documents[:, 1:] != documents[:, :-1])
    packed = attention_inputs(documents, True, context=context) | {
        "packing": attention.VARLEN, "packing_boundaries": boundaries, "packing_mask": None
    }  # fmt: skip
    mine = [x[:, :, rank * 16 : (rank + 1) * 16] for x in whole]
    output, _ = cheaptrain_attention(torch.nn.Module(), *mine, None, **packed)
    return (output - _stretch(expected, context)).abs().max().item()


def test_variable_length_batches_hold_whole_rows() -> None:
    for difference in run_ranks(_variable_length, 2):
        assert difference < 0.03


def _refused(rank: int, size: int) -> list[str]:
    context = _context(rank, size)
    q = torch.randn(1, 4, 16, 8)
    inputs = attention_inputs(torch.zeros(1, 32, dtype=torch.int32), True, context=context)
    chunked = torch.nn.Module()
    chunked.config = SimpleNamespace(layer_types=["chunked_attention"], attention_chunk_size=24)
    said = []
    for module, queries, extra in (
        (torch.nn.Module(), torch.randn(1, 4, 32, 8), {}),  # the whole row on every process
        (torch.nn.Module(), q, {"sliding_window": 24}),  # longer than the stretch, shorter than the row
        (chunked, q, {}),
        (torch.nn.Module(), torch.randn(1, 3, 16, 8), {}),
    ):
        with pytest.raises(CheaptrainError) as refusal:
            cheaptrain_attention(module, queries, queries, queries, None, **inputs, **extra)
        said.append(str(refusal.value))
    output, _ = cheaptrain_attention(torch.nn.Module(), q, q, q, None, **inputs, sliding_window=32)
    assert output.shape == (1, 16, 4, 8)
    return said


def test_windows_and_chunks_are_held_against_the_whole_row() -> None:
    for whole_row, window, chunk, heads in run_ranks(_refused, 2):
        assert "32 tokens of each row by each of 2 processes, and rows have 32" in whole_row
        assert "sliding_window = 24, which rows of 32 tokens" in window
        assert "chunks of 24, rows have 32" in chunk
        assert "3 heads cannot be shared by 2 processes" in heads


def _planned(rank: int, size: int) -> int:
    """As planning does it: one of 4 processes that do not exist, tensors without values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    assert dist.group.WORLD is not None
    context = Context.of(dist.group.WORLD)
    assert context is not None and (context.size, context.rank) == (4, 1)
    inputs = attention_inputs(torch.zeros(2, 32, dtype=torch.int32), True, context=context)
    with FakeTensorMode(allow_non_fake_inputs=True):
        q = torch.empty(2, 8, 8, 16, requires_grad=True)
        k = torch.empty(2, 4, 8, 16, requires_grad=True)
        output, _ = cheaptrain_attention(torch.nn.Module(), q, k, k, None, **inputs)
        output.sum().backward()
        assert q.grad is not None and k.grad is not None and q.grad.shape == q.shape and k.grad.shape == k.shape
        return list(output.shape)


def test_shared_rows_can_be_planned_without_processes_or_values() -> None:
    assert run_ranks(_planned, 1) == [[2, 8, 8, 16]]


def _alone(rank: int, size: int) -> bool:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    return Context.of(dist.group.WORLD) is None


def test_a_process_by_itself_exchanges_nothing() -> None:
    assert run_ranks(_alone, 1) == [True]
    assert attention_inputs(torch.zeros(1, 8), True)["packing_context"] is None


@pytest.mark.parametrize(
    ("config", "seq_len", "cp", "tp", "reasons"),
    [
        (Qwen3Config(num_attention_heads=9, num_key_value_heads=3), 6144, 3, 1, []),
        (Qwen3Config(num_attention_heads=9, num_key_value_heads=3), 4096, 2, 1, ["cp = 2 does not divide the 9"]),
        (Qwen3Config(num_attention_heads=16, num_key_value_heads=4), 4096, 8, 1, ["4 key/value heads", "= 2 or 4,"]),
        (Qwen3Config(num_attention_heads=16, num_key_value_heads=4), 4096, 2, 2, []),
        (Qwen3Config(num_attention_heads=16, num_key_value_heads=4), 4096, 4, 2, ["each process 8 and 2", "= 2,"]),
        (Qwen3Config(num_attention_heads=16, num_key_value_heads=4), 4096, 2, 4, ["set parallel.cp = 1"]),
        (Qwen3Config(num_attention_heads=9, num_key_value_heads=3), 6144, 2, 1, ["set parallel.cp = 3, or 1"]),
        (GPT2Config(n_head=12), 1024, 4, 1, []),
        (GPT2Config(n_head=12), 1024, 8, 1, ["12 attention heads of this model", "cp = 2 or 3 or 4 or 6 or 12"]),
        (GPT2Config(n_head=12), 1022, 4, 1, ["seq_len = 1022 does not divide by parallel.cp = 4", "1020 or 1024"]),
        (GPT2Config(n_head=12), 1020, 2, 3, []),
        (GPT2Config(n_head=12), 1024, 2, 3, ["cp = 2 × parallel.tp = 3", "1020 or 1026"]),
        (GPT2Config(n_head=12), 1023, 1, 2, ["by parallel.tp = 2", "1022 or 1024"]),
        (GPT2Config(n_head=7), 1023, 1, 1, []),
        (GPT2Config(n_head=7), 1023, 2, 1, ["7 attention heads", "seq_len = 1023"]),  # all at once
        (SimpleNamespace(num_attention_heads=4, layer_types=["conv", "full_attention"]), 64, 2, 1, ["type conv "]),
        (SimpleNamespace(num_attention_heads=4, layer_types=["conv", "full_attention"]), 64, 1, 1, []),
        (LlamaConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), 64, 2, 1, ["rope_type = dynamic"]),
        (
            SimpleNamespace(num_attention_heads=4, rope_parameters={"full_attention": {"rope_type": "longrope"}}),
            64, 2, 1, ["longrope"],
        ),
        (
            SimpleNamespace(num_attention_heads=4, attn_temperature_tuning=True, no_rope_layers=[1, 0]),
            64, 2, 1, ["attn_temperature_tuning"],
        ),
        (SimpleNamespace(num_attention_heads=4, attn_temperature_tuning=True, no_rope_layers=[1, 1]), 64, 2, 1, []),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_shared_are_refused_before_anything_is_built(
    config: Any, seq_len: int, cp: int, tp: int, reasons: list[str]
) -> None:
    if not reasons:
        check_context(config, seq_len=seq_len, cp=cp, tp=tp)
        return
    with pytest.raises(PreflightError) as refusal:
        check_context(config, seq_len=seq_len, cp=cp, tp=tp)
    for reason in reasons:
        assert reason in str(refusal.value)
