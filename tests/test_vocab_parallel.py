"""The loss over a head spread over processes must be the loss of the whole head: same value, same gradients, anywhere
the vocabulary is cut. Each check runs on every rank and compares with the plain kernel on the whole head."""

import pytest
import torch
import torch.distributed as dist
from cheaptrain_kernels import (
    linear_cross_entropy,
    token_losses,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_losses,
    vocab_rows,
)
from ranks import run_ranks
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.distributed import ProcessGroup

HIDDEN = 12


def _group(rank: int, size: int) -> ProcessGroup:
    dist.init_process_group("gloo", rank=rank, world_size=size)
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def _case(tokens: int, vocab: int, ignored: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab)
    states = torch.randn(tokens, HIDDEN, generator=generator)
    weight = torch.randn(vocab, HIDDEN, generator=generator) / HIDDEN**0.5
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return states, weight, labels


def _own(weight: Tensor, rank: int, size: int) -> Tensor:
    own = vocab_rows(len(weight), size, rank)
    return weight[own.start : own.stop].clone()


def _both(case: tuple[Tensor, Tensor, Tensor], group: ProcessGroup, chunk: int, divisor: float = 3.0) -> tuple:
    """(loss, correct, hidden gradient, weight gradient) of ours, the hidden gradient summed, and of the plain kernel
    with the weight gradient cut to our rows."""
    states, weight, labels = case
    rank, size = group.rank(), group.size()
    hidden, own = states.clone().requires_grad_(), _own(weight, rank, size).requires_grad_()
    loss, correct, _ = vocab_parallel_linear_cross_entropy(
        hidden, own, labels, vocab=len(weight), group=group, chunk_tokens=chunk
    )
    (loss / divisor).backward()
    dist.all_reduce(hidden.grad, group=group)
    whole_hidden, whole = states.clone().requires_grad_(), weight.clone().requires_grad_()
    plain, plain_correct, _ = linear_cross_entropy(whole_hidden, whole, labels, chunk_tokens=chunk)
    (plain / divisor).backward()
    assert whole.grad is not None
    return (
        (loss.detach(), correct, hidden.grad, own.grad),
        (plain.detach(), plain_correct, whole_hidden.grad, _own(whole.grad, rank, size)),
    )


def _identical_everywhere(value: Tensor, group: ProcessGroup) -> bool:
    seen = [torch.empty_like(value) for _ in range(group.size())]
    dist.all_gather(seen, value, group=group)
    return all(torch.equal(value, other) for other in seen)


def _equal_to_plain(rank: int, size: int) -> None:
    group = _group(rank, size)
    for tokens, vocab, chunk, ignored in [
        (1, 37, 8, 0.0),
        (7, 37, 3, 0.4),
        (64, 40, 64, 0.3),
        (65, 41, 16, 0.3),
        (65, 41, 1000, 0.0),
        (9, 5, 4, 0.2),  # of 4 ranks the last one owns nothing
        (5, 3, 2, 0.0),
        (6, 1, 4, 0.0),
    ]:
        case = _case(tokens, vocab, ignored)
        (loss, correct, *gradients), (plain, plain_correct, *plain_gradients) = _both(case, group, chunk)
        what = f"{tokens=} {vocab=} {chunk=}"
        assert loss.item() == pytest.approx(plain.item(), rel=1e-6, abs=1e-6), what
        assert correct.item() == plain_correct.item(), what
        assert _identical_everywhere(loss, group) and _identical_everywhere(correct, group), what
        for ours, theirs in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-7, rtol=1e-6, msg=lambda m, w=what: f"{w}: {m}")
        states, weight, labels = case
        apart = vocab_parallel_token_losses(
            states, _own(weight, rank, size), labels, vocab=vocab, group=group, chunk_tokens=chunk
        )
        torch.testing.assert_close(apart, token_losses(states, weight, labels), atol=1e-6, rtol=1e-6)
        assert _identical_everywhere(apart, group), what


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_head_cut_anywhere_gives_the_loss_and_gradients_of_the_whole_one(size: int) -> None:
    run_ranks(_equal_to_plain, size)


def test_rows_are_cut_as_dtensor_cuts_them() -> None:
    for vocab in (1, 3, 5, 37, 40):
        for size in (1, 2, 3, 4, 7):
            cut = [len(part) for part in torch.empty(vocab).chunk(size)]
            cut += [0] * (size - len(cut))
            owned = [vocab_rows(vocab, size, rank) for rank in range(size)]
            assert [len(rows) for rows in owned] == cut
            assert [row for rows in owned for row in rows] == list(range(vocab))


def _nothing_supervised(rank: int, size: int) -> tuple[float, int, float, float]:
    states, weight, _ = _case(5, 21, 0.0)
    case = states, weight, torch.full((5,), -100)
    (loss, correct, hidden, own), _ = _both(case, _group(rank, size), 2)
    return loss.item(), correct.item(), hidden.abs().max().item(), own.abs().max().item()


