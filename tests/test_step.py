"""One optimizer step: accumulation, masks and packing must not change what is learnt."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from cheaptrain_kernels import linear_cross_entropy_reference
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.build import build_model
from cheaptrain.model.twin import plain_twin
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join, leave
from cheaptrain.parallel.root import Root
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Model, Train
from cheaptrain.train.objective import Compute, hidden_states, next_token
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.step import StepResult, train_step

SEQ = 24
COMPUTE = Compute(torch.device("cpu"), torch.float32, document_mask=True, loss_chunk_tokens=64)


def _model(preset: str = "tiny-qwen3") -> PreTrainedModel:
    return build_model(Model(preset=preset), vocab_size=200, seq_len=SEQ, seed=3, eot_id=0)


def _train(**changes: object) -> Train:
    values = {"steps": 1, "global_batch_tokens": 8 * SEQ, "lr": 1e-3}
    return Train.model_validate(values | changes)


def _rows(count: int) -> RowBatch:
    """`count` rows of several documents each; the rows differ in how many positions are supervised."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, 200, (count, SEQ + 1), generator=generator)
    labels, positions, documents = tokens[:, 1:].clone(), torch.zeros(count, SEQ, dtype=torch.int64), []
    for row in range(count):
        starts = [0, *sorted({3 + row, 11, 17 + row % 3})]
        ids = torch.zeros(SEQ, dtype=torch.int32)
        for number, (start, stop) in enumerate(zip(starts, [*starts[1:], SEQ], strict=True)):
            ids[start:stop] = number
            positions[row, start:stop] = torch.arange(stop - start)
            if stop < SEQ:
                labels[row, stop - 1] = -100
        labels[row, : 2 * row] = -100  # uneven, so that a mean of means would show
        documents.append(ids)
    supervised = int((labels != -100).sum())
    return RowBatch(
        tokens[:, :-1].clone(), labels, positions, torch.stack(documents), np.zeros(count, np.int64), supervised
    )


def _split(batch: RowBatch, parts: int) -> list[RowBatch]:
    pieces = [
        [getattr(batch, name).chunk(parts)[part] for name in ("input_ids", "labels", "position_ids", "document_ids")]
        for part in range(parts)
    ]
    return [RowBatch(*piece, np.zeros(len(piece[0]), np.int64), int((piece[1] != -100).sum())) for piece in pieces]


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    join(60)
    yield make_mesh(Layout(), "cpu")
    leave()


def _step(
    mesh: DeviceMesh,
    model: PreTrainedModel,
    batches: list[RowBatch],
    recompute: bool = False,
    compute: Compute = COMPUTE,
    **changes: object,
) -> tuple[StepResult, list[torch.Tensor]]:
    """One step with the gradients it used: the optimizer's own step is watched."""
    train = _train(**changes)
    root = parallelize(model, mesh, recompute=recompute)
    optimizers = build_optimizers(model, train)
    gradients: list[torch.Tensor] = []
    optimizers[0].register_step_pre_hook(lambda *_: gradients.extend(p.grad.clone() for p in model.parameters()))
    result = train_step(
        root,
        optimizers,
        batches,
        mesh=mesh,
        sources=1,
        objective=next_token,
        compute=compute,
        learning_rate_factor=1.0,
        grad_clip=train.grad_clip,
    ).result()
    return result, gradients


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-llama4", "tiny-gpt2"])
def test_accumulation_changes_neither_loss_nor_gradients(mesh: DeviceMesh, preset: str) -> None:
    whole, gradients = _step(mesh, _model(preset), [_rows(8)], grad_clip=0.0)
    for parts in (2, 4):
        result, split_gradients = _step(mesh, _model(preset), _split(_rows(8), parts), grad_clip=0.0)
        assert result.loss == pytest.approx(whole.loss, abs=1e-6)
        assert result.grad_norm == pytest.approx(whole.grad_norm, rel=1e-5)
        assert result.counts == whole.counts
        for ours, theirs in zip(split_gradients, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("preset", ["tiny-qwen3", "tiny-llama", "tiny-llama4", "tiny-gpt2"])
def test_packed_rows_teach_what_their_documents_teach_one_by_one(mesh: DeviceMesh, preset: str) -> None:
    batch = _rows(4)
    packed, gradients = _step(mesh, _model(preset), [batch], grad_clip=0.0)
    model = _model(preset)
    twin = plain_twin(model)
    total, count = torch.zeros(()), 0
    for row in range(4):
        for number in batch.document_ids[row].unique():
            here = batch.document_ids[row] == number
            logits = twin(batch.input_ids[row][here][None], use_cache=False).logits[0]
            loss, *_ = linear_cross_entropy_reference(logits, torch.eye(logits.shape[1]), batch.labels[row][here])
            total, count = total + loss, count + int((batch.labels[row][here] != -100).sum())
    (total / count).backward()
    assert count == packed.counts.supervised
    assert packed.loss == pytest.approx((total / count).item(), abs=1e-6)
    for ours, parameter in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, atol=2e-6, rtol=0)


