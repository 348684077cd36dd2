"""A teacher in the training step: whatever the layout and the accumulation, one student comes out.

A teacher that sees other documents, another vocabulary or a part of its head would still give a loss that falls.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cheaptrain_kernels import DistillationLoss, linear_distillation_reference
from cheaptrain_kernels import TeacherHead as Head
from model_helpers import build
from ranks import run_ranks
from torch import Tensor
from torch.distributed.tensor import DTensor

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import build_model
from cheaptrain.model.context import Context
from cheaptrain.model.parts import decoder_layers, head
from cheaptrain.parallel.mesh import data_rank, make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Distill, Model, Train
from cheaptrain.train.distillation import Distillation, distillation_loss
from cheaptrain.train.objective import Compute, hidden_states
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.step import train_step
from cheaptrain.train.teacher import load_teacher, teacher_config

torch.set_num_threads(1)

SEQ, ROWS, TOKENS = 32, 8, 490  # heads: 512 rows of the student, 576 of the teacher
LAYOUTS = {
    "fsdp2": Layout(dp_shard=2),
    "fsdp4": Layout(dp_shard=4),
    "hsdp2x2": Layout(dp_replicate=2, dp_shard=2),
    "fsdp2xtp2": Layout(dp_shard=2, tp=2),
    "tp2": Layout(tp=2),
    "cp2": Layout(cp=2),
}
WIDE = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 576}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A larger teacher of another class, its head padded to another size."""
    folder = tmp_path_factory.mktemp("teacher")
    model = build(
        Model(preset="tiny-llama", overrides=WIDE | {"tie_word_embeddings": False}), vocab_size=TOKENS, seed=5
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is sure of something
    model.save_pretrained(folder)
    return str(folder)


def _batch(step: int = 0) -> RowBatch:
    draw = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, TOKENS, (ROWS, SEQ + 1), generator=draw)
    labels = tokens[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=draw) < 0.2] = -100
    labels[3] = -100
    cuts = torch.rand(ROWS, SEQ, generator=draw) < 0.12
    cuts[:, 0] = False
    place = torch.arange(SEQ)
    positions = place - torch.where(cuts, place, 0).cummax(1).values
    documents = cuts.cumsum(1, dtype=torch.int32)
    supervised = int((labels >= 0).sum())
    return RowBatch(tokens[:, :-1].contiguous(), labels, positions, documents, np.arange(ROWS) % 2, supervised)


def _rows(batch: RowBatch, first: int, count: int) -> RowBatch:
    cut = slice(first, first + count)
    labels = batch.labels[cut]
    ids, positions, documents = batch.input_ids[cut], batch.position_ids[cut], batch.document_ids[cut]
    return RowBatch(ids, labels, positions, documents, batch.sources[cut], int((labels >= 0).sum()))


def _student() -> Any:
    spec = Model(preset="tiny-qwen3", overrides={"num_key_value_heads": 2})
    return build_model(spec, vocab_size=TOKENS, seq_len=SEQ, seed=1, eot_id=3)


def _one_step(rank: int, size: int, layout: Layout, distill: Distill, micro: int = 1) -> dict[str, Any]:
    processes = join(60)
    mesh = make_mesh(layout, "cpu")
    context = Context.of(mesh["cp"].get_group()) if layout.cp > 1 else None
    compute = Compute(torch.device("cpu"), torch.float32, True, 64, context)
    model = _student()
    read = load_teacher(
        distill,
        vocab_size=TOKENS,
        head_rows=model.config.vocab_size,
        seq_len=SEQ,
        mesh=mesh,
        processes=processes,
        compute=compute,
        compile_layers=False,
    )
    root = parallelize(model, mesh)
    optimizers = build_optimizers(model, Train(steps=1, global_batch_tokens=ROWS * SEQ, lr=1e-2))
    grads: dict[str, Tensor] = {}

    def keep(*_: Any) -> None:
        grads.update((name, _whole(p.grad)) for name, p in model.named_parameters() if p.grad is not None)

    optimizers[0].register_step_pre_hook(keep)
    mine = ROWS // layout.data_parallel
    first = data_rank(mesh) * mine
    batches = [_rows(_batch(), first + i, micro) for i in range(0, mine, micro)]
    shared = [batch.share(mesh["cp"].get_local_rank(), layout.cp) for batch in batches]
    result = train_step(
        root,
        optimizers,
        shared,
        mesh=mesh,
        objective=Distillation(read.says, distillation_loss(distill), TOKENS),
        compute=compute,
        sources=2,
        learning_rate_factor=1.0,
        grad_clip=0.0,
    ).result()
    assert result.applied and result.taught is not None
    assert all(p.grad is None and not p.requires_grad for p in read.root.parameters())
    # Its embedding and head stay gathered.
    parameters = decoder_layers(read.root.model).parameters()
    shards = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters)
    return {
        "loss": result.loss,
        "taught": result.taught,
        "accuracy": result.accuracy,
        "norm": result.grad_norm,
        "counts": result.counts,
        "grads": {name: grad.numpy() for name, grad in grads.items()},
        "teacher_numbers": shards,
    }


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@functools.cache
def _alone(distill: Distill) -> dict[str, Any]:
    one: dict[str, Any] = run_ranks(functools.partial(_one_step, layout=Layout(), distill=distill), 1)[0]
    return one


def _accumulated(rank: int, size: int, teacher: str) -> list[list[dict[str, Any]]]:
    return [
        [_one_step(rank, size, Layout(), _distill(teacher, divergence=divergence), micro) for micro in (1, 2, 8)]
        for divergence in ("forward_kl", "reverse_kl", "jsd")
    ]


