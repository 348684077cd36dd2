"""Documents of a packed row never see each other, and nothing is ever silently unmasked."""

from types import SimpleNamespace

import pytest
import torch
from model_helpers import LAYOUTS, TINY, build, packed_logits, positions_and_documents, separate_logits, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Gemma2Config, MistralConfig

from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.model import attention
from cheaptrain.model.attention import attention_inputs, cheaptrain_attention
from cheaptrain.model.attention import kernels as attention_kernels
from cheaptrain.model.attention.asked import unsupported_attention
from cheaptrain.model.attention.packing import boundaries_of
from cheaptrain.model.parts import decoder, decoder_layers
from cheaptrain.model.proof import plain_twin
from cheaptrain.recipe.schema import Model

torch.set_num_threads(1)


@pytest.mark.parametrize("preset", TINY)
def test_packed_documents_get_the_logits_and_gradients_of_separate_ones(preset: str) -> None:
    model, ids = build(preset), tokens()
    weights = torch.randn(*ids.shape, model.config.vocab_size, generator=torch.Generator().manual_seed(2))

    def run(logits: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        (logits * weights).sum().backward()
        return logits.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    packed, packed_grads = run(packed_logits(model, ids))
    alone, alone_grads = run(separate_logits(plain_twin(model), ids))
    assert (packed - alone).abs().max() < 2e-6
    assert len(packed_grads) == len(alone_grads) == len(list(model.parameters()))
    for a, b in zip(packed_grads, alone_grads, strict=True):
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("preset", TINY)
def test_a_token_of_one_document_moves_no_other_document_and_no_earlier_token(preset: str) -> None:
    model, ids = build(preset).eval(), tokens()
    changed = ids.clone()
    changed[0, 10] = (changed[0, 10] + 1) % 500  # second document of the first row: positions 7 to 18
    with torch.no_grad():
        moved = (packed_logits(model, ids) - packed_logits(model, changed)).abs().amax(-1)  # [rows, seq]
    assert (moved[0, 10:19] > 0).all()
    moved[0, 10:19] = 0
    assert moved.max() == 0.0


def test_document_mask_off_lets_the_row_be_one_document() -> None:
    model, ids = build().eval(), tokens()
    _, documents = positions_and_documents()
    with torch.no_grad():
        hidden = decoder(model)(input_ids=ids, **attention_inputs(documents, False)).last_hidden_state
        whole = decoder(plain_twin(model))(input_ids=ids, use_cache=False).last_hidden_state
    assert torch.equal(hidden, whole)


def test_a_document_id_used_again_is_another_document() -> None:
    """Ids only mark where documents start: 0 0 1 1 0 0 is three documents."""
    ids = torch.tensor([[0, 0, 1, 1, 0, 0]])
    mask = attention_inputs(ids, True)["packing_mask"][0, 0]
    assert mask.int().tolist() == torch.block_diag(*[torch.ones(2, 2).tril()] * 3).int().tolist()


@pytest.mark.parametrize("preset", TINY)
def test_long_rows_without_a_mask_attend_otherwise_than_with_it(monkeypatch, preset: str) -> None:
    """One document after the other gives the losses and gradients of the block-diagonal mask."""
    model, ids, (positions, documents) = build(preset).eval(), tokens(), positions_and_documents()
    found = []
    for longest in (32, 8):
        monkeypatch.setattr(attention, "LONGEST_MASK", longest)
        inputs = attention_inputs(documents, True)
        assert (inputs["packing_mask"] is None) == (longest == 8)
        model.zero_grad()
        hidden = decoder(model)(input_ids=ids, position_ids=positions, **inputs).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
        found.append((hidden.detach(), [p.grad.clone() for p in decoder(model).parameters() if p.grad is not None]))
    (hidden, gradients), (other, others) = found
    assert (hidden - other).abs().max() < 1e-5
    assert len(gradients) == len(others) > 0
    for ours, theirs in zip(gradients, others, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * max(1.0, ours.abs().max())


def test_boundaries_cover_every_token_once_and_keep_their_shape() -> None:
    _, documents = positions_and_documents()
    boundaries = boundaries_of(documents[:, 1:] != documents[:, :-1])
    assert boundaries.dtype == torch.int32
    assert boundaries.tolist()[:8] == [0, 7, 19, 20, 32, 52, 64, 96]
    assert set(boundaries.tolist()[8:]) == {96}
    assert len(boundaries) == 17
    more = boundaries_of(torch.ones(2, 16, dtype=torch.bool))
    assert len(more) == 65 and more.tolist()[:35] == [*range(35)]


@pytest.mark.parametrize("knows_gqa", [True, False])
def test_variable_length_path_lays_rows_heads_and_boundaries_out_rightly(monkeypatch, knows_gqa: bool) -> None:
    """The GPU's arrangement with a CPU stand-in for its kernel, which may or may not know grouped heads."""

    def reference(q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size, **extra):
        assert torch.equal(starts, starts_k) and longest == longest_k == 32 and window_size == (-1, 0)
        assert extra == ({"enable_gqa": True} if knows_gqa else {})
        parts = []
        for start, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
            a, b, c = (x[start:end].transpose(0, 1)[None] for x in (q, k, v))
            if end > start:
                out = F.scaled_dot_product_attention(a, b, c, is_causal=True, scale=scale, enable_gqa=knows_gqa)
                parts.append(out[0].transpose(0, 1))
        return torch.cat(parts)

    monkeypatch.setattr(attention_kernels, "varlen_attn", reference)
    monkeypatch.setattr(attention_kernels, "_VARLEN_KNOWS_GQA", knows_gqa)
    _, documents = positions_and_documents()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, heads, 32, 8, generator=generator) for heads in (4, 2, 2))
    boundaries = boundaries_of(documents[:, 1:] != documents[:, :-1])
    output = attention_kernels.packed("varlen", query, key, value, boundaries, 0.0, 0.3)
    expected, _ = cheaptrain_attention(
        torch.nn.Module(), query, key, value, None, scaling=0.3, **attention_inputs(documents, True)
    )
    assert (output - expected).abs().max() < 1e-6


