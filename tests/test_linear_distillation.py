"""The chunked distillation loss must be the plain one: same value, same gradients, for every teacher and mixture."""

import itertools
from typing import Any

import pytest
import torch
from cheaptrain_kernels import (
    DistillationLoss,
    Spread,
    TeacherHead,
    TopK,
    distilled_at_once,
    linear_cross_entropy,
    linear_distillation,
    linear_distillation_reference,
    teacher_top_k,
    vocab_rows,
)
from ranks import run_ranks
from torch import Tensor

VOCAB, TOKENS = 37, 29
DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def _case(ignored: float = 0.3, seed: int = 0) -> dict[str, Tensor]:
    """Student of width 12 with 40 rows in its head, teacher of width 20 with 48; 37 of them are tokens."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=draw)
    labels[torch.rand(TOKENS, generator=draw) < ignored] = -100
    return {
        "hidden": torch.randn(TOKENS, 12, generator=draw),
        "weight": torch.randn(40, 12, generator=draw) / 2,
        "teacher_hidden": torch.randn(TOKENS, 20, generator=draw),
        "teacher_weight": torch.randn(48, 20, generator=draw) / 2,
        "labels": labels,
        "weights": torch.rand(TOKENS, generator=draw) * 2,
    }


def _teacher(case: dict[str, Tensor], kind: str, loss: DistillationLoss, chunk: int = 8192) -> TeacherHead | TopK:
    hidden, weight = case["teacher_hidden"], case["teacher_weight"]
    if kind == "cached":
        return teacher_top_k(hidden, weight, 5, temperature=loss.temperature, vocab=VOCAB, chunk_tokens=chunk)
    return TeacherHead(hidden, weight, 5 if kind == "top-k" else None)


def _run(function: Any, case: dict[str, Tensor], teacher: Any, loss: DistillationLoss, **more: Any) -> tuple[Any, ...]:
    hidden, weight = case["hidden"].clone().requires_grad_(), case["weight"].clone().requires_grad_()
    sums = function(hidden, weight, teacher, case["labels"], loss=loss, vocab=VOCAB, **more)
    (sums.loss / 7).backward()
    return sums, hidden.grad, weight.grad


def _same(ours: tuple[Any, ...], plain: tuple[Any, ...], atol: float = 1e-5) -> None:
    for name in ("loss", "divergence", "cross_entropy"):
        assert getattr(ours[0], name).item() == pytest.approx(getattr(plain[0], name).item(), rel=1e-5, abs=atol), name
    assert (ours[0].correct.item(), ours[0].agreed.item()) == (plain[0].correct.item(), plain[0].agreed.item())
    torch.testing.assert_close(ours[1], plain[1], atol=atol, rtol=1e-5)
    torch.testing.assert_close(ours[2], plain[2], atol=atol, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "top-k", "cached"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_chunked_gives_the_values_and_gradients_of_the_plain_loss(
    kind: str, divergence: Any, temperature: float, alpha: float
) -> None:
    case = _case()
    for beta in (0.5, 0.2) if divergence == "jsd" else (0.5,):
        loss = DistillationLoss(divergence, beta, temperature, alpha)
        teacher = _teacher(case, kind, loss)
        for weights in (None, case["weights"]):
            plain = _run(linear_distillation_reference, case, teacher, loss, weights=weights)
            for chunk in (8, 1000) if weights is None else (1, 29):
                ours = _run(linear_distillation, case, teacher, loss, weights=weights, chunk_tokens=chunk)
                _same(ours, plain)


def test_rows_without_a_label_count_nothing() -> None:
    case, loss = _case(), DistillationLoss(temperature=2.0, alpha=0.5)
    sums, grad, _ = _run(linear_distillation, case, _teacher(case, "full", loss), loss, chunk_tokens=4)
    ignored = case["labels"] == -100
    assert 3 < ignored.sum() < TOKENS - 3
    assert grad[ignored].abs().max() == 0 and grad[~ignored].abs().amax(1).min() > 0
    kept = {name: value[~ignored] if len(value) == TOKENS else value for name, value in case.items()}
    alone, *_ = _run(linear_distillation, kept, _teacher(kept, "full", loss), loss)
    for ours, theirs in zip(sums, alone, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["full", "top-k", "cached"])
def test_a_batch_without_any_label_is_zero_and_no_nan(kind: str) -> None:
    case, loss = _case(ignored=1.1), DistillationLoss(alpha=0.5)
    sums, grad_hidden, grad_weight = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
    assert [value.item() for value in sums] == [0, 0, 0, 0, 0]
    assert grad_hidden.abs().max() == 0 and grad_weight.abs().max() == 0


def test_padded_rows_of_either_head_have_no_say() -> None:
    case = _case()
    for kind, divergence in itertools.product(("full", "top-k"), DIVERGENCES):
        loss = DistillationLoss(divergence, alpha=0.5)
        plain = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
        loud = {name: value.clone() for name, value in case.items()}
        loud["weight"][VOCAB:], loud["teacher_weight"][VOCAB:] = 1e4, -1e4
        ours = _run(linear_distillation, loud, _teacher(loud, kind, loss), loss)
        assert all(torch.equal(a, b) for a, b in zip(ours[0], plain[0], strict=True))
        assert torch.equal(ours[1], plain[1]) and torch.equal(ours[2], plain[2])
        assert ours[2][VOCAB:].abs().max() == 0


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("top_k", [None, 5, VOCAB])
def test_a_teacher_that_is_the_student_teaches_nothing(divergence: Any, top_k: int | None) -> None:
    case = _case()
    teacher = TeacherHead(case["hidden"], case["weight"], top_k)
    sums, grad_hidden, grad_weight = _run(linear_distillation, case, teacher, DistillationLoss(divergence))
    assert abs(sums.divergence.item()) < 1e-5 and sums.loss.item() == sums.divergence.item()
    assert sums.agreed.item() == (case["labels"] >= 0).sum().item()
    assert grad_hidden.abs().max() < 1e-6 and grad_weight.abs().max() < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_of_the_whole_vocabulary_is_the_whole_vocabulary(divergence: Any) -> None:
    case, loss = _case(), DistillationLoss(divergence, temperature=2.0, alpha=0.7)
    full = _run(linear_distillation, case, TeacherHead(case["teacher_hidden"], case["teacher_weight"]), loss)
    every = TeacherHead(case["teacher_hidden"], case["teacher_weight"], VOCAB)
    _same(_run(linear_distillation, case, every, loss), full)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cached_top_k_is_online_top_k_to_the_last_bit(divergence: Any) -> None:
    case = _case()
    for chunk in (8, 1000):
        loss = DistillationLoss(divergence, temperature=0.5, alpha=0.7)
        online = _run(linear_distillation, case, _teacher(case, "top-k", loss), loss, chunk_tokens=chunk)
        cached = _run(linear_distillation, case, _teacher(case, "cached", loss, chunk), loss, chunk_tokens=chunk)
        assert all(torch.equal(a, b) for a, b in zip(online[0], cached[0], strict=True))
        assert torch.equal(online[1], cached[1]) and torch.equal(online[2], cached[2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["full", "top-k"])
def test_sure_models_give_finite_gradients(divergence: Any, kind: str) -> None:
    """Logits of +-1,000: probabilities that are 0 in fp32, and a rest without any mass."""
    case, loss = _case(), DistillationLoss(divergence, alpha=0.5)
    case["hidden"] *= 300
    case["teacher_hidden"] *= 300
    sums, grad_hidden, grad_weight = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
    assert all(torch.isfinite(value.float()) for value in sums)
    assert grad_hidden.isfinite().all() and grad_weight.isfinite().all()


def test_without_a_share_of_the_teacher_it_is_cross_entropy() -> None:
    case, loss = _case(), DistillationLoss(temperature=2.0, alpha=0.0)
    sums, grad, _ = _run(linear_distillation, case, _teacher(case, "full", loss), loss)
    hidden = case["hidden"].clone().requires_grad_()
    plain, correct, _ = linear_cross_entropy(hidden, case["weight"][:VOCAB], case["labels"])
    (plain / 7).backward()
    assert sums.loss.item() == pytest.approx(plain.item(), rel=1e-6)
    assert sums.correct == correct and sums.divergence > 1
    torch.testing.assert_close(grad, hidden.grad, atol=1e-6, rtol=1e-5)


def test_bf16_stays_near_fp32_and_keeps_an_fp32_loss() -> None:
    case, loss = _case(), DistillationLoss("jsd", temperature=2.0, alpha=0.5)
    exact = _run(linear_distillation, case, _teacher(case, "full", loss), loss)
    rounded = case | {name: case[name].bfloat16() for name in ("hidden", "teacher_hidden", "teacher_weight")}
    sums, grad_hidden, grad_weight = _run(linear_distillation, rounded, _teacher(rounded, "full", loss), loss)
    assert sums.loss.dtype == torch.float32
    assert grad_hidden.dtype == torch.bfloat16 and grad_weight.dtype == torch.float32
    assert sums.loss.item() == pytest.approx(exact[0].loss.item(), rel=2e-2)
    for ours, theirs in ((grad_hidden.float(), exact[1]), (grad_weight, exact[2])):
        assert ((ours - theirs).norm() / theirs.norm()).item() < 2e-2


def test_a_chunk_shrinks_as_the_vocabulary_grows() -> None:
    sizes = [vocab * distilled_at_once(vocab, 1_000_000) for vocab in (32_768, 65_536, 131_072, 262_144)]
    assert sizes == [2**26] * 4
    assert distilled_at_once(1000, 64) == 64 and distilled_at_once(2**30, 64) == 1


def test_what_does_not_fit_is_refused() -> None:
    case, loss = _case(), DistillationLoss()
    good = (case["hidden"], case["weight"], _teacher(case, "full", loss), case["labels"])
    for change, message in (
        ({"vocab": 41}, "a head of 40 rows has no vocabulary of 41"),
        ({"weights": torch.ones(3)}, "expected a weight for each"),
        ({"teacher": TeacherHead(case["teacher_hidden"][1:], case["teacher_weight"])}, "for 29 tokens"),
        ({"teacher": TeacherHead(case["teacher_hidden"], case["teacher_weight"], 38)}, "top-k of 38 tokens"),
    ):
        arguments = {"teacher": good[2], "loss": loss, "vocab": VOCAB} | change
        teacher = arguments.pop("teacher")
        with pytest.raises(ValueError, match=message):
            linear_distillation(good[0], good[1], teacher, good[3], **arguments)
    with pytest.raises(ValueError, match="temperature above 0"):
        DistillationLoss(temperature=0.0)


# --- heads spread over processes ---


def _spread(rank: int, size: int, rows: int) -> list[tuple[Any, ...]]:
    import torch.distributed as dist

    from cheaptrain.parallel.processes import join

    join(60)
    group = dist.group.WORLD
    assert group is not None
    case = _padded(rows)
    mine = vocab_rows(rows, size, rank)
    results = []
    for divergence, temperature, alpha in itertools.product(DIVERGENCES, (1.0, 2.0), (0.3, 1.0)):
        loss = DistillationLoss(divergence, 0.3, temperature, alpha)
        here = case | {
            "weight": case["weight"][mine.start : mine.stop],
            "teacher_weight": case["teacher_weight"][mine.start : mine.stop],
        }
        spread = Spread(group, rows)
        teacher = _teacher(here, "full", loss)
        sums, hidden, weight = _run(
            linear_distillation, here, teacher, loss, weights=case["weights"], chunk_tokens=8, spread=spread
        )
        dist.all_reduce(hidden)
        results.append(([value.item() for value in sums], hidden.numpy(), weight.numpy()))
    return results


def _padded(rows: int) -> dict[str, Tensor]:
    draw, case = torch.Generator().manual_seed(3), _case()
    return case | {
        "weight": torch.randn(rows, 12, generator=draw) / 2,
        "teacher_weight": torch.randn(rows, 20, generator=draw) / 2,
    }


@pytest.mark.parametrize(("size", "rows"), [(2, 40), (2, 80), (3, 38)])  # of 80, the second has no token at all
def test_heads_spread_over_processes_give_the_loss_of_whole_ones(size: int, rows: int) -> None:
    everywhere = run_ranks(_spread, size, rows)
    case = _padded(rows)
    settings = itertools.product(DIVERGENCES, (1.0, 2.0), (0.3, 1.0))
    for number, (divergence, temperature, alpha) in enumerate(settings):
        loss: Any = DistillationLoss(divergence, 0.3, temperature, alpha)
        wanted, hidden, weight = _run(
            linear_distillation, case, _teacher(case, "full", loss), loss, weights=case["weights"], chunk_tokens=8
        )
        for results in everywhere:
            assert results[number][0] == everywhere[0][number][0], "processes disagree"
            assert results[number][0] == pytest.approx([value.item() for value in wanted], rel=1e-5)
            torch.testing.assert_close(torch.from_numpy(results[number][1]), hidden, atol=1e-5, rtol=1e-5)
        together = torch.cat([torch.from_numpy(results[number][2]) for results in everywhere])
        torch.testing.assert_close(together, weight, atol=1e-5, rtol=1e-5)
