"""On a GPU: the variable-length and the cuDNN path give what the CPU's mask gives. Skipped without one."""

import pytest
import torch
from model_helpers import LAYOUTS, TINY, build, positions_and_documents, tokens

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.compiled import compile_layers
from cheaptrain.model.parts import decoder, decoder_layers
from cheaptrain.model.proof import prove_documents_isolated, prove_head
from cheaptrain.recipe.schema import Model

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def _hidden(model, layouts, device: str, half: bool) -> torch.Tensor:
    positions, documents = positions_and_documents(layouts)
    inputs = attention_inputs(documents, True, device)
    assert inputs["packing"] == ("causal" if len(layouts[0]) == 1 else "varlen" if device == "cuda" else "dense")
    with torch.autocast(device, torch.bfloat16, enabled=half):
        output = decoder(model)(input_ids=tokens(layouts).to(device), position_ids=positions.to(device), **inputs)
    return output.last_hidden_state.float().cpu()


@pytest.mark.parametrize("preset", TINY)
@pytest.mark.parametrize("layouts", [LAYOUTS, [[32]] * 3])
def test_gpu_kernels_give_the_hidden_states_and_gradients_of_the_cpu(preset: str, layouts: list[list[int]]) -> None:
    here, there = build(preset), build(preset).to("cuda")
    a, b = _hidden(here, layouts, "cpu", True), _hidden(there, layouts, "cuda", True)
    assert (a - b).abs().max() < 0.05 * a.abs().max()
    exact = _hidden(there, layouts, "cuda", False)
    assert (exact - _hidden(here, layouts, "cpu", False)).abs().max() < 5e-3
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        if p.grad is not None:
            assert (p.grad - q.grad.cpu()).norm() < 0.1 * p.grad.norm()


@pytest.mark.parametrize("preset", TINY)
def test_proofs_pass_on_a_gpu(preset: str) -> None:
    model = build(preset).to("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        prove_documents_isolated(model, dtype=dtype)
        prove_documents_isolated(model, document_mask=False, dtype=dtype)
    prove_head(model)


def test_compiled_layers_do_not_recompile_with_the_number_of_documents() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, compiled = build().to("cuda"), build().to("cuda")
    compile_layers(decoder_layers(compiled))
    for layouts in (LAYOUTS, [[16, 16], [1, 31], [5, 27]], [[1] * 32] * 3, [[32]] * 3):
        a, b = (_hidden(model, layouts, "cuda", True) for model in (eager, compiled))
        assert (a - b).abs().max() < 0.05 * a.abs().max()
        b.square().sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # documents, however many, and causal
    assert not torch._dynamo.utils.counters["graph_break"]


def test_attention_dropout_of_packed_documents_is_refused_on_a_gpu() -> None:
    model = build(Model(preset="tiny-llama", overrides={"attention_dropout": 0.5})).to("cuda").train()
    with pytest.raises(CheaptrainError, match=r"attention dropout is 0\.5"):
        _hidden(model, LAYOUTS, "cuda", True)
