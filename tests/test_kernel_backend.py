"""Which path the fused losses take: plans of a GPU count its memory, and a machine without one needs no Triton."""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cheaptrain_kernels import (
    DistillationLoss,
    TeacherHead,
    backend_for,
    distilled_at_once,
    linear_cross_entropy,
    linear_distillation,
    use_backend,
)
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaConfig

from cheaptrain.recipe.layout import Layout
from cheaptrain.report.measure import Setting, measure
from cheaptrain.report.tracker import LOSS, WEIGHTS, Tracker


def _alive(fake: FakeTensorMode, given: list[Tensor], work: Callable[[], Tensor]) -> int:
    """Bytes at the fullest moment of a loss and its backward, beside what is given and the gradients it is to make."""
    tracker = Tracker(fake)
    for tensor in given:
        tracker.note(tensor, WEIGHTS)
    with tracker:
        work().backward()
    made = [tensor.grad for tensor in given if tensor.grad is not None]
    kept = sum(tensor.untyped_storage().nbytes() for tensor in given + made)
    return max(total for total, _ in tracker.peaks.values()) - kept


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_plan_counts_one_chunk_of_logits_in_the_compute_dtype(dtype: torch.dtype, size: int) -> None:
    tokens, vocab, chunk = 4096, 32_768, 1024
    with FakeTensorMode() as fake, use_backend("triton"):
        hidden = torch.empty(tokens, 16, dtype=dtype, requires_grad=True)
        weight, labels = torch.empty(vocab, 16, requires_grad=True), torch.zeros(tokens, dtype=torch.int64)
        extra = _alive(
            fake,
            [hidden, weight, labels],
            lambda: linear_cross_entropy(hidden, weight, labels, chunk_tokens=chunk).loss,
        )
    assert 1.0 <= extra / (size * vocab * chunk) < 1.1


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_a_plan_counts_one_tensor_of_logits_a_model_whatever_the_vocabulary(divergence: Any) -> None:
    peaks = []
    for vocab in (65_536, 131_072, 262_144):
        with FakeTensorMode() as fake, use_backend("triton"):
            hidden = torch.empty(8192, 16, dtype=torch.bfloat16, requires_grad=True)
            weight = torch.empty(vocab, 16, requires_grad=True)
            teacher = TeacherHead(torch.empty(8192, 24, dtype=torch.bfloat16), torch.empty(vocab, 24))
            labels, loss = torch.zeros(8192, dtype=torch.int64), DistillationLoss(divergence, alpha=0.5, temperature=2)
            extra = _alive(
                fake,
                [hidden, weight, teacher.hidden, teacher.weight, labels],
                lambda: linear_distillation(hidden, weight, teacher, labels, loss=loss, vocab=vocab).loss,  # noqa: B023
            )
        peaks.append(extra / (2 * vocab * distilled_at_once(vocab, 8192, "triton")))
    assert min(peaks) >= 2.0 and max(peaks) < 2.1, peaks


def test_a_large_chunk_is_whole_tiles_of_a_matrix_product() -> None:
    assert distilled_at_once(128_256, 8192, "triton") == 4096
    assert distilled_at_once(128_256, 1000, "triton") == 1000
    assert distilled_at_once(2**22, 8192, "triton") == 128
    assert distilled_at_once(128_256, 8192) == 523


def test_a_machine_without_a_gpu_never_imports_triton() -> None:
    code = (
        "import sys, torch, cheaptrain_kernels as k\n"
        "h, w = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)\n"
        "k.linear_cross_entropy(h, w, torch.tensor([1, 2, -100])).loss.backward()\n"
        "assert h.grad is not None\n"
        "sys.exit(7 if 'triton' in sys.modules else 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], env=_environment(), timeout=120).returncode == 0


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""}


def test_another_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="no backend 'cuda'"), use_backend("cuda"):  # type: ignore[arg-type]
        pass


def test_what_is_forced_ends_with_its_block() -> None:
    cpu = torch.device("cpu")
    with use_backend("triton"):
        assert backend_for(cpu) == "triton"
        with use_backend("torch"):
            assert backend_for(torch.device("cuda")) == "torch"
        assert backend_for(cpu) == "triton"
    assert backend_for(cpu) == "torch"


def test_a_plan_for_a_gpu_counts_no_fp32_logits() -> None:
    config = LlamaConfig(
        vocab_size=4096, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    setting = Setting(Layout(), 256, 2, False, False, True, False, 512)

    def at_the_loss(setting: Setting) -> int:
        return max(moment.parts.get(LOSS, 0) for moment in measure(config, setting).moments)

    saved = at_the_loss(setting) - at_the_loss(replace(setting, backend="triton"))
    assert saved > 4 * 4096 * 512  # at the least one fp32 tensor of all logits