def test_a_batch_without_supervised_tokens_is_zero_not_nan() -> None:
    assert run_ranks(_nothing_supervised, 3) == [(0.0, 0, 0.0, 0.0)] * 3


def _ignored_rows(rank: int, size: int) -> tuple[float, float]:
    states, weight, labels = _case(9, 20, 0.0)
    labels[3:6] = -100
    (_, _, hidden, _), _ = _both((states, weight, labels), _group(rank, size), 4)
    return hidden[3:6].abs().max().item(), hidden[:3].abs().min().item()


def test_unsupervised_rows_get_exactly_no_gradient() -> None:
    for ignored, supervised in run_ranks(_ignored_rows, 2):
        assert ignored == 0.0 and supervised > 0.0


def _ties(rank: int, size: int) -> list[int]:
    """Rows of the head that are equal within a rank and across ranks, so that their logits tie exactly."""
    group = _group(rank, size)
    vocab, best = 12, torch.eye(4)[0] * 4
    found = []
    for tied in ([2, 7], [2, 3], [0, 11], [7, 8, 11], [5], list(range(12))):
        weight = torch.zeros(vocab, 4)
        weight[tied] = best
        labels = torch.arange(vocab)
        states = torch.ones(vocab, 4)
        assert (states @ weight.T).argmax(-1).unique().tolist() == [min(tied)]
        for label in range(vocab):
            _, correct, _ = vocab_parallel_linear_cross_entropy(
                states[:1], _own(weight, rank, size), labels[label : label + 1], vocab=vocab, group=group
            )
            assert correct.item() == int(label == min(tied)), (tied, label)
        _, correct, _ = vocab_parallel_linear_cross_entropy(
            states, _own(weight, rank, size), labels, vocab=vocab, group=group, chunk_tokens=5
        )
        found.append(correct.item())
    return found


@pytest.mark.parametrize("size", [1, 2, 4])
def test_of_equally_likely_tokens_only_the_lowest_id_counts_as_predicted(size: int) -> None:
    assert run_ranks(_ties, size) == [[1] * 6] * size


def _huge_logits(rank: int, size: int) -> tuple[float, float]:
    states, weight, labels = _case(8, 20, 0.2)
    (loss, _, hidden, _), (plain, _, _, _) = _both((states * 1000, weight * 10, labels), _group(rank, size), 3)
    assert torch.isfinite(hidden).all()
    return loss.item(), plain.item()


def test_logits_whose_exponentials_overflow_are_no_infinity() -> None:
    for loss, plain in run_ranks(_huge_logits, 2):
        assert loss == pytest.approx(plain, rel=1e-6)


def _in_bf16(rank: int, size: int) -> None:
    states, weight, labels = _case(256, 50, 0.2)
    group = _group(rank, size)
    own32 = _own(weight, rank, size).requires_grad_()
    hidden = states.bfloat16().requires_grad_()
    loss, correct, _ = vocab_parallel_linear_cross_entropy(
        hidden, own32, labels, vocab=50, group=group, chunk_tokens=24
    )
    (loss / 32_668).backward()
    assert hidden.grad is not None and own32.grad is not None
    assert loss.dtype == torch.float32 and own32.grad.dtype == torch.float32 and hidden.grad.dtype == torch.bfloat16
    whole32, whole_hidden = weight.clone().requires_grad_(), states.bfloat16().requires_grad_()
    plain, plain_correct, _ = linear_cross_entropy(whole_hidden, whole32, labels, chunk_tokens=24)
    (plain / 32_668).backward()
    assert whole32.grad is not None and whole_hidden.grad is not None
    assert loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert correct.item() == plain_correct.item()
    summed = hidden.grad.float()
    dist.all_reduce(summed, group=group)
    for ours, theirs, tolerance in (
        (own32.grad, _own(whole32.grad, rank, size), 5e-3),
        (summed, whole_hidden.grad.float(), 1e-2),
    ):
        assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()
        # 1/32668 in bf16 is 0.3 % too small: nothing may be off in one direction.
        ratio = (ours.double() * theirs).sum() / (theirs.double() * theirs).sum()
        assert ratio.item() == pytest.approx(1.0, abs=4e-4)


def test_bf16_states_keep_an_fp32_loss_and_an_fp32_head_gradient() -> None:
    run_ranks(_in_bf16, 2)


