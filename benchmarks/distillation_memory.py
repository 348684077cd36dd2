"""Memory of the distillation loss against the size of the vocabulary: `python benchmarks/distillation_memory.py`.

Both heads, forward and backward, on 2,048 tokens in fp32: how far the resident memory of a process grows beyond the
heads, the hidden states and the gradients that the loss is there to make. Each vocabulary in a process of its own.
Beside it what whole logits and autograd (`linear_distillation_reference`) take, counted on tensors without memory,
because it would not fit. Writes benchmarks/results/distillation_memory.json.
"""

import os
import pickle
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cheaptrain_kernels import (
    DistillationLoss,
    TeacherHead,
    distilled_at_once,
    linear_distillation,
    linear_distillation_reference,
)
from results import report
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cheaptrain.report.tracker import WEIGHTS, Tracker

TOKENS, STUDENT, TEACHER = 2048, 64, 96
VOCABULARIES = (32_768, 65_536, 131_072, 262_144)
LOSSES = ("forward_kl", "reverse_kl", "jsd")


def main() -> None:
    rows, data = [], {}
    for vocab in VOCABULARIES:
        took = {kind: _in_child(lambda: _measured(vocab, kind)) for kind in LOSSES}  # noqa: B023 (called at once)
        plain = _counted(vocab)
        data[str(vocab)] = {"chunk_tokens": distilled_at_once(vocab, TOKENS), "grown_bytes": took, "plain_bytes": plain}
        largest = max(bytes_ for bytes_, _ in took.values())
        rows.append(
            [
                f"{vocab:,}",
                f"{distilled_at_once(vocab, TOKENS):,}",
                *(f"{took[kind][0] / 2**20:,.0f}" for kind in LOSSES),
                f"{plain / 2**20:,.0f}",
                f"{sum(seconds for _, seconds in took.values()) / len(took):.1f}",
            ]
        )
        print(f"vocabulary {vocab:,}: {largest / 2**20:,.0f} MiB", flush=True)
    report(
        "distillation_memory",
        title=f"Distillation loss: peak MiB beside heads and gradients, {TOKENS:,} tokens, fp32",
        header=["vocabulary", "tokens a chunk", "forward KL", "reverse KL", "JSD", "whole logits, forward KL", "s"],
        rows=rows,
        data=data,
    )


def _measured(vocab: int, kind: str) -> tuple[int, float]:
    """Bytes that the process grew by at its fullest, and seconds."""
    torch.set_num_threads(1)
    hidden, weight, teacher, labels = _case(vocab)
    loss: Any = DistillationLoss(kind)  # type: ignore[arg-type]
    linear_distillation(  # what libraries set up for themselves
        hidden[:8], weight, TeacherHead(teacher.hidden[:8], teacher.weight), labels[:8], loss=loss, vocab=vocab
    )
    made = 4 * (hidden.numel() + weight.numel())
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, began = _resident("VmRSS"), time.perf_counter()
    sums = linear_distillation(hidden, weight, teacher, labels, loss=loss, vocab=vocab)
    (sums.loss / TOKENS).backward()
    return _resident("VmHWM") - before - made, time.perf_counter() - began


def _counted(vocab: int) -> int:
    """The same of whole logits and autograd, by the storages of fake tensors."""
    with FakeTensorMode() as fake:
        hidden, weight, teacher, labels = _case(vocab)
        tracker = Tracker(fake)
        for tensor in (hidden, weight, *teacher[:2], labels):
            tracker.note(tensor, WEIGHTS)
        inputs = sum(tensor.untyped_storage().nbytes() for tensor in (hidden, weight, *teacher[:2], labels))
        with tracker:
            sums = linear_distillation_reference(hidden, weight, teacher, labels, loss=DistillationLoss(), vocab=vocab)
            (sums.loss / TOKENS).backward()
        return max(total for total, _ in tracker.peaks.values()) - inputs - 4 * (hidden.numel() + weight.numel())


def _case(vocab: int) -> tuple[Tensor, Tensor, TeacherHead, Tensor]:
    hidden = torch.randn(TOKENS, STUDENT, requires_grad=True)
    weight = torch.randn(vocab, STUDENT, requires_grad=True)
    teacher = TeacherHead(torch.randn(TOKENS, TEACHER), torch.randn(vocab, TEACHER) / 8)
    return hidden, weight, teacher, torch.randint(0, vocab, (TOKENS,))


def _resident(which: str) -> int:
    found = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
    assert found
    return int(found[1]) * 1024


def _in_child(work: Callable[[], tuple[int, float]]) -> tuple[int, float]:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, pickle.dumps(work()))
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer: tuple[int, float] = pickle.loads(pipe.read())
    os.waitpid(child, 0)
    return answer


if __name__ == "__main__":
    main()
