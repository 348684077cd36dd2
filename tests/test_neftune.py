"""Noise on embeddings: of the size that the length of each document asks for, in training and nowhere else."""

from dataclasses import replace

import pytest
import torch
from model_helpers import LAYOUTS, build, positions_and_documents, tokens

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.context import Context
from cheaptrain.train.neftune import document_lengths, noisy
from cheaptrain.train.objective import Compute, hidden_states

COMPUTE = Compute(torch.device("cpu"), torch.float32, document_mask=True, loss_chunk_tokens=64)


def batch() -> RowBatch:
    ids, (positions, documents) = tokens(), positions_and_documents()
    return RowBatch(ids, ids, positions, documents, documents.numpy()[:, 0], ids.numel())


def test_noise_goes_by_the_row_instead_of_the_document() -> None:
    lengths = document_lengths(batch().document_ids)
    assert lengths.tolist() == [[float(n) for n in layout for _ in range(n)] for layout in LAYOUTS]
    torch.manual_seed(0)
    hidden = 4096
    noise = noisy(torch.zeros(3, 32, hidden), batch(), 5.0, None)
    bound = 5.0 / (lengths * hidden).sqrt()
    largest = noise.abs().amax(2)
    assert (largest <= bound).all() and (largest > 0.99 * bound).all()
    assert noise.mean().abs() < 1e-3 * bound.max()


def test_processes_that_share_a_row_take_the_lengths_of_other_tokens() -> None:
    whole = batch()
    scales = []
    for rank in range(4):
        embeddings = torch.zeros(3, 8, 20_000)
        scales.append(noisy(embeddings, whole, 1.0, Context("", 4, rank)).abs().amax(2))
    expected = 1.0 / (document_lengths(whole.document_ids) * 20_000).sqrt()
    assert torch.allclose(torch.cat(scales, 1), expected, rtol=1e-2)


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-gpt2"])
def test_a_model_that_does_not_train_gets_noise(preset: str) -> None:
    model, rows = build(preset), batch()
    noise = replace(COMPUTE, neftune_alpha=5.0)
    plain = hidden_states(model.eval(), rows, COMPUTE)
    assert torch.equal(hidden_states(model, rows, noise), plain)
    model.train()
    torch.manual_seed(3)
    first = hidden_states(model, rows, noise)
    torch.manual_seed(3)
    assert torch.equal(hidden_states(model, rows, noise), first)
    assert not torch.allclose(first, plain, atol=1e-3)
    first.sum().backward()
    assert model.get_input_embeddings().weight.grad.abs().max() > 0
