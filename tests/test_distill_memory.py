"""The memory of the distillation loss, counted on tensors without memory: flat, and four logits of a chunk at most."""

from typing import Any

import pytest
import torch
from cheaptrain_kernels import DistillationLoss, TeacherHead, TopK, distilled_at_once, linear_distillation
from torch._subclasses.fake_tensor import FakeTensorMode

from cheaptrain.report.tracker import WEIGHTS, Tracker

TOKENS = 8192
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)


def _logits_alive(vocab: int, loss: DistillationLoss, kind: str) -> float:
    """What is alive at the fullest moment beside inputs and gradients, in fp32 logits of one chunk."""
    with FakeTensorMode() as fake:
        hidden, weight = torch.empty(TOKENS, 64, requires_grad=True), torch.empty(vocab, 64, requires_grad=True)
        labels = torch.zeros(TOKENS, dtype=torch.int64)
        teacher: TeacherHead | TopK = TeacherHead(torch.empty(TOKENS, 96), torch.empty(vocab, 96))
        if kind != "full":
            teacher = teacher._replace(top_k=64)
        if kind == "cached":
            teacher = TopK(
                *(torch.zeros(TOKENS, 64, dtype=d) for d in (torch.int32, torch.float32)), torch.zeros(TOKENS)
            )
        given = [hidden, weight, labels, *(part for part in teacher if isinstance(part, torch.Tensor))]
        tracker = Tracker(fake)
        for tensor in given:
            tracker.note(tensor, WEIGHTS)
        with tracker:
            sums = linear_distillation(hidden, weight, teacher, labels, loss=loss, vocab=vocab)
            (sums.loss / TOKENS).backward()
    before = sum(tensor.untyped_storage().nbytes() for tensor in given) + 4 * (hidden.numel() + weight.numel())
    fullest = max(total for total, _ in tracker.peaks.values())
    return (fullest - before) / (4 * vocab * distilled_at_once(vocab, TOKENS))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_the_peak_grows_with_the_vocabulary(divergence: Any) -> None:
    for alpha, temperature in ((1.0, 1.0), (0.5, 2.0)):
        loss = DistillationLoss(divergence, temperature=temperature, alpha=alpha)
        peaks = [_logits_alive(vocab, loss, "full") for vocab in VOCABULARIES]
        assert max(peaks) < 4.1
        assert max(peaks) / min(peaks) < 1.02, peaks


def test_a_teacher_out_of_a_cache_needs_no_logits_of_its_own() -> None:
    for kind, most in (("full", 3.1), ("top-k", 3.1), ("cached", 2.1)):
        assert 1.9 < _logits_alive(131_072, DistillationLoss(), kind) < most, kind
