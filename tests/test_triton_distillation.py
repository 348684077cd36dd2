"""The Triton distillation loss must be the plain one, for every divergence, teacher, temperature and mixture.

Without a GPU the kernels run in Triton's interpreter, with one compiled. The interpreter cuts fp32 to bf16 where a GPU
rounds to the nearest: a number is off by less than 2^-7 of itself, not 2^-8.
"""

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cheaptrain_kernels import (
    DistillationLoss,
    Spread,
    TeacherHead,
    linear_cross_entropy_reference,
    linear_distillation,
    linear_distillation_reference,
    token_losses,
    use_backend,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_losses,
    vocab_rows,
)
from ranks import run_ranks
from test_linear_distillation import DIVERGENCES, VOCAB, _case, _padded, _run, _same, _teacher
from torch import Tensor

pytest.importorskip("triton")
from cheaptrain_kernels import triton_divergence, triton_rows

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, of the infinities that are meant
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOKENS = 7
MIXTURES = [(1.0, 0.3), (0.5, 1.0), (2.0, 0.3), (2.0, 0.0)]  # temperature, alpha


@pytest.fixture(autouse=True)
def small_blocks_by_triton(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Several blocks a row, at sizes that an interpreter can do."""
    monkeypatch.setattr(triton_rows, "ONCE_SWEPT", 32)
    monkeypatch.setattr(triton_divergence, "ONCE_SWEPT", 32)
    with use_backend("triton"):
        yield


def _here(case: dict[str, Tensor], tokens: int = TOKENS) -> dict[str, Tensor]:
    """Fewer tokens, on the device."""
    cut = {name: value[:tokens] if "weight" not in name or name == "weights" else value for name, value in case.items()}
    return {name: value.to(DEVICE) for name, value in cut.items()}


@pytest.mark.parametrize("kind", ["full", "top-k"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_triton_gives_the_values_and_gradients_of_the_plain_loss(kind: str, divergence: Any) -> None:
    case = _here(_case())
    for number, (temperature, alpha) in enumerate(MIXTURES):
        loss = DistillationLoss(divergence, (0.5, 0.2)[number % 2], temperature, alpha)
        teacher = _teacher(case, kind, loss)
        weights = (None, case["weights"], case["weights"] - 1.0)[number % 3]
        plain = _run(linear_distillation_reference, case, teacher, loss, weights=weights)
        _same(
            _run(linear_distillation, case, teacher, loss, weights=weights, chunk_tokens=(5, 1000)[number % 2]), plain
        )


@pytest.mark.parametrize(("student_rows", "teacher_rows"), [(37, 37), (48, 37), (37, 80), (64, 64)])
def test_padded_rows_of_either_head_have_no_say(student_rows: int, teacher_rows: int) -> None:
    """Padded to no, too few and more than enough rows for whole cache lines; what they would say is loud."""
    case, draw = _here(_case()), torch.Generator().manual_seed(1)
    for name, rows, width in (("weight", student_rows, 12), ("teacher_weight", teacher_rows, 20)):
        head = torch.randn(rows, width, generator=draw) / 2
        head[VOCAB:] = 1e4
        case[name] = head.to(DEVICE)
    for kind, divergence in itertools.product(("full", "top-k"), DIVERGENCES):
        loss = DistillationLoss(divergence, alpha=0.5)
        teacher = _teacher(case, kind, loss)
        ours = _run(linear_distillation, case, teacher, loss)
        _same(ours, _run(linear_distillation_reference, case, teacher, loss))
        assert student_rows == VOCAB or ours[2][VOCAB:].abs().max() == 0


@pytest.mark.parametrize("kind", ["full", "top-k", "cached"])
def test_rows_without_a_label_count_nothing_and_are_not_read(kind: str) -> None:
    case, loss = _here(_case()), DistillationLoss("jsd", temperature=2.0, alpha=0.5)
    ignored = case["labels"] == -100
    assert 1 < ignored.sum() < TOKENS - 1
    sums, grad, _ = _run(linear_distillation, case, _teacher(case, kind, loss), loss, chunk_tokens=3)
    assert grad[ignored].abs().max() == 0 and grad[~ignored].abs().amax(1).min() > 0
    kept = {name: value[~ignored] if len(value) == len(ignored) else value for name, value in case.items()}
    alone, *_ = _run(linear_distillation, kept, _teacher(kept, kind, loss), loss)
    for ours, theirs in zip(sums, alone, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)
    case["labels"][:] = -100
    sums, *gradients = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
    assert [value.item() for value in sums] == [0] * 5 and all(grad.abs().max() == 0 for grad in gradients)
    empty = _here(_case(), tokens=0)
    if kind != "cached":
        assert [value.item() for value in _run(linear_distillation, empty, _teacher(empty, kind, loss), loss)[0]] == [
            0
        ] * 5


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_cached_top_k_is_online_top_k_to_the_last_bit(divergence: Any) -> None:
    case, loss = _here(_case()), DistillationLoss(divergence, temperature=0.5, alpha=0.7)
    online = _run(linear_distillation, case, _teacher(case, "top-k", loss), loss, chunk_tokens=3)
    cached = _run(linear_distillation, case, _teacher(case, "cached", loss, 3), loss, chunk_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(online[0], cached[0], strict=True))
    assert torch.equal(online[1], cached[1]) and torch.equal(online[2], cached[2])


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_top_k_of_the_whole_vocabulary_is_the_whole_vocabulary(divergence: Any) -> None:
    case, loss = _here(_case()), DistillationLoss(divergence, temperature=2.0, alpha=0.7)
    full = _run(linear_distillation, case, TeacherHead(case["teacher_hidden"], case["teacher_weight"]), loss)
    every = TeacherHead(case["teacher_hidden"], case["teacher_weight"], VOCAB)
    _same(_run(linear_distillation, case, every, loss), full)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["full", "top-k"])
def test_sure_models_give_finite_gradients(divergence: Any, kind: str) -> None:
    """Logits of +-1,000: probabilities that are 0 in fp32, and a rest without any mass."""
    case, loss = _here(_case()), DistillationLoss(divergence, alpha=0.5)
    case["hidden"] *= 300
    case["teacher_hidden"] *= 300
    ours = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
    assert all(grad.isfinite().all() for grad in ours[1:])
    with use_backend("torch"):
        plain = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
    for name in ("loss", "divergence", "cross_entropy"):
        assert getattr(ours[0], name).item() == pytest.approx(getattr(plain[0], name).item(), rel=1e-4), name
    torch.testing.assert_close(ours[1], plain[1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("kind", ["full", "top-k"])
def test_bf16_is_off_by_the_rounding_of_its_gradient_alone(divergence: Any, kind: str) -> None:
    """A head that is the identity: the gradient of the hidden states is that of the logits, which are the same."""
    draw, loss = torch.Generator().manual_seed(0), DistillationLoss(divergence, 0.3, 2.0, 0.5)
    case = _here(_case())
    case["hidden"] = torch.randn(TOKENS, VOCAB, generator=draw).mul(2).to(DEVICE, torch.bfloat16)
    case["weight"] = torch.eye(VOCAB, device=DEVICE, dtype=torch.bfloat16)
    case["teacher_hidden"], case["teacher_weight"] = (
        case["teacher_hidden"].bfloat16(),
        case["teacher_weight"].bfloat16(),
    )
    teacher = _teacher(case, kind, loss)
    ours = _run(linear_distillation, case, teacher, loss)
    exact = case | {"hidden": case["hidden"].float(), "weight": case["weight"].float()}
    said = torch.nn.functional.linear(case["teacher_hidden"], case["teacher_weight"]).float()
    same = TeacherHead(said, torch.eye(len(case["teacher_weight"]), device=DEVICE), teacher.top_k)
    plain = _run(linear_distillation_reference, exact, same, loss)
    assert ours[1].dtype == torch.bfloat16 and ours[0].loss.dtype == torch.float32
    for name in ("loss", "divergence", "cross_entropy"):
        assert getattr(ours[0], name).item() == pytest.approx(getattr(plain[0], name).item(), rel=1e-5, abs=1e-5), name
    # Rounded as logits' gradient, as hidden states' gradient, and when 1 / 7 is multiplied in.
    assert ((ours[1].float() - plain[1]).abs() <= 3 * 2**-7 * plain[1].abs() + 1e-6).all()


def test_a_teacher_that_is_the_student_teaches_nothing() -> None:
    case = _here(_case())
    for divergence, top_k in itertools.product(DIVERGENCES, (None, 5, VOCAB)):
        teacher = TeacherHead(case["hidden"], case["weight"], top_k)
        sums, *gradients = _run(linear_distillation, case, teacher, DistillationLoss(divergence))
        assert abs(sums.divergence.item()) < 1e-5 and all(grad.abs().max() < 1e-6 for grad in gradients)
        assert sums.agreed.item() == (case["labels"] >= 0).sum().item()


def test_of_equally_likely_tokens_the_lowest_id_is_the_likeliest() -> None:
    """With top-k the likeliest is put together from the tokens that were kept and the best of the others."""
    case, loss = _here(_case(ignored=0.0)), DistillationLoss()
    case["weight"][:] = 0.0  # all logits are equal
    case["labels"][:] = 0
    for kind in ("full", "top-k"):
        sums, *_ = _run(linear_distillation, case, _teacher(case, kind, loss), loss)
        assert sums.correct.item() == TOKENS


def test_without_a_gradient_nothing_is_made_of_one() -> None:
    case = _here(_case())
    for kind, divergence in itertools.product(("full", "top-k"), DIVERGENCES):
        loss = DistillationLoss(divergence, alpha=0.5, temperature=2.0)
        arguments = case["hidden"], case["weight"], _teacher(case, kind, loss), case["labels"]
        with_one = _run(linear_distillation, case, arguments[2], loss)[0]
        sums = linear_distillation(*arguments, loss=loss, vocab=VOCAB)
        assert [value.item() for value in sums] == pytest.approx([value.item() for value in with_one], rel=1e-6)


# --- heads spread over processes ---

SPREAD = [(40, "forward_kl", 2.0), (80, "jsd", 2.0), (38, "reverse_kl", 1.0)]  # of 80 rows the second half is no token
CUT = [(37, 0.0, None), (3, 1e-2, 2.0), (1, 0.0, 2.0)]  # rows, z-loss, soft cap


def _share(case: dict[str, Tensor], rows: range) -> dict[str, Tensor]:
    return case | {name: case[name][rows.start : rows.stop] for name in ("weight", "teacher_weight")}


def _spread(rank: int, size: int) -> list[tuple[Any, ...]]:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    group, results = dist.group.WORLD, []
    assert group is not None
    for rows, divergence, temperature in SPREAD:
        case, loss = _here(_padded(rows)), DistillationLoss(divergence, 0.3, temperature, 0.4)  # type: ignore[arg-type]
        here, options = _share(case, vocab_rows(rows, size, rank)), {"weights": case["weights"], "chunk_tokens": 4}
        teacher = _teacher(here, "full", loss)
        sums, hidden, weight = _run(linear_distillation, here, teacher, loss, spread=Spread(group, rows), **options)
        dist.all_reduce(hidden)
        results.append(([value.item() for value in sums], hidden.numpy(), weight.numpy()))
    return results


@pytest.mark.skipif(DEVICE == "cuda", reason="processes are forked")
def test_heads_spread_over_processes_give_the_loss_of_whole_ones() -> None:
    everywhere = run_ranks(_spread, 2)
    for number, (rows, divergence, temperature) in enumerate(SPREAD):
        case, loss = _here(_padded(rows)), DistillationLoss(divergence, 0.3, temperature, 0.4)  # type: ignore[arg-type]
        teacher = _teacher(case, "full", loss)
        wanted, hidden, weight = _run(linear_distillation_reference, case, teacher, loss, weights=case["weights"])
        for results in everywhere:
            assert results[number][0] == everywhere[0][number][0], "processes disagree"
            assert results[number][0] == pytest.approx([value.item() for value in wanted], rel=1e-5)
            torch.testing.assert_close(torch.from_numpy(results[number][1]), hidden, atol=1e-5, rtol=1e-5)
        together = torch.cat([torch.from_numpy(results[number][2]) for results in everywhere])
        torch.testing.assert_close(together, weight, atol=1e-5, rtol=1e-5)


def _cut(rank: int, size: int) -> list[tuple[Any, ...]]:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    group, results = dist.group.WORLD, []
    assert group is not None
    for rows, z_loss, cap in CUT:
        states, weight, labels, weights = _classes(rows)
        own = vocab_rows(rows, size, rank)
        states, weight = states.requires_grad_(), weight[own.start : own.stop].clone().requires_grad_()
        options: dict[str, Any] = {"vocab": rows, "group": group, "soft_cap": cap, "chunk_tokens": 4}
        sums = vocab_parallel_linear_cross_entropy(states, weight, labels, weights=weights, z_loss=z_loss, **options)
        (sums.loss / 7).backward()
        assert states.grad is not None and weight.grad is not None
        dist.all_reduce(states.grad)
        apart = vocab_parallel_token_losses(states, weight, labels, **options)
        results.append(([value.item() for value in sums], states.grad.numpy(), weight.grad.numpy(), apart.numpy()))
    return results


def _classes(rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ties among them: the rows of a head but the first are equal in pairs."""
    case = _here(_padded(rows))
    weight = case["weight"].clone()
    weight[2::2] = weight[1::2][: len(weight[2::2])]
    return case["hidden"].clone(), weight, case["labels"].clamp_max(rows - 1), case["weights"]


@pytest.mark.skipif(DEVICE == "cuda", reason="processes are forked")
def test_a_head_cut_in_two_gives_the_cross_entropy_of_the_whole_one() -> None:
    everywhere = run_ranks(_cut, 2)
    for number, (rows, z_loss, cap) in enumerate(CUT):
        states, weight, labels, weights = _classes(rows)
        states, weight = states.requires_grad_(), weight.requires_grad_()
        wanted = linear_cross_entropy_reference(states, weight, labels, weights=weights, z_loss=z_loss, soft_cap=cap)
        (wanted.loss / 7).backward()
        with use_backend("torch"):
            apart = token_losses(states, weight, labels, soft_cap=cap)
        for results in everywhere:
            assert results[number][0] == everywhere[0][number][0], "processes disagree"
            assert results[number][0] == pytest.approx([value.item() for value in wanted], rel=1e-5, abs=1e-6)
            torch.testing.assert_close(torch.from_numpy(results[number][1]), states.grad, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(torch.from_numpy(results[number][3]), apart, atol=1e-6, rtol=1e-5)
        together = torch.cat([torch.from_numpy(results[number][2]) for results in everywhere])
        torch.testing.assert_close(together, weight.grad, atol=1e-6, rtol=1e-5)
