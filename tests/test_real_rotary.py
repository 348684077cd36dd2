"""Llama 4 trains in real arithmetic what transformers computes with complex numbers."""

from pathlib import Path

import pytest
import torch
from model_helpers import VOCAB, build, packed_logits, tokens
from transformers import AutoModelForCausalLM
from transformers.models.llama4 import modeling_llama4

from cheaptrain.errors import PreflightError
from cheaptrain.model import rotary
from cheaptrain.model.parts import decoder, decoder_layers
from cheaptrain.model.proof import plain_twin, prove_documents_isolated
from cheaptrain.model.rotary import rotate_pairs
from cheaptrain.model.saving import load_saved, save_model


def _angles(rows: int, seq: int, dim: int) -> torch.Tensor:
    return torch.polar(torch.ones(rows, seq, dim // 2), 7 * torch.randn(rows, seq, dim // 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [2, 6, 64])
def test_rotation_and_its_gradient_are_the_complex_ones(dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(dim)
    angles = _angles(2, 5, dim)
    tables = rotary._tables(lambda: angles)
    theirs = [torch.randn(2, 5, heads, dim, dtype=dtype).requires_grad_() for heads in (3, 1)]
    ours = [x.detach().clone().requires_grad_() for x in theirs]
    wanted = modeling_llama4.apply_rotary_emb(*theirs, angles)
    got = [rotate_pairs(x, tables) for x in ours]
    # The same two products and their sum, fused or not: one rounding of the result's dtype.
    allowed = {"atol": 1e-6, "rtol": 1e-6} if dtype == torch.float32 else {"atol": 1e-3, "rtol": 2**-8}
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b, **allowed)
    grads = [torch.randn_like(x) for x in wanted]
    for results in (got, wanted):
        torch.autograd.backward(results, grads)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, **allowed)


def test_no_complex_number_enters_a_layer_and_the_twin_keeps_its_own_arithmetic() -> None:
    model, ids, seen = build("tiny-llama4"), tokens(), []

    def look(_, args, kwargs) -> None:
        seen.append(kwargs["position_embeddings"].is_complex())

    twin = plain_twin(model)
    for each in (model, twin):
        for layer in decoder_layers(each):
            layer.register_forward_pre_hook(look, with_kwargs=True)
    packed_logits(model, ids)
    assert seen == [False, False]
    twin(ids)
    assert seen[2:] == [True, True]


def test_packed_logits_and_gradients_are_those_of_complex_arithmetic(monkeypatch) -> None:
    ours, ids = build("tiny-llama4"), tokens()
    monkeypatch.setattr("cheaptrain.model.build.use_real_rotary", lambda model: None)
    theirs = build("tiny-llama4")
    assert "forward" not in vars(decoder(theirs).rotary_emb)
    a, b = packed_logits(ours, ids), packed_logits(theirs, ids)
    assert (a - b).abs().max() <= 1e-6 * b.abs().max().clamp_min(1)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= 1e-5 * q.grad.abs().max()


def test_a_wrong_rotation_is_refused_at_start_up(monkeypatch) -> None:
    model, right = build("tiny-llama4"), rotary.rotate_pairs
    monkeypatch.setattr(modeling_llama4.Llama4TextL2Norm, "forward", lambda self, x: x)
    with torch.no_grad():  # attention of fresh weights hardly looks at positions
        for layer in decoder_layers(model):
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    assert prove_documents_isolated(model) < 1e-4
    backwards = torch.tensor([1.0, -1.0])[:, None, None, None]
    monkeypatch.setattr(rotary, "rotate_pairs", lambda x, tables: right(x, tables * backwards))
    with pytest.raises(PreflightError, match="other logits than alone"):
        prove_documents_isolated(model)


def test_what_is_saved_is_what_transformers_would_save(tmp_path: Path) -> None:
    model, ids = build("tiny-llama4"), tokens()
    save_model(model, tmp_path)
    loaded = load_saved(tmp_path)
    assert type(loaded) is type(model) and loaded.state_dict().keys() == model.state_dict().keys()
    fresh = AutoModelForCausalLM.from_config(loaded.config)
    assert "forward" not in vars(decoder(fresh).rotary_emb)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, plain_twin(model)(ids).logits)
        assert loaded(ids).logits.shape[-1] >= VOCAB
