"""8-bit products must leave alone what is saved and validated, and be off by no more than their rounding.

Emulated: the same scaling and rounding as on a GPU that has them, with slow products.
"""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from model_helpers import build
from torch import nn
from transformers import PreTrainedModel

from cheaptrain.errors import PreflightError
from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.fp8 import refuse_fp8, to_fp8
from cheaptrain.model.parts import decoder, decoder_layers

APART = Path(sys.prefix) / "apart"  # where the Makefile puts it
if importlib.util.find_spec("torchao") is None and not (APART / "torchao").is_dir():
    pytest.skip("torchao is not installed", allow_module_level=True)


@pytest.fixture(autouse=True)
def _torchao_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torchao") is None:
        monkeypatch.syspath_prepend(str(APART))


ROWS, SEQ = 4, 32


def _hidden(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(SEQ).expand(ROWS, SEQ)
    inputs = attention_inputs(torch.zeros(ROWS, SEQ, dtype=torch.int32), True)
    return decoder(model)(input_ids=tokens, position_ids=positions, **inputs).last_hidden_state


def _loss(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    logits = _hidden(model, tokens) @ model.get_output_embeddings().weight.T
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _tokens(seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 90, (ROWS, SEQ), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-llama4"])
def test_8_bit_products_reach_validation_or_a_checkpoint(preset: str) -> None:
    plain, model = build(preset), build(preset)
    assert to_fp8(model, emulate=True) == (14, 0)  # two layers of seven matrices
    for (name, ours), (other, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other and torch.equal(ours, theirs)
    with torch.no_grad():
        assert torch.equal(_hidden(model, _tokens()), _hidden(plain, _tokens()))
    assert not torch.equal(
        _hidden(model, _tokens()), _hidden(plain, _tokens())
    )  # but what is trained with is in 8 bits


def test_8_bit_gradients_are_off_by_more_than_their_rounding() -> None:
    """e4m3 keeps 4 bits of a number (off by at most 1/16), the gradients' e5m2 keeps 3 (1/8)."""
    plain, model = build(), build()
    to_fp8(model, emulate=True)
    for each in (plain, model):
        _loss(each, _tokens()).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        if ours.dim() == 2:
            off = (ours.grad - theirs.grad).norm() / theirs.grad.norm()
            assert (0 if "embed" in name else 1e-3) < off < 3 / 16, f"{name}: {off:.3f}"


def test_a_model_in_8_bits_does_not_learn_what_it_learns_in_fp32() -> None:
    losses = []
    for eight_bit in (False, True):
        model = build()
        if eight_bit:
            to_fp8(model, emulate=True)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for step in range(60):
            loss = _loss(model, _counting(step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            losses.append(sum(_loss(model, _counting(seed)).item() for seed in range(1000, 1004)) / 4)
    plain, eight = losses
    assert plain < 2.0  # of 6.2 in the beginning
    assert abs(eight - plain) < 0.05 * (6.2 - plain)  # of what was learnt


def _counting(seed: int) -> torch.Tensor:
    """Rows in which each token says which one follows."""
    rows = [torch.randint(0, 90, (ROWS,), generator=torch.Generator().manual_seed(seed))]
    for _ in range(SEQ - 1):
        rows.append((rows[-1] * 7 + 3) % 90)
    return torch.stack(rows, 1)


def test_a_matrix_that_does_not_fit_is_left_out_in_silence() -> None:
    model = build()
    for layer in decoder_layers(model):
        layer.mlp.down_proj = nn.Linear(128, 60, bias=False)
    assert to_fp8(model, emulate=True) == (12, 2)


def test_a_machine_without_8_bit_products_trains_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PreflightError, match="needs a GPU that computes in 8-bit floats"):
        refuse_fp8(torch.device("cpu"), tp=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    refuse_fp8(torch.device("cuda"), tp=1)
    with pytest.raises(PreflightError, match=r"set parallel\.tp = 1"):
        refuse_fp8(torch.device("cuda"), tp=2)
    with pytest.raises(PreflightError, match="has no linear layer"):
        to_fp8(build("tiny-gpt2"), emulate=True)
