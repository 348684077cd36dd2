"""On a GPU: every attention kernel there is gives the numbers of plain arithmetic, at shapes that models have.

Skipped without one. Kernels that this machine cannot run are skipped with the reason; cuDNN or flash, and varlen, have
to be there.
"""

from functools import partial

import pytest
import torch
from torch import Tensor

from cheaptrain.model.attention import AttentionChoice, inputs_of, kernels, libraries
from cheaptrain.model.attention.check import HALF_ALLOWED, forward_backward, largest_difference, written_out
from cheaptrain.model.attention.choice import AttentionShape, sample_documents, try_attention
from cheaptrain.model.attention.packing import Padded, packing_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

HEADS = [(4, 4, 64), (6, 2, 64), (8, 1, 64), (4, 2, 128), (9, 3, 64)]  # heads, key and value heads, head_dim
# Documents of one token at either end and in between; rows of one document; the boundaries have empty ones behind them.
CUTS = [[1, 2, 70, 71, 150], [191, 190, 64, 128, 129], []]
SEQ = 192


def _documents() -> Tensor:
    rows = [(torch.arange(SEQ)[:, None] >= torch.tensor([*cuts, SEQ])).sum(-1) for cuts in CUTS]
    return torch.stack(rows).to(torch.int32)


def _inputs(heads: int, kv_heads: int, head_dim: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    made = [
        torch.randn((len(CUTS), SEQ, count, head_dim), generator=generator, device="cuda", dtype=torch.bfloat16)
        for count in (heads, kv_heads, kv_heads, heads)
    ]
    return [x.transpose(1, 2) for x in made[:3]], made[3]


def _expected(inputs: list[Tensor], weights: Tensor, documents: Tensor, scaling: float) -> list[Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return written_out(query, key, value, documents.cuda(), scaling).transpose(1, 2)

    return forward_backward(attend, [x.double() for x in inputs], weights.double())


def _skip_unless_there(name: str) -> None:
    if name in libraries.NAMES and (reason := libraries.why_not(name)):
        pytest.skip(f"{kernels.LABELS[name]}: {reason}")


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", kernels.CAUSAL_KERNELS)
def test_a_causal_kernel_attends_otherwise(name: str, heads: tuple[int, int, int]) -> None:
    _skip_unless_there(name)
    inputs, weights = _inputs(*heads)
    scaling = 1.5 * heads[2] ** -0.5
    expected = _expected(inputs, weights, torch.zeros(len(CUTS), SEQ), scaling)
    in_line = forward_backward(partial(_causal, name, scaling), inputs, weights)
    assert largest_difference(in_line, expected) <= HALF_ALLOWED
    if name not in libraries.NAMES:
        try:
            alone = forward_backward(lambda q, k, v: kernels.sdpa_alone(name, q, k, v, scaling), inputs, weights)
        except RuntimeError as error:
            pytest.skip(f"SDPA has no {name} for {heads} here: {error}")
        assert largest_difference(alone, expected) <= HALF_ALLOWED


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("name", kernels.PACKED_KERNELS)
def test_documents_of_a_packed_row_see_each_other(name: str, heads: tuple[int, int, int]) -> None:
    _skip_unless_there(name)
    inputs, weights = _inputs(*heads)
    scaling = 1.5 * heads[2] ** -0.5
    documents = _documents()
    expected = _expected(inputs, weights, documents, scaling)
    for padded in (None, _longest(64)):
        boundaries = packing_of(documents, True, padded).boundaries
        assert boundaries is not None
        attend = partial(_packed, name, boundaries.cuda(), scaling)
        assert largest_difference(forward_backward(attend, inputs, weights), expected) <= HALF_ALLOWED


@pytest.mark.parametrize("name", [*kernels.CAUSAL_KERNELS, "varlen"])
def test_a_compiled_layer_breaks_at_the_kernel(name: str) -> None:
    _skip_unless_there(name)
    torch._dynamo.reset()
    inputs, weights = _inputs(6, 2, 64)
    boundaries = packing_of(_documents(), True).boundaries
    assert boundaries is not None
    ways = []
    if name in kernels.CAUSAL_KERNELS:
        ways.append(partial(_causal, name, 0.2))
    if name in kernels.PACKED_KERNELS:
        ways.append(partial(_packed, name, boundaries.cuda(), 0.2))
    for attend in ways:
        plain = forward_backward(attend, inputs, weights)
        compiled = forward_backward(torch.compile(attend, fullgraph=True), inputs, weights)
        assert largest_difference(compiled, [x.double() for x in plain]) <= 1e-2


def test_no_kernel_is_found_or_the_trial_keeps_memory() -> None:
    shape = AttentionShape(rows=4, seq=1024, heads=6, kv_heads=2, head_dim=64)
    device = torch.device("cuda")
    torch.cuda.empty_cache()
    held, state = torch.cuda.memory_reserved(), torch.cuda.get_rng_state()
    for documents in (None, sample_documents(4, 1024)):
        trial = try_attention(shape, device, documents)
        assert trial.fastest is not None, trial
        assert all(0 < milliseconds < 1000 for milliseconds in trial.milliseconds.values()), trial
        assert set(trial.milliseconds).isdisjoint(trial.refused)
    assert torch.cuda.memory_reserved() - held < 128 * 1024**2  # matrix products keep a workspace
    assert torch.equal(state, torch.cuda.get_rng_state())


def test_a_shape_that_does_not_fit_ends_the_trial() -> None:
    free, _ = torch.cuda.mem_get_info()
    rows = 2 * free // (2 * 4096 * 32 * 128) + 1  # the query alone takes twice what is free
    trial = try_attention(AttentionShape(rows, 4096, 32, 32, 128), torch.device("cuda"), names=["cudnn", "flash"])
    assert trial.milliseconds == {} and set(trial.refused.values()) <= {
        "does not fit in memory at this shape", "does not do this shape here"
    }  # fmt: skip
    assert try_attention(AttentionShape(1, 256, 4, 4, 64), torch.device("cuda")).fastest is not None


def test_a_packing_made_ahead_is_another_than_one_made_on_the_spot() -> None:
    documents = _documents()
    choice = AttentionChoice("flash", "varlen")
    ahead = inputs_of(packing_of(documents, True).pinned(), "cuda", choice=choice)
    here = inputs_of(packing_of(documents, True), "cuda", choice=choice)
    assert ahead["packing"] == "varlen" and ahead["packing_kernel"] == "varlen"
    assert ahead["packing_boundaries"].is_cuda
    assert torch.equal(ahead["packing_boundaries"], here["packing_boundaries"])
    plain = inputs_of(packing_of(documents, False), "cuda", choice=choice)
    assert plain["packing"] == "causal" and plain["packing_kernel"] == "flash"


def _causal(name: str, scaling: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return kernels.causal(name, query, key, value, 0.0, scaling)


def _packed(name: str, boundaries: Tensor, scaling: float, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return kernels.packed(name, query, key, value, boundaries, 0.0, scaling)


def _longest(documents: int) -> Padded:
    padded = Padded()
    padded.documents = documents
    return padded
