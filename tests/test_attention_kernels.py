"""Each kernel gets its rows, heads, boundaries and scale as its library wants them, and a compiled layer keeps it.

The libraries are stand-ins with the signatures of the real ones (`fake_flash_attn.py`); what only a GPU can tell is in
`test_attention_gpu.py`.
"""

import sys
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from fake_flash_attn import flash_attn_2, flash_attn_3, flash_attn_4
from torch import Tensor

from cheaptrain.errors import CheaptrainError
from cheaptrain.model import attention
from cheaptrain.model.attention import AttentionChoice, attention_inputs, cheaptrain_attention, kernels, libraries
from cheaptrain.model.attention.check import forward_backward, largest_difference, written_out
from cheaptrain.model.attention.packing import Padded, packing_of

torch.set_num_threads(1)

DOCUMENTS = torch.tensor([[0] * 1 + [1] * 12 + [2] * 11, [0] * 23 + [1] * 1], dtype=torch.int32)
FLASH4 = "cheaptrain.model.attention.flash4"


@pytest.fixture(params=["flash2", "flash3", "flash3 with tuples", "flash4"])
def library(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a library that is there."""
    name = request.param.partition(" ")[0]
    modules = {
        "flash2": lambda: {"flash_attn": flash_attn_2()},
        "flash3": lambda: {"flash_attn_interface": flash_attn_3(tuples="tuples" in request.param)},
        "flash4": flash_attn_4,
    }[name]()
    for module, fake in modules.items():
        monkeypatch.setitem(sys.modules, module, fake)
    monkeypatch.setattr(libraries, "_CAUSAL", {})
    monkeypatch.setattr(libraries, "_PACKED", {})
    assert libraries.why_not(name) is None
    yield name
    sys.modules.pop(FLASH4, None)


def _inputs(dtype: torch.dtype = torch.bfloat16) -> tuple[list[Tensor], Tensor]:
    """Query, key and value `[rows, heads, seq, dim]`, grouped, laid out as projections leave them; the weights of a
    loss."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(2, 24, heads, 8, generator=generator).to(dtype) for heads in (4, 2, 2, 4)]
    return [x.transpose(1, 2) for x in made[:3]], made[3]


def _plain(documents: Tensor, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return written_out(query, key, value, documents, 0.3).transpose(1, 2)

    return forward_backward(attend, [x.float() for x in inputs], weights.float())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_library_gets_its_arguments_in_other_places(library: str, compiled: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    inputs, weights = _inputs()
    boundaries = packing_of(DOCUMENTS, True).boundaries
    assert boundaries is not None and len(boundaries) == 17  # documents of one token, and empty ones
    ways = {
        "causal": (lambda q, k, v: kernels.causal(library, q, k, v, 0.0, 0.3), torch.zeros_like(DOCUMENTS)),
        "packed": (lambda q, k, v: kernels.packed(library, q, k, v, boundaries, 0.0, 0.3), DOCUMENTS),
    }
    for way, (attend, documents) in ways.items():
        run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
        got = forward_backward(run, inputs, weights)
        assert got[0].shape == (2, 24, 4, 8) and got[0].dtype == torch.bfloat16, way
        assert largest_difference(got, _plain(documents, inputs, weights)) < 0.02, way
    if compiled:
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("library", ["flash4"], indirect=True)
def test_flash4_operators_promise_other_shapes_than_they_give(library: str) -> None:
    from cheaptrain.model.attention import flash4 as attention_flash4

    (query, key, value), _ = _inputs()
    query, key, value = (x.transpose(1, 2).detach().requires_grad_() for x in (query, key, value))
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(attention_flash4._forward, (query, key, value, None, 0, 0.3), test_utils=tests)
    flat = [x.detach().flatten(0, 1).requires_grad_() for x in (query, key, value)]
    boundaries = packing_of(DOCUMENTS, True).boundaries
    torch.library.opcheck(attention_flash4._forward, (*flat, boundaries, 24, 0.3), test_utils=tests)


def test_a_library_that_is_not_there_is_taken_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_CAUSAL", {})
    for name in libraries.NAMES:
        assert libraries.why_not(name) == "not installed"
    with monkeypatch.context() as only_four:
        for module, fake in flash_attn_4().items():
            only_four.setitem(sys.modules, module, fake)
        assert libraries.why_not("flash2") == "not installed"  # flash_attn is there, as a folder of version 4
    sys.modules.pop(FLASH4, None)

    class Broken:
        def find_spec(self, name: str, path: object, target: object = None) -> None:
            if name == "flash_attn_interface":
                raise OSError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    assert libraries.why_not("flash3") == "does not load: OSError: undefined symbol: _ZN3c10"


@pytest.mark.parametrize("kernel", ["cudnn", "flash", "efficient"])
def test_sdpa_kernels_break_a_compiled_graph_or_attend_otherwise(kernel: str) -> None:
    """On a CPU none of the three that GPUs have may be there: then the line falls to the one that is."""
    torch._dynamo.reset()
    inputs, weights = _inputs()
    expected = _plain(torch.zeros_like(DOCUMENTS), inputs, weights)
    attend = partial(kernels.causal, kernel)
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        got = forward_backward(lambda q, k, v, run=run: run(q, k, v, 0.0, 0.3), inputs, weights)
        assert largest_difference(got, expected) < 0.02


def test_the_kernel_asked_for_is_tried_through_another() -> None:
    inputs, _ = _inputs()
    with pytest.raises(RuntimeError, match=r"No (viable|available)"):
        kernels.sdpa_alone("cudnn", *inputs, None)


def test_dropout_is_dropped_by_a_kernel_without_it(library: str) -> None:
    inputs, _ = _inputs()
    boundaries = packing_of(DOCUMENTS, True).boundaries
    assert boundaries is not None
    if library == "flash2":
        with pytest.raises(AssertionError):  # it reaches the library, and the stand-in has none
            kernels.packed(library, *inputs, boundaries, 0.1, None)
        return
    for attend in (partial(kernels.causal, library, *inputs), partial(kernels.packed, library, *inputs, boundaries)):
        with pytest.raises(CheaptrainError, match=r"attention dropout is 0\.1"):
            attend(0.1, None)


def test_the_choice_of_a_run_does_not_reach_attention(library: str) -> None:
    """Through the keyword arguments of the decoder, as training hands it over."""
    called = []
    libraries._PACKED[library] = lambda query, *others, **more: called.append(more) or query
    (query, key, value), _ = _inputs()
    packing = packing_of(DOCUMENTS, True)
    inputs = {"packing": "varlen", "packing_kernel": library, "packing_boundaries": packing.boundaries}
    cheaptrain_attention(torch.nn.Module(), query, key, value, None, **inputs)
    assert len(called) == 1 and called[0]["max_seqlen_q"] == 24
    on_gpu = AttentionChoice("flash", library)
    assert attention_inputs(DOCUMENTS, True, choice=on_gpu)["packing_kernel"] is None  # on a CPU there is no choice


@pytest.mark.parametrize("longest", [512, 8])
def test_packed_rows_in_fp32_see_other_documents(monkeypatch: pytest.MonkeyPatch, longest: int) -> None:
    """The GPU's way for the precision that its kernels do not know, by a mask and document by document."""
    monkeypatch.setattr(attention, "LONGEST_MASK", longest)
    inputs, weights = _inputs(torch.float32)
    given = {
        "packing": "varlen",
        "packing_kernel": "varlen",
        "packing_boundaries": packing_of(DOCUMENTS, True).boundaries,
    }

    def attend(*heads: Tensor) -> Tensor:
        return cheaptrain_attention(torch.nn.Module(), *heads, None, scaling=0.3, **given)[0]

    assert largest_difference(forward_backward(attend, inputs, weights), _plain(DOCUMENTS, inputs, weights)) < 1e-5


def test_boundaries_change_their_length_from_batch_to_batch() -> None:
    """Each length is a compilation of every layer: the longest so far stays."""
    few, many = torch.arange(24).reshape(1, -1) // 6, torch.arange(24).reshape(1, -1)
    padded = Padded()
    lengths = [len(packing_of(ids, True, padded).boundaries) for ids in (few, many, few)]
    assert lengths == [17, 33, 33]
    later = packing_of(few, True, padded).boundaries
    assert later.tolist() == [0, 6, 12, 18, *[24] * 29]
    assert packing_of(torch.zeros(1, 24), True, padded).boundaries is None
    assert len(packing_of(few, True).boundaries) == 17
    assert len(attention_inputs(few.repeat(1, 30), True, padded=padded)["packing_boundaries"]) == 129
