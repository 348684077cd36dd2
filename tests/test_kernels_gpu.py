"""What only a GPU can show of the fused losses: rows past 2^31 numbers, memory, and sums of products in fp32.

The cases of `test_triton_*.py` run compiled on a GPU too; here are the sizes that an interpreter cannot do.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
pytest.importorskip("triton")

import torch.distributed as dist
from cheaptrain_kernels import (
    DistillationLoss,
    Spread,
    TeacherHead,
    distilled_at_once,
    linear_cross_entropy,
    linear_distillation,
    use_backend,
    vocab_parallel_linear_cross_entropy,
)
from cheaptrain_kernels.products import _sums_in_fp32
from cheaptrain_kernels.row_ops import cross_entropy_rows, divergence_rows, row_statistics

VOCAB = 128_256


@pytest.mark.parametrize(("rows", "vocab"), [(8192, VOCAB), (20_000, VOCAB), (4096, 50_257)])
def test_rows_become_gradients_at_sizes_of_a_training_run(rows: int, vocab: int) -> None:
    torch.manual_seed(0)
    columns = -(-vocab // 64) * 64
    logits = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
    labels = torch.randint(0, vocab, (rows,), device="cuda")
    labels[::7] = -100
    some = torch.tensor([0, 1, rows // 2, rows - 3, rows - 2, rows - 1], device="cuda")  # of 20,000 beyond 2^31 numbers
    before = logits[some, :vocab].float()
    found = cross_entropy_rows(logits, labels, None, vocab, 1e-3, 0.0, True)
    supervised, log_sum = labels[some] != -100, before.logsumexp(-1)
    entropy = torch.nn.functional.cross_entropy(before, labels[some], reduction="none")
    torch.testing.assert_close(found[1][some], entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][some], entropy + 1e-3 * log_sum.square() * supervised, rtol=1e-5, atol=1e-5)
    wanted = (before - log_sum[:, None]).exp() * (1 + 2e-3 * log_sum[:, None])
    wanted[torch.arange(len(some)), labels[some].clamp_min(0)] -= 1
    wanted *= supervised[:, None]
    off = (logits[some, :vocab].float() - wanted).abs()
    assert (off <= 2**-8 * 1.01 * wanted.abs() + 1e-7).all()
    assert logits[some, vocab:].abs().sum() == 0


def test_rows_of_two_models_meet_at_sizes_of_a_training_run() -> None:
    torch.manual_seed(0)
    rows = 17_500  # beyond 2^31 numbers
    logits, said = (torch.randn(rows, VOCAB, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    labels = torch.randint(0, VOCAB, (rows,), device="cuda")
    (largest, total, scaled), likeliest = row_statistics(logits, labels, VOCAB, 2.0, 0.0)
    (taught, _, taught_scaled), _ = row_statistics(said, labels, VOCAB, 2.0, 0.0)
    q = (logits[-1].float() / 2).softmax(-1)
    p = (said[-1].float() / 2).softmax(-1)
    assert likeliest[-1] == logits[-1].argmax()
    ones = torch.ones_like(total)
    facts = torch.stack([largest, scaled.log(), total.log(), taught, taught_scaled.log(), ones, 0 * ones])
    found = divergence_rows(logits, said, labels, facts, VOCAB, "forward_kl", 0.5, 2.0, 1.0, True, True)
    assert found[0, -1].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
    torch.testing.assert_close(logits[-1].float(), 2 * (q - p), rtol=2**-7, atol=1e-9)


@pytest.mark.parametrize("tokens", [8192, 24_576])
def test_the_loss_takes_the_memory_of_one_chunk_of_bf16_logits(tokens: int) -> None:
    hidden = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(VOCAB, 256, device="cuda").div_(16).requires_grad_()
    labels = torch.randint(0, VOCAB, (tokens,), device="cuda")
    linear_cross_entropy(hidden[:64], weight, labels[:64]).loss.backward()  # what libraries set up for themselves
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=8192).loss.backward()
    made = 2 * hidden.numel() + 4 * weight.numel() + 2 * weight.numel()  # gradients, and the head in bf16
    extra = torch.cuda.max_memory_allocated() - before - made
    assert 0.99 < extra / (2 * 8192 * VOCAB) < 1.1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation_takes_the_memory_of_one_chunk_a_model_whatever_the_vocabulary(divergence: Any) -> None:
    extras = []
    for vocab in (65_536, 131_072):
        hidden = torch.randn(8192, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(vocab, 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        teacher = TeacherHead(torch.randn_like(hidden).detach(), torch.randn_like(weight).detach())
        labels, loss = torch.randint(0, vocab, (8192,), device="cuda"), DistillationLoss(divergence, alpha=0.5)
        linear_distillation(hidden[:64], weight, TeacherHead(teacher.hidden[:64], teacher.weight), labels[:64],
                            loss=loss, vocab=vocab).loss.backward()  # fmt: skip
        hidden.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_distillation(hidden, weight, teacher, labels, loss=loss, vocab=vocab).loss.backward()
        extra = torch.cuda.max_memory_allocated() - before - 2 * (hidden.numel() + weight.numel())
        extras.append(extra / (2 * vocab * distilled_at_once(vocab, 8192, "triton")))
    assert min(extras) > 1.99 and max(extras) < 2.1, extras


def test_the_heads_gradient_is_a_sum_of_unrounded_products() -> None:
    assert _sums_in_fp32(torch.bfloat16, torch.device("cuda", torch.cuda.current_device())) != "rounded"
    torch.manual_seed(0)
    hidden = torch.randn(4096, 64, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(1000, 64, device="cuda").div_(8).requires_grad_()
    labels = torch.randint(0, 1000, (4096,), device="cuda")
    linear_cross_entropy(hidden, weight, labels, chunk_tokens=512).loss.backward()
    logits = torch.nn.functional.linear(hidden, weight.detach().bfloat16())
    cross_entropy_rows(logits, labels, None, 1000, 0.0, 0.0, True)
    exact = logits.double().T @ hidden.double()
    assert weight.grad is not None
    assert ((weight.grad - exact).norm() / exact.norm()).item() < 1e-5  # each product rounded to bf16: 1e-3


def test_triton_is_torch_on_a_gpu() -> None:
    torch.manual_seed(0)
    for vocab, dtype in ((50_257, torch.bfloat16), (VOCAB, torch.bfloat16), (5000, torch.float32)):
        hidden, weight = torch.randn(1024, 256, device="cuda", dtype=dtype), torch.randn(vocab, 256, device="cuda") / 16
        labels = torch.randint(0, vocab, (1024,), device="cuda")
        labels[5:50] = -100
        results = []
        for backend in ("torch", "triton"):
            states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
            with use_backend(backend):  # type: ignore[arg-type]
                sums = linear_cross_entropy(states, head, labels, z_loss=1e-4, chunk_tokens=384)
            (sums.loss / 979).backward()
            results.append((sums, states.grad, head.grad))
        (plain, *plain_gradients), (ours, *gradients) = results
        assert ours.loss.item() == pytest.approx(plain.loss.item(), rel=1e-5)
        assert ours.correct.item() == plain.correct.item()
        for mine, theirs in zip(gradients, plain_gradients, strict=True):
            most = 1e-5 if dtype == torch.float32 else 1e-2
            assert ((mine.float() - theirs.float()).norm() / theirs.float().norm()).item() < most


def test_a_head_of_a_group_is_the_head_of_one_process() -> None:
    """A group of one: messages are sent, and change nothing."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        _of_a_group()
    finally:
        dist.destroy_process_group()


