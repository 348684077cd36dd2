"""Learning from spans: the fused loss is the plain one, and neither layout nor accumulation changes a student."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cheaptrain_kernels import (
    DistillationLoss,
    SpanWord,
    linear_span_distillation,
    linear_span_distillation_reference,
)
from model_helpers import build
from ranks import run_ranks
from small_runs import (
    final_state,
    final_weights,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train,
    train_until,
    write_recipe,
    write_texts,
)
from torch import Tensor
from torch.distributed.tensor import DTensor

from cheaptrain.data.align import Aligned
from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import build_model
from cheaptrain.parallel.mesh import data_rank, make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.schema import Distill, Model, Train
from cheaptrain.train.aligned import AlignedDistillation, TeacherOfSpans, refuse_layout
from cheaptrain.train.distillation import distillation_loss
from cheaptrain.train.objective import Compute
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.step import train_step
from cheaptrain.train.teacher import load_teacher

torch.set_num_threads(1)
TOKENS, VOCAB, ROWS, WIDTH = 61, 9, 12, 24
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def _problem(scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, SpanWord, Tensor]:
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw) * scale
    weight = torch.randn(ROWS, WIDTH, generator=draw)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    labels[torch.rand(TOKENS, generator=draw) < 0.2] = -100
    positions = torch.nonzero(labels >= 0).flatten()[3:-2]
    lengths = torch.tensor([1, 2, 4, 1, 3, 1, 1, 5, 2])
    positions = positions[: int(lengths.sum())]
    log_p = -torch.rand(len(lengths), generator=draw) * 9 - 0.01
    return hidden, weight, labels, SpanWord(positions, lengths, log_p), torch.rand(TOKENS, generator=draw)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_fused_loss_of_spans_is_the_plain_one(
    divergence: Any, temperature: float, alpha: float, weighted: bool
) -> None:
    hidden, weight, labels, said, weights = _problem(0.15)
    loss = DistillationLoss(divergence, 0.3, temperature, alpha)
    results = []
    for function, more in ((linear_span_distillation, {"chunk_tokens": 7}), (linear_span_distillation_reference, {})):
        leaves = [each.clone().requires_grad_() for each in (hidden, weight)]
        given = {"loss": loss, "vocab": VOCAB, "weights": weights if weighted else None, **more}
        sums = function(*leaves, labels, said, **given)
        (sums.loss / 7).backward()
        results.append((sums, [each.grad for each in leaves]))
    (fused, grads), (plain, wanted) = results
    for name in ("loss", "divergence", "cross_entropy", "aligned"):
        assert getattr(fused, name).item() == pytest.approx(getattr(plain, name).item(), rel=1e-5), name
    assert fused.correct == plain.correct
    for got, want in zip(grads, wanted, strict=True):
        assert got is not None and want is not None and want.abs().max() > 1e-4
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_no_position_outside_of_spans_learns_from_the_teacher() -> None:
    hidden, weight, labels, said, _ = _problem()
    hidden.requires_grad_()
    loss = DistillationLoss(alpha=1.0)
    linear_span_distillation(hidden, weight, labels, said, loss=loss, vocab=VOCAB).loss.backward()
    assert hidden.grad is not None
    moved = set(torch.nonzero(hidden.grad.abs().sum(-1)).flatten().tolist())
    assert moved == set(said.positions.tolist())


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_sure_and_wrong_is_still_pulled_back(divergence: Any) -> None:
    weight = torch.eye(4)
    labels = torch.tensor([0, 0, 1, 2])
    said = SpanWord(torch.arange(4), torch.tensor([1, 1, 2]), torch.tensor([-1.5, -0.0, -300.0]))
    for sure in (10.0, 14.0, 200.0):
        hidden = torch.zeros(4, 4)
        hidden[torch.arange(4), labels] = sure
        hidden.requires_grad_()
        loss = DistillationLoss(divergence)
        sums = linear_span_distillation(hidden, weight, labels, said, loss=loss, vocab=4)
        sums.loss.backward()
        assert torch.isfinite(sums.loss) and hidden.grad is not None and torch.isfinite(hidden.grad).all()
        if sure == 10.0:
            assert hidden.grad[0, 0] > 1e-4 and hidden.grad[2, 1] > 1e-4, "less of what the teacher doubts"
    unlikely = torch.zeros(4, 4, requires_grad=True)
    with torch.no_grad():
        unlikely[torch.arange(4), labels] = -90.0
    sums = linear_span_distillation(unlikely, weight, labels, said, loss=DistillationLoss(divergence), vocab=4)
    sums.loss.backward()
    assert unlikely.grad is not None and torch.isfinite(sums.loss) and torch.isfinite(unlikely.grad).all()


def test_a_batch_without_spans_teaches_nothing_and_fails_nothing() -> None:
    hidden, weight, labels, _, _ = _problem()
    none = torch.empty(0, dtype=torch.int64)
    hidden.requires_grad_()
    sums = linear_span_distillation(
        hidden, weight, labels, SpanWord(none, none, torch.empty(0)), loss=DistillationLoss(), vocab=VOCAB
    )
    sums.loss.backward()
    assert hidden.grad is not None and sums.loss == 0 and sums.aligned == 0 and not hidden.grad.any()


# In a step: a larger teacher of another class and another vocabulary, reading rows of its own.

SEQ, STUDENTS, TEACHERS = 32, 490, 300
WIDE = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320}


def _row(number: int) -> tuple[dict[str, Tensor], list[int], Aligned]:
    """A row of two documents whose tokens the teacher has in pairs, and the teacher's row of it."""
    draw = torch.Generator().manual_seed(number)
    tokens = torch.randint(0, STUDENTS, (SEQ + 1,), generator=draw)
    labels = tokens[1:].clone()
    cut = 10 + 2 * number
    labels[cut - 1] = -100
    if number == 3:
        labels[:] = -100
    documents = (torch.arange(SEQ) >= cut).int()
    positions = torch.where(documents > 0, torch.arange(SEQ) - cut, torch.arange(SEQ))
    spans = [(at, at + 1) for at in range(1, SEQ - 2, 2) if labels[at] >= 0 and labels[at + 1] >= 0]
    theirs = torch.randint(0, TEACHERS, (SEQ,), generator=draw)
    targets = torch.full((SEQ,), -100)
    asked = torch.arange(len(spans)) + 2
    targets[asked] = torch.randint(0, TEACHERS, (len(spans),), generator=draw)
    theirs_documents = (torch.arange(SEQ) >= 9).int()
    theirs_positions = torch.where(theirs_documents > 0, torch.arange(SEQ) - 9, torch.arange(SEQ))
    ones, twos = torch.ones(len(spans), dtype=torch.int64), torch.full((len(spans),), 2)
    aligned = Aligned(
        theirs[None], targets[None], theirs_positions[None], theirs_documents[None],
        torch.tensor(spans, dtype=torch.int64).flatten(), twos, asked, ones,
    )  # fmt: skip
    return {"ids": tokens[:-1], "labels": labels, "positions": positions, "documents": documents}, [number % 2], aligned