@pytest.mark.parametrize("preset", TINY)
def test_unpacked_call_is_refused_not_unmasked(preset: str) -> None:
    model = build(preset)
    with pytest.raises(CheaptrainError, match="without document boundaries"):
        model(tokens(), use_cache=False)
    with pytest.raises(CheaptrainError, match="without document boundaries"):
        model.generate(tokens()[:1], max_new_tokens=2, do_sample=False)


@pytest.mark.parametrize("preset", TINY)
def test_a_mask_or_a_cache_besides_the_boundaries_is_refused(preset: str) -> None:
    model, ids = build(preset), tokens()
    inputs = attention_inputs(positions_and_documents()[1], True)
    with pytest.raises(CheaptrainError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(3, 1, 32, 32, dtype=torch.bool), **inputs)
    cache = model(ids, **inputs | {"use_cache": True}).past_key_values
    with pytest.raises(CheaptrainError, match="a cache"):
        model(ids, past_key_values=cache, **inputs)


@pytest.mark.parametrize(
    ("asked", "accepted"),
    [
        ({"softcap": 50.0}, False),
        ({"s_aux": torch.zeros(4)}, False),
        ({"position_bias": torch.zeros(1)}, False),
        ({"sliding_window": 8}, False),
        ({"sliding_window": 16}, True),
        ({"is_causal": False}, False),
        ({"output_attentions": True}, False),
        ({"something_new": 1}, False),
        ({"something_new": None, "position_ids": torch.zeros(1)}, True),
    ],
)
def test_attention_features_not_honoured_are_refused(asked: dict, accepted: bool) -> None:
    q = torch.randn(1, 4, 16, 8)
    inputs = attention_inputs(torch.zeros(1, 16, dtype=torch.int32), True)
    if accepted:
        assert cheaptrain_attention(torch.nn.Module(), q, q, q, None, **inputs, **asked)[0].shape == (1, 16, 4, 8)
    else:
        with pytest.raises(CheaptrainError, match=next(iter(asked))):
            cheaptrain_attention(torch.nn.Module(), q, q, q, None, **inputs, **asked)


def test_chunks_shorter_than_the_row_are_refused() -> None:
    module = torch.nn.Module()
    module.config = SimpleNamespace(layer_types=["chunked_attention"], attention_chunk_size=8)
    q = torch.randn(1, 4, 16, 8)
    with pytest.raises(CheaptrainError, match="chunks of 8"):
        cheaptrain_attention(module, q, q, q, None, **attention_inputs(torch.zeros(1, 16, dtype=torch.int32), True))