def _of_a_group() -> None:
    group = dist.group.WORLD
    assert group is not None
    torch.manual_seed(0)
    hidden, weight = torch.randn(700, 64, device="cuda"), torch.randn(1003, 64, device="cuda") / 8
    teacher = TeacherHead(torch.randn(700, 96, device="cuda"), torch.randn(1003, 96, device="cuda") / 8)
    labels = torch.randint(0, 1000, (700,), device="cuda")
    labels[5:50] = -100
    loss = DistillationLoss("jsd", temperature=2.0, alpha=0.5)

    def run(function: Any, *arguments: Any, **options: Any) -> tuple[Any, Tensor, Tensor]:
        states, head = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        sums = function(states, head, *arguments, **options)
        (sums.loss / 655).backward()
        assert states.grad is not None and head.grad is not None
        return sums, states.grad, head.grad

    alone = run(linear_cross_entropy, labels, z_loss=1e-3, chunk_tokens=256)
    shared = run(vocab_parallel_linear_cross_entropy, labels, vocab=1003, group=group, z_loss=1e-3, chunk_tokens=256)
    taught = run(linear_distillation, teacher, labels, loss=loss, vocab=1000)
    spread = run(linear_distillation, teacher, labels, loss=loss, vocab=1000, spread=Spread(group, 1003))
    for (ours, *gradients), (plain, *plain_gradients) in ((shared, alone), (spread, taught)):
        for mine, theirs in zip(ours, plain, strict=True):
            assert mine.item() == pytest.approx(theirs.item(), rel=1e-5)
        for mine, theirs in zip(gradients, plain_gradients, strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-4)