def _batch(rows: range) -> RowBatch:
    found = [_row(number) for number in rows]
    together = {name: torch.stack([row[name] for row, _, _ in found]) for name in found[0][0]}
    offsets = [SEQ * i for i in range(len(found))]
    many = [aligned for _, _, aligned in found]
    aligned = Aligned(
        *(torch.cat([getattr(a, name) for a in many]) for name in ("ids", "targets", "position_ids", "document_ids")),
        torch.cat([a.student_positions + at for a, at in zip(many, offsets, strict=True)]),
        torch.cat([a.student_lengths for a in many]),
        torch.cat([a.teacher_positions + at for a, at in zip(many, offsets, strict=True)]),
        torch.cat([a.teacher_lengths for a in many]),
    )
    labels = together["labels"]
    return RowBatch(
        together["ids"], labels, together["positions"], together["documents"].int(), np.array(rows) % 2,
        int((labels >= 0).sum()), aligned=aligned,
    )  # fmt: skip


def _one_step(rank: int, size: int, teacher: str, layout: Layout, divergence: str, micro: int = 1) -> dict[str, Any]:
    distill = Distill.model_validate(
        {"teacher": teacher, "tokenizers": "align", "divergence": divergence, "temperature": 2.0, "alpha": 0.7}
    )
    processes = join(60)
    mesh = make_mesh(layout, "cpu")
    compute = Compute(torch.device("cpu"), torch.float32, True, 64)
    spec = Model(preset="tiny-qwen3", overrides={"num_key_value_heads": 2})
    model = build_model(spec, vocab_size=STUDENTS, seq_len=SEQ, seed=1, eot_id=3)
    read = load_teacher(
        distill,
        vocab_size=TEACHERS,
        head_rows=model.config.vocab_size,
        seq_len=SEQ,
        mesh=mesh,
        processes=processes,
        compute=compute,
        compile_layers=False,
    )
    root = parallelize(model, mesh)
    optimizers = build_optimizers(model, Train(steps=1, global_batch_tokens=8 * SEQ, lr=1e-2))
    grads: dict[str, Any] = {}

    def keep(*_: Any) -> None:
        for name, parameter in model.named_parameters():
            grad = parameter.grad
            assert grad is not None
            grads[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).numpy().copy()

    optimizers[0].register_step_pre_hook(keep)
    mine = 8 // layout.data_parallel
    first = data_rank(mesh) * mine
    result = train_step(
        root,
        optimizers,
        [_batch(range(first + i, first + i + micro)) for i in range(0, mine, micro)],
        mesh=mesh,
        objective=AlignedDistillation(TeacherOfSpans(read, TEACHERS).says, distillation_loss(distill), STUDENTS),
        compute=compute,
        sources=2,
        learning_rate_factor=1.0,
        grad_clip=0.0,
    ).result()
    assert result.applied and result.taught is not None and result.taught.agreement is None
    return {"result": result, "grads": grads}