def _compare(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert got["loss"] == pytest.approx(wanted["loss"], abs=2e-6)
    for name in ("divergence", "cross_entropy", "agreement"):
        assert getattr(got["taught"], name) == pytest.approx(getattr(wanted["taught"], name), abs=2e-6), name
    assert got["accuracy"] == wanted["accuracy"] and got["counts"] == wanted["counts"]
    assert got["norm"] == pytest.approx(wanted["norm"], rel=1e-5)
    assert got["grads"].keys() == wanted["grads"].keys()
    for name, grad in wanted["grads"].items():
        assert np.abs(got["grads"][name] - grad).max() <= 1e-5 * max(1e-2, np.abs(grad).max()), name


def _distill(teacher: str, **more: Any) -> Distill:
    return Distill.model_validate({"teacher": teacher, "temperature": 2.0, "alpha": 0.7, **more})


@pytest.mark.parametrize("name", LAYOUTS)
def test_teacher_and_student_on_many_processes_equal_one(teacher: str, name: str) -> None:
    layout, distill = LAYOUTS[name], _distill(teacher, divergence="jsd", jsd_beta=0.3)
    wanted = _alone(distill)
    everywhere = run_ranks(functools.partial(_one_step, layout=layout, distill=distill), layout.world_size)
    for got in everywhere:
        assert got["loss"] == everywhere[0]["loss"] and got["norm"] == everywhere[0]["norm"], "ranks disagree"
        _compare(got, wanted)
    if layout.dp_shard * layout.tp * layout.cp > 1:
        assert everywhere[0]["teacher_numbers"] < 0.6 * wanted["teacher_numbers"], "the teacher is not sharded"


def test_accumulation_does_not_change_what_the_teacher_teaches(teacher: str) -> None:
    for alone, *others in run_ranks(_accumulated, 1, teacher)[0]:
        for got in others:
            _compare(got, alone)


def test_a_step_is_that_of_whole_logits_and_autograd(teacher: str) -> None:
    """All of it at once, without any chunk, packing apart: the same rows through both models."""
    distill = _distill(teacher)
    got = _alone(distill)
    compute, batch, student = Compute(torch.device("cpu"), torch.float32, True, 64), _batch(), _student()
    model = build_model(Model(init_from=teacher), vocab_size=TOKENS, seq_len=SEQ, seed=0, eot_id=0).eval()
    with torch.no_grad():
        said = Head(hidden_states(model, batch, compute).flatten(0, 1), head(model).weight)
    hidden = hidden_states(student, batch, compute).flatten(0, 1)
    loss = DistillationLoss("forward_kl", temperature=2.0, alpha=0.7)
    sums = linear_distillation_reference(
        hidden, head(student).weight, said, batch.labels.flatten(), loss=loss, vocab=TOKENS
    )
    (sums.loss / batch.supervised).backward()
    assert got["loss"] == pytest.approx(sums.loss.item() / batch.supervised, rel=1e-6)
    assert got["taught"].agreement == sums.agreed.item() / batch.supervised
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None
        assert np.abs(got["grads"][name] - parameter.grad.numpy()).max() <= 1e-5 * parameter.grad.abs().max(), name


def test_a_teacher_that_is_the_student_has_nothing_to_teach(tmp_path: Path) -> None:
    _student().save_pretrained(tmp_path)
    got = _alone(_distill(str(tmp_path), alpha=1.0, temperature=1.0))
    assert got["taught"].divergence == pytest.approx(0, abs=1e-6) and got["taught"].agreement == 1.0
    assert max(np.abs(grad).max() for grad in got["grads"].values()) < 1e-6


def test_a_bf16_teacher_says_nearly_the_same(teacher: str) -> None:
    exact, rounded = _alone(_distill(teacher)), _alone(_distill(teacher, precision="bf16"))
    assert rounded["loss"] != exact["loss"]
    assert rounded["taught"].divergence == pytest.approx(exact["taught"].divergence, rel=2e-2)
    assert rounded["taught"].cross_entropy == exact["taught"].cross_entropy


def test_top_k_of_every_token_is_the_whole_teacher(teacher: str) -> None:
    _compare(_alone(_distill(teacher, top_k=TOKENS)), _alone(_distill(teacher)))
    few = _alone(_distill(teacher, top_k=3))
    assert 0 < few["taught"].divergence < _alone(_distill(teacher))["taught"].divergence


def _refused(rank: int, size: int, layout: Layout, distill: Distill) -> str:
    try:
        _one_step(rank, size, layout, distill)
    except (PreflightError, RecipeError) as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        (Layout(tp=2), {"top_k": 4}, "distill.top_k = 4 needs whole rows of logits"),
        (Layout(), {"precision": "int8"}, "run: pip install torchao"),
        (Layout(), {"teacher": "nowhere/at/all"}, "distill.teacher: there is no folder nowhere/at/all"),
    ],
)
def test_what_cannot_be_had_is_refused_in_words(
    teacher: str, layout: Layout, keys: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cheaptrain.train import teacher as module

    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    said = run_ranks(
        functools.partial(_refused, layout=layout, distill=_distill(**{"teacher": teacher} | keys)), layout.world_size
    )
    assert all(message in each for each in said), said


def test_rows_longer_than_the_teacher_has_positions_are_refused(teacher: str) -> None:
    positions = teacher_config(Model(init_from=teacher), vocab_size=TOKENS, seq_len=SEQ).max_position_embeddings
    with pytest.raises(RecipeError, match=f"distill.teacher: it has {positions:,} positions, and rows are"):
        teacher_config(Model(init_from=teacher), vocab_size=TOKENS, seq_len=positions + 1)