def test_unsupported_features_are_known_before_training() -> None:
    assert "sliding_window = 64" in unsupported_attention(MistralConfig(sliding_window=64), 65)[0]
    assert unsupported_attention(MistralConfig(sliding_window=64), 64) == []
    assert any("attn_logit_softcapping" in problem for problem in unsupported_attention(Gemma2Config(), 64))
    chunked = Model(
        preset="tiny-llama4", overrides={"layer_types": ["chunked_attention"] * 2, "attention_chunk_size": 16}
    )
    with pytest.raises(RecipeError, match="attention_chunk_size = 16"):
        build(chunked)


def test_attention_dropout_is_honoured() -> None:
    model = build(Model(preset="tiny-llama", overrides={"attention_dropout": 0.5})).train()
    ids = tokens()
    with torch.no_grad():
        torch.manual_seed(0)
        first = packed_logits(model, ids)
        assert not torch.equal(first, packed_logits(model, ids))
        torch.manual_seed(0)
        assert torch.equal(first, packed_logits(model, ids))
        assert torch.equal(packed_logits(model.eval(), ids), packed_logits(model, ids))


def test_queries_normed_to_fp32_are_cast_back_under_autocast(monkeypatch) -> None:
    """Else packed documents would miss the half-precision GPU kernel, which autocast does not know of."""
    seen = []

    def kernel(query, key, value, *others, **more):
        seen.extend([query.dtype, key.dtype, value.dtype])
        return query

    monkeypatch.setattr(attention_kernels, "varlen_attn", kernel)
    q, v = torch.randn(1, 4, 16, 8), torch.randn(1, 4, 16, 8, dtype=torch.bfloat16)
    inputs = {"packing": attention.VARLEN, "packing_boundaries": torch.tensor([0, 16], dtype=torch.int32)}
    with torch.autocast("cpu", torch.bfloat16):
        cheaptrain_attention(torch.nn.Module(), q, q, v, None, **inputs)
    assert seen == [torch.bfloat16] * 3


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama4"])
@pytest.mark.parametrize("half", [False, True])
def test_compiled_layers_give_the_eager_logits_and_gradients(preset: str, half: bool) -> None:
    torch._dynamo.reset()
    eager, compiled, ids = build(preset), build(preset), tokens()
    for layer in decoder_layers(compiled):
        layer.compile(fullgraph=True, backend="aot_eager")
    for layouts in (LAYOUTS, [[32]] * 3):  # masked, then causal
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            a, b = (packed_logits(model, ids, layouts) for model in (eager, compiled))
        assert (a - b).abs().max() <= (0.02 if half else 1e-6)
        a.square().sum().backward()
        b.square().sum().backward()
    for p, q in zip(eager.parameters(), compiled.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= (0.05 if half else 1e-5) * p.grad.abs().max()
    assert torch._dynamo.utils.counters["graph_break"] == {}


@pytest.mark.parametrize("preset", TINY)
def test_layers_share_one_compiled_graph(preset: str) -> None:
    """A graph for each layer would reach torch's recompile limit at the ninth."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = build(Model(preset=preset, overrides={"num_hidden_layers": 10}))
    for layer in decoder_layers(model):
        layer.compile(fullgraph=True, backend="aot_eager")
    for layouts in (LAYOUTS, [[16, 16]] * 3, [[32]] * 3):
        packed_logits(model, tokens(), layouts).sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # masked and causal


def test_gradient_checkpointing_changes_nothing() -> None:
    plain, checkpointed, ids = build(), build(), tokens()
    checkpointed.gradient_checkpointing_enable({"use_reentrant": False})
    for model in (plain, checkpointed):
        packed_logits(model.train(), ids).square().sum().backward()
    for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_our_function_is_really_the_one_called() -> None:
    model = build("tiny-qwen3")
    assert model.config._attn_implementation == attention.NAME
    other = AutoModelForCausalLM.from_config(plain_twin(model).config, attn_implementation="sdpa")
    assert model.config._attn_implementation == attention.NAME
    assert other.config._attn_implementation == "sdpa"
