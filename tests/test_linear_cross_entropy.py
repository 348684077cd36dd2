"""The chunked loss must be the plain loss: same value, same gradients, whatever the chunk and the mask."""

import pytest
import torch
from cheaptrain_kernels import linear_cross_entropy, linear_cross_entropy_reference


def _case(tokens: int, hidden: int, vocab: int, ignored: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens * 1000 + vocab)
    states = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocab, hidden, generator=generator, dtype=torch.float64) / hidden**0.5
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return states, weight, labels


@pytest.mark.parametrize("tokens, chunk", [(1, 8), (7, 3), (64, 64), (65, 16), (100, 1000)])
@pytest.mark.parametrize("ignored", [0.0, 0.4, 1.0])
def test_chunked_loss_gives_the_gradients_of_the_plain_loss(tokens: int, chunk: int, ignored: float) -> None:
    results = []
    for function, options in ((linear_cross_entropy, {"chunk_tokens": chunk}), (linear_cross_entropy_reference, {})):
        states, weight, labels = _case(tokens, 12, 37, ignored)
        states, weight = states.float().requires_grad_(), weight.float().requires_grad_()
        loss, correct, _ = function(states, weight, labels, **options)
        (loss / 3).backward()
        results.append((loss.item(), correct.item(), states.grad, weight.grad))
    ours, plain = results
    assert ours[0] == pytest.approx(plain[0], abs=1e-4)
    assert ours[1] == plain[1]
    torch.testing.assert_close(ours[2], plain[2], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours[3], plain[3], atol=1e-6, rtol=1e-5)


def test_unsupervised_rows_get_no_gradient_and_no_nan() -> None:
    states, weight, labels = _case(9, 8, 20, 0.0)
    labels[3:6] = -100
    states = states.float().requires_grad_()
    loss, *_ = linear_cross_entropy(states, weight.float(), labels, chunk_tokens=4)
    loss.backward()
    assert states.grad is not None
    assert states.grad[3:6].abs().max().item() == 0.0
    assert states.grad[:3].abs().min().item() > 0.0


def test_a_batch_without_supervised_tokens_is_zero_not_nan() -> None:
    states, weight, labels = _case(5, 8, 20, 1.0)
    loss, correct, _ = linear_cross_entropy(states.float(), weight.float(), labels)
    assert (loss.item(), correct.item()) == (0.0, 0)


def test_bf16_states_keep_an_fp32_loss_and_an_fp32_head_gradient() -> None:
    states, weight, labels = _case(33, 16, 50, 0.2)
    weight32 = weight.float().requires_grad_()
    loss, *_ = linear_cross_entropy(states.bfloat16(), weight32, labels, chunk_tokens=8)
    loss.backward()
    plain, *_ = linear_cross_entropy_reference(states.bfloat16().float(), weight.bfloat16().float(), labels)
    assert loss.dtype == torch.float32 and weight32.grad is not None and weight32.grad.dtype == torch.float32
    assert loss.item() == pytest.approx(plain.item(), rel=2e-2)


def test_bf16_gradients_are_not_all_off_by_the_rounding_of_one_over_the_tokens() -> None:
    """1/32668 in bf16 is 0.3 % too small: every layer below the head would learn at a rate other than the head's."""
    states, weight, labels = _case(256, 64, 50, 0.0)
    scaled = states.bfloat16().requires_grad_()
    loss, *_ = linear_cross_entropy(scaled, weight.bfloat16(), labels, chunk_tokens=24)
    (loss / 32_668).backward()
    plain = states.bfloat16().requires_grad_()
    loss, *_ = linear_cross_entropy(plain, weight.bfloat16(), labels, chunk_tokens=24)
    loss.backward()
    assert scaled.grad is not None and plain.grad is not None
    expected = plain.grad.double() / 32_668
    ratio = (scaled.grad.double() * expected).sum() / (expected * expected).sum()
    assert ratio.item() == pytest.approx(1.0, abs=3e-4)