def _accumulated(rank: int, size: int, teacher: str) -> list[list[dict[str, Any]]]:
    return [[_one_step(rank, size, teacher, Layout(), each, micro) for micro in (1, 2, 8)] for each in DIVERGENCES]


def _same(got: dict[str, Any], wanted: dict[str, Any]) -> None:
    mine, other = got["result"], wanted["result"]
    assert mine.loss == pytest.approx(other.loss, abs=2e-6)
    for name in ("divergence", "cross_entropy", "aligned"):
        assert getattr(mine.taught, name) == pytest.approx(getattr(other.taught, name), abs=2e-6), name
    for name, grad in wanted["grads"].items():
        assert np.abs(got["grads"][name] - grad).max() <= 1e-5 * max(1e-2, np.abs(grad).max()), name


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("teacher")
    spec = Model(preset="tiny-llama", overrides=WIDE | {"tie_word_embeddings": False})
    model = build(spec, vocab_size=TEACHERS, seed=5)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # so that it is sure of something
    model.save_pretrained(folder)
    return str(folder)


def test_accumulation_does_not_change_what_spans_teach(teacher: str) -> None:
    for alone, *others in run_ranks(_accumulated, 1, teacher)[0]:
        taught = alone["result"].taught
        mixed = 0.7 * taught.divergence * taught.aligned + 0.3 * taught.cross_entropy
        assert alone["result"].loss == pytest.approx(mixed, rel=1e-5) and 0.5 < taught.aligned < 1
        for got in others:
            _same(got, alone)


@pytest.mark.parametrize("layout", [Layout(dp_shard=2), Layout(dp_replicate=2)])
def test_two_processes_learn_from_spans_as_one(teacher: str, layout: Layout) -> None:
    step = functools.partial(_one_step, teacher=teacher, divergence="jsd")
    wanted = run_ranks(functools.partial(step, layout=Layout()), 1)[0]
    for got in run_ranks(functools.partial(step, layout=layout), 2):
        _same(got, wanted)


