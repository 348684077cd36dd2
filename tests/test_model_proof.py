"""The start-up proofs pass where they should and can fail; the plain twin is the model."""

import pytest
import torch
from model_helpers import TINY, build, tokens
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, CohereConfig, JambaConfig, MambaConfig

from cheaptrain.errors import PreflightError
from cheaptrain.model import attention
from cheaptrain.model.parts import decoder_layers, hidden_matrices
from cheaptrain.model.proof import plain_twin, prove_documents_isolated, prove_head
from cheaptrain.recipe.schema import Model

torch.set_num_threads(1)


@pytest.mark.parametrize("preset", [*TINY, "quickstart"])
def test_proofs_pass_and_leave_no_trace(preset: str) -> None:
    model = build(preset).train()
    torch.manual_seed(7)
    before = torch.get_rng_state()
    assert prove_documents_isolated(model) < 1e-6
    assert prove_documents_isolated(model, document_mask=False) < 1e-6
    assert prove_documents_isolated(model, dtype=torch.bfloat16) < 0.05
    assert prove_head(model) < 1e-6
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not model.lm_head._forward_pre_hooks


def test_a_model_with_fewer_positions_than_the_proof_is_proven_too() -> None:
    assert prove_documents_isolated(build(Model(preset="tiny-gpt2", overrides={"n_positions": 12}), seq_len=12)) < 1e-6


def _ignoring_documents(module, query, key, value, attention_mask, scaling=None, **others):
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return output.transpose(1, 2), None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_attention_that_sees_other_documents_is_refused(monkeypatch, dtype: torch.dtype) -> None:
    model = build()
    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, _ignoring_documents)
    with pytest.raises(PreflightError, match=r"Qwen3ForCausalLM: documents in one row see each other.*e-\d"):
        prove_documents_isolated(model, dtype=dtype)
    assert prove_documents_isolated(model, document_mask=False) < 1e-6


def test_positions_not_used_as_given_are_refused(monkeypatch) -> None:
    model = build("tiny-gpt2")
    embed = torch.nn.Embedding.forward
    table = model.transformer.wpe
    monkeypatch.setattr(
        torch.nn.Embedding,
        "forward",
        lambda self, ids: embed(self, torch.arange(ids.shape[1])[None] if self is table else ids),
    )
    with pytest.raises(PreflightError, match="position_ids"):
        prove_documents_isolated(model)


SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SMALL |= {"num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": 1}


def test_state_that_leaks_past_attention_is_refused() -> None:
    torch.manual_seed(0)
    config = JambaConfig(**SMALL, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with pytest.raises(PreflightError, match="JambaForCausalLM: documents in one row see each other"):
        prove_documents_isolated(model)


def test_logits_that_are_scaled_after_the_head_are_refused() -> None:
    model = AutoModelForCausalLM.from_config(CohereConfig(**SMALL), attn_implementation=attention.NAME)
    with pytest.raises(PreflightError, match="CohereForCausalLM: its logits"):
        prove_head(model)


def test_capped_logits_are_refused_though_fresh_logits_are_small(monkeypatch) -> None:
    model = build()
    forward = type(model).forward

    def capped(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    monkeypatch.setattr(type(model), "forward", capped)
    with pytest.raises(PreflightError, match="caps"):
        prove_head(model)


def test_a_head_with_a_bias_is_refused_though_it_starts_at_zero() -> None:
    model = build()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(model.config.vocab_size))
    with pytest.raises(PreflightError, match="without bias"):
        prove_head(model)


def test_a_model_without_attention_is_refused_by_name() -> None:
    config = MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=1, pad_token_id=None, use_mambapy=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)
    with pytest.raises(PreflightError, match="MambaForCausalLM: transformers does not run it with SDPA"):
        prove_documents_isolated(model)


@pytest.mark.parametrize("preset", TINY)
def test_twin_shares_weights_and_follows_them(preset: str) -> None:
    model = build(preset)
    twin = plain_twin(model)
    assert [id(p) for p in twin.parameters()] == [id(p) for p in model.parameters()]
    assert [b.data_ptr() for b in twin.buffers()] == [b.data_ptr() for b in model.buffers()]
    assert twin.get_output_embeddings().weight is twin.get_input_embeddings().weight
    assert model.config._attn_implementation == attention.NAME and model.training
    before = twin(tokens()).logits
    with torch.no_grad():
        next(iter(hidden_matrices(model))).mul_(2)
    assert not torch.equal(twin(tokens()).logits, before)


@pytest.mark.parametrize("preset", TINY)
def test_twin_generates_with_its_cache_what_it_generates_without(preset: str) -> None:
    twin = plain_twin(build(preset))
    prompt = tokens()[:1, :6]
    runs = [twin.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*runs)


def test_twin_of_a_compiled_model_is_not_compiled() -> None:
    model = build()
    for layer in decoder_layers(model):
        layer.compile(backend="aot_eager")
    assert all(layer._compiled_call_impl is None for layer in decoder_layers(plain_twin(model)))