def _along_a_direction(rank: int, size: int) -> tuple[float, float]:
    """The gradient against the loss itself, with no other kernel in between."""
    group = _group(rank, size)
    states, weight, labels = _case(11, 23, 0.2)
    generator = torch.Generator().manual_seed(5)
    along_states = torch.randn(states.shape, generator=generator)
    along_weight = torch.randn(weight.shape, generator=generator)

    def loss_at(step: float) -> float:
        own = _own(weight + step * along_weight, rank, size)
        losses = vocab_parallel_token_losses(
            states + step * along_states, own, labels, vocab=23, group=group, chunk_tokens=4
        )
        return losses.double().sum().item()

    hidden, own = states.requires_grad_(), _own(weight, rank, size).requires_grad_()
    loss, *_ = vocab_parallel_linear_cross_entropy(hidden, own, labels, vocab=23, group=group, chunk_tokens=4)
    loss.backward()
    assert hidden.grad is not None and own.grad is not None
    slope = (hidden.grad * along_states).sum() + (own.grad * _own(along_weight, rank, size)).sum()
    dist.all_reduce(slope, group=group)
    return slope.item(), (loss_at(1e-2) - loss_at(-1e-2)) / 2e-2


def test_partial_gradients_sum_to_the_slope_of_the_loss() -> None:
    for slope, measured in run_ranks(_along_a_direction, 3):
        assert slope == pytest.approx(measured, rel=2e-3)


def _one_at_a_time(rank: int, size: int) -> list[bool]:
    group = _group(rank, size)
    states, weight, labels = _case(6, 10, 0.0)
    own = _own(weight, rank, size)
    frozen_head, frozen_states = states.clone().requires_grad_(), own.clone().requires_grad_()
    vocab_parallel_linear_cross_entropy(frozen_head, own, labels, vocab=10, group=group)[0].backward()
    vocab_parallel_linear_cross_entropy(states, frozen_states, labels, vocab=10, group=group)[0].backward()
    with torch.no_grad():
        loss, *_ = vocab_parallel_linear_cross_entropy(frozen_head, own, labels, vocab=10, group=group)
    (_, _, hidden, grown), _ = _both((states, weight, labels), group, 3, divisor=1.0)
    assert frozen_head.grad is not None and frozen_states.grad is not None
    dist.all_reduce(frozen_head.grad, group=group)
    return [
        not loss.requires_grad,
        torch.allclose(frozen_head.grad, hidden, atol=1e-6),
        torch.allclose(frozen_states.grad, grown, atol=1e-6),
    ]


def test_a_frozen_head_or_no_gradient_at_all_changes_nothing_else() -> None:
    assert run_ranks(_one_at_a_time, 2) == [[True, True, True]] * 2


def _misuse(rank: int, size: int) -> list[str]:
    group = _group(rank, size)
    states, weight, labels = _case(4, 10, 0.0)
    own = _own(weight, rank, size)
    said = []
    for arguments, vocab in (
        ((states, weight, labels), 10),  # the whole head instead of the own rows
        ((states, own, labels), 12),
        ((states[None], own, labels), 10),
        ((states, own, torch.tensor([0, 1, 10, 2])), 10),
        ((states, own, torch.tensor([0, 1, -1, 2])), 10),
    ):
        for function in (vocab_parallel_linear_cross_entropy, vocab_parallel_token_losses):
            try:
                function(*arguments, vocab=vocab, group=group)
            except (ValueError, RuntimeError) as error:
                said.append(str(error))
    dist.barrier()  # nothing was sent so far, and a process that ends early takes the meeting point with it
    return said


def test_the_wrong_rows_or_labels_are_refused_before_any_message() -> None:
    for rank, said in enumerate(run_ranks(_misuse, 2)):
        assert [message.splitlines()[0] for message in said[::2]] == [message.splitlines()[0] for message in said[1::2]]
        assert f"process {rank} of 2 owns 5 of the head's 10 rows, and was given 10" in said[0]
        assert f"process {rank} of 2 owns 6 of the head's 12 rows, and was given 5" in said[2]
        assert "expected [tokens, hidden]" in said[4]
        assert "outside the vocabulary of 10" in said[6] and "outside the vocabulary of 10" in said[8]


def _planned(rank: int, size: int) -> tuple[list[int], list[int], int]:
    """As planning does it: rank 5 of 8 that do not exist, tensors without values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=5, world_size=8)
    group = dist.group.WORLD
    assert group is not None
    with FakeTensorMode():
        hidden = torch.empty(100, 64, dtype=torch.bfloat16, requires_grad=True)
        own = torch.empty(len(vocab_rows(1000, 8, 5)), 64, requires_grad=True)
        labels = torch.zeros(100, dtype=torch.int64)
        loss, correct, _ = vocab_parallel_linear_cross_entropy(
            hidden, own, labels, vocab=1000, group=group, chunk_tokens=32
        )
        (loss / 100).backward()
        apart = vocab_parallel_token_losses(hidden, own, labels, vocab=1000, group=group, chunk_tokens=32)
        assert hidden.grad is not None and own.grad is not None and correct.shape == ()
        return list(hidden.grad.shape), list(own.grad.shape), len(apart)


def test_the_loss_can_be_planned_without_processes_or_values() -> None:
    assert run_ranks(_planned, 1) == [([100, 64], [125, 64], 100)]