def test_a_teacher_that_is_the_student_and_cuts_alike_has_nothing_to_teach() -> None:
    """Same model, same tokens, every token a span: nothing to learn, at any temperature."""
    hidden, weight, labels, said, _ = _problem()
    hidden.requires_grad_()
    with torch.no_grad():
        each = torch.log_softmax(hidden @ weight[:VOCAB].T, -1).gather(1, labels.clamp_min(0)[:, None])[:, 0]
    word = said._replace(log_p=torch.segment_reduce(each[said.positions], "sum", lengths=said.lengths))
    for divergence in DIVERGENCES:
        sums = linear_span_distillation(
            hidden, weight, labels, word, loss=DistillationLoss(divergence, temperature=3.0), vocab=VOCAB
        )
        sums.loss.backward()
        assert sums.loss.item() == pytest.approx(0, abs=1e-6)
    assert hidden.grad is not None and hidden.grad.abs().max() < 1e-5


# Whole runs: a teacher of 330 tokens, a student of 400.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("aligned")
    write_texts(path, 200)
    table = recipe_table(path, "teacher")
    table["tokenizer"]["train"]["vocab_size"] = 330
    table["train"]["steps"] = 30
    recipe = write_recipe(path / "teacher.toml", table)
    prepare(recipe)
    student = _student(path, "student")
    prepare(student)
    log = path / "both.log"
    assert run_child(train(recipe, student), log) == 0, tail(log)
    return path


def _student(folder: Path, run: str, **distill: Any) -> str:
    table = recipe_table(folder, run)
    table["train"] |= {"objective": "distill", "steps": 20}
    given = {"teacher": str(folder / "teacher" / "final"), "tokenizers": "align", "alpha": 0.8, **distill}
    table["distill"] = given
    return write_recipe(folder / f"{run}.toml", table)


def _steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_lines(run / "metrics.jsonl") if "train/loss" in record]


def test_a_student_comes_nearer_to_a_teacher_with_another_tokenizer(folder: Path) -> None:
    steps = _steps(folder / "student")
    assert len(steps) == 20
    for record in steps:
        assert "kd/agreement" not in record and 0.5 < record["kd/aligned"] <= 1
        mixed = 0.8 * record["kd/loss"] * record["kd/aligned"] + 0.2 * record["train/cross_entropy"]
        assert record["train/loss"] == pytest.approx(mixed, rel=1e-5)
    first, last = steps[0], steps[-1]
    assert last["kd/loss"] < 0.7 * first["kd/loss"] and last["train/cross_entropy"] < first["train/cross_entropy"] - 1
    assert "spans of text that both tokenizers cut alike" in " ".join((folder / "both.log").read_text("utf-8").split())


def test_a_stopped_student_of_spans_goes_on_as_the_one_never_stopped(folder: Path) -> None:
    recipe, log = _student(folder, "stopped"), folder / "stopped.log"

    assert run_child(train_until(recipe, 8), log) == 75, tail(log)
    assert run_child(train(recipe), log) == 0, tail(log)
    for of in (final_weights, final_state):
        mine, other = of(folder / "stopped"), of(folder / "student")
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in other)
    assert [r["kd/loss"] for r in _steps(folder / "stopped")] == [r["kd/loss"] for r in _steps(folder / "student")]


def test_a_teacher_with_the_same_tokenizer_is_not_aligned(folder: Path) -> None:
    recipe, log = _student(folder, "same", teacher=str(folder / "student" / "final")), folder / "same.log"
    assert run_child(train(recipe), log) == 2, tail(log)
    assert 'leave it out, or set "same"' in " ".join(tail(log).split())


@pytest.mark.parametrize("keys", [{"top_k": 4}, {"top_k": 4, "cache": "there"}])
def test_what_needs_tokens_is_refused_with_spans(folder: Path, keys: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="it takes no top_k"):
        load_recipe(_student(folder, "refused", **keys))


@pytest.mark.parametrize("key", ["tp", "cp"])
def test_processes_that_share_rows_or_a_head_are_refused(key: str) -> None:
    distill = Distill.model_validate({"teacher": "t", "tokenizers": "align"})
    with pytest.raises(PreflightError, match=rf"does not go with parallel\.{key} = 2"):
        refuse_layout(distill, replace(Layout(), **{key: 2}))
    refuse_layout(distill, Layout(dp_shard=2))