def test_a_micro_batch_without_supervised_tokens_adds_nothing(mesh: DeviceMesh) -> None:
    batch = _rows(4)
    empty = RowBatch(
        batch.input_ids, torch.full_like(batch.labels, -100), batch.position_ids, batch.document_ids, batch.sources, 0
    )
    alone, gradients = _step(mesh, _model(), [batch])
    both, with_empty = _step(mesh, _model(), [batch, empty])
    assert both.loss == alone.loss
    for ours, theirs in zip(with_empty, gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_clipping_scales_the_gradient_of_the_whole_batch(mesh: DeviceMesh) -> None:
    free, gradients = _step(mesh, _model(), _split(_rows(8), 2), grad_clip=0.0)
    limit = free.grad_norm / 2
    clipped, smaller = _step(mesh, _model(), _split(_rows(8), 2), grad_clip=limit)
    assert clipped.grad_norm == pytest.approx(free.grad_norm, rel=1e-6)  # reported before clipping
    norm = math.sqrt(sum(gradient.pow(2).sum().item() for gradient in smaller))
    assert norm == pytest.approx(limit, rel=1e-4)
    torch.testing.assert_close(smaller[0] * 2, gradients[0], atol=1e-6, rtol=1e-4)


def test_z_loss_hides_in_the_loss_or_depends_on_accumulation(mesh: DeviceMesh) -> None:
    batch, z = _rows(4), 0.05
    model = _model()
    logits = _hidden_logits(model, batch)
    supervised = batch.labels.flatten() != -100
    log_sums = logits.logsumexp(-1)[supervised]
    entropies = torch.nn.functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")[supervised]
    (entropies + z * log_sums.square()).mean().backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    assert z * log_sums.square().mean() > 0.5  # of a loss of 5.3: enough to show
    for parts in (1, 4):
        result, gradients = _step(mesh, _model(), _split(batch, parts), compute=replace(COMPUTE, z_loss=z), grad_clip=0)
        assert result.cross_entropy == pytest.approx(entropies.mean().item(), abs=1e-5)
        assert result.loss == pytest.approx((entropies + z * log_sums.square()).mean().item(), abs=1e-5)
        for ours, theirs in zip(gradients, wanted, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)
    plain, _ = _step(mesh, _model(), [batch])
    assert plain.cross_entropy is None and plain.loss == pytest.approx(entropies.mean().item(), abs=1e-5)


def _hidden_logits(model: PreTrainedModel, batch: RowBatch) -> torch.Tensor:
    hidden = hidden_states(model, batch, COMPUTE).flatten(0, 1)
    return hidden @ model.get_output_embeddings().weight.T


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_step_that_is_not_finite_touches_no_weight_and_no_moment(mesh: DeviceMesh, optimizer: str) -> None:
    model = _model()
    batch = _rows(4)
    with torch.no_grad():
        model.get_input_embeddings().weight[int(batch.input_ids[2, 5])] = float("nan")
    before = [parameter.clone() for parameter in model.parameters()]
    optimizers = build_optimizers(model, _train(optimizer=optimizer))
    result = train_step(
        Root(model),
        optimizers,
        [batch],
        mesh=mesh,
        sources=1,
        objective=next_token,
        compute=COMPUTE,
        learning_rate_factor=1.0,
        grad_clip=1.0,
    ).result()
    assert not result.applied
    assert math.isnan(result.loss)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7.0), new.detach().nan_to_num(7.0))
        assert new.grad is None
    moments = [each for optimizer in optimizers for state in optimizer.state.values() for each in state.values()]
    assert all(not each.any() for each in moments), "moments and counts of steps as they were: zero"


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    model = _model()
    muon, adamw = build_optimizers(model, _train(optimizer="muon", muon_lr=0.05))
    in_muon = {id(p) for group in muon.param_groups for p in group["params"]}
    hidden = {name for name, p in model.named_parameters() if id(p) in in_muon}
    assert hidden == {
        name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name
    }
    assert [group["peak_lr"] for group in muon.param_groups] == [0.05]
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.1, 0.0}


def test_vectors_do_not_decay() -> None:
    (adamw,) = build_optimizers(_model(), _train())
    decaying, plain = adamw.param_groups
    assert {p.dim() for p in decaying["params"]} == {2} and decaying["weight_decay"] == 0.1
    assert {p.dim() for p in plain["params"]} == {1} and plain["weight_decay"] == 0.0


def test_activation_checkpointing_changes_no_gradient(mesh: DeviceMesh) -> None:
    plain, gradients = _step(mesh, _model(), [_rows(4)])
    recomputed, again = _step(mesh, _model(), [_rows(4)], recompute=True)
    assert recomputed.loss == plain.loss
    for ours, theirs in zip(again, gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-7, rtol=0)
