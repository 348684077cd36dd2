"""Measuring one variant of one work, in a process that does nothing else.

The first three steps are read one by one: how long the first took, and losses and gradient norms, by which the table
shows that nobody was measured doing less. Then a few steps to warm up, and the steps that count are timed as one block
between two moments at which the device was idle, so that gaps and what the host does belong to the figure.

What does not fit in memory is put together again with half the rows at once, as anyone would do.
"""

import gc
import math
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from cheaptrain.bench.rows import attended
from cheaptrain.bench.trial import Figures, Trial, Unavailable, spec_of
from cheaptrain.bench.variants import prepare
from cheaptrain.bench.works import TRL, TRL_FLEX, Shape, Work
from cheaptrain.errors import CheaptrainError
from cheaptrain.model.facts import model_facts

READ, WARM = 3, 2
LONGEST_SECONDS = 6.0  # of the timed block: fewer steps where they are long, but three at least
RECOMPUTING = (TRL, TRL_FLEX)  # with one row at once there is still something to give up


def measure(work: Work, variant: str, device: torch.device) -> dict[str, Any]:
    """The sample of one variant: tokens/s and what goes with it, or {"error": why there is none}."""
    began = time.perf_counter()
    try:
        build = prepare(variant)
    except ImportError as error:
        return {"error": f"cannot be imported: {error}"}
    micro_rows: int | None = work.micro_rows
    while micro_rows is not None:
        at_once = micro_rows
        sample = _attempt(lambda: build(work, variant, device, at_once), work, device, began)  # noqa: B023
        if sample is not None:
            return sample | _facts(work) | {"micro_rows": max(1, at_once)} if "error" not in sample else sample
        micro_rows = at_once // 2 if at_once > 1 else (0 if at_once == 1 and variant in RECOMPUTING else None)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
    return {"error": "out of memory with one row at once"}


def flops_per_token(work: Work) -> float:
    """6·N + 12·layers·heads·head_dim·T, N with the embedding counted once, T the mean length of the document that a
    token is in; of a teacher a third, for its forward pass."""
    length = attended(work)

    def of(shape: Shape) -> float:
        one, two = (
            model_facts(spec_of(shape), vocab_size=work.vocab, seq_len=seq_len).flops_per_token for seq_len in (1, 2)
        )
        return one + (length - 1) * (two - one)

    return of(work.model) + (of(work.teacher) / 3 if work.teacher is not None else 0.0)


class StepClock:
    """Counts the steps of a trial, reads the first ones and times the last; see `trial.Clock`."""

    def __init__(self, work: Work, device: torch.device, began: float) -> None:
        self.work, self.device, self.began = work, device, began
        self.done = 0
        self.read: list[Figures] = []
        self.first_step_seconds = self.seconds = self.started = self.last = 0.0
        self.steps = work.loss_steps or work.steps

    def __call__(self, figures: Callable[[], Figures]) -> bool:
        self.done += 1
        if self.work.loss_steps:
            self.read.append(figures())
            self.first_step_seconds = self.first_step_seconds or time.perf_counter() - self.began
            return self.done < self.steps
        if self.done <= READ:
            self.read.append(figures())
            if self.done == 1:
                self.first_step_seconds = time.perf_counter() - self.began
            if self.done == READ:
                a_step = time.perf_counter() - self.last
                self.steps = max(3, min(self.work.steps, int(LONGEST_SECONDS / max(a_step, 1e-9))))
            self.last = time.perf_counter()
        elif self.done == READ + WARM:
            gc.collect()
            gc.freeze()  # as cheaptrain does; nobody shall be measured with a collection in the middle
            wait_for(self.device)
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(self.device)
            self.started = time.perf_counter()
        elif self.done == READ + WARM + self.steps:
            wait_for(self.device)
            self.seconds = time.perf_counter() - self.started
            gc.unfreeze()
            return False
        return True


def wait_for(device: torch.device) -> None:
    """Return when the device is idle."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attempt(build: Callable[[], Trial], work: Work, device: torch.device, began: float) -> dict[str, Any] | None:
    """A sample without the facts of its work; None when memory did not suffice."""
    clock = StepClock(work, device, began)
    try:
        trial = build()
        trial.run(clock)
    except torch.OutOfMemoryError:
        return None
    except (Unavailable, CheaptrainError) as reason:
        return {"error": str(reason)}
    except Exception as error:  # of any library: a row that says so, and the other rows go on
        if "out of memory" in str(error).lower():  # as Triton and cuBLAS say it
            return None
        words = " ".join(str(error).split())
        return {"error": f"{type(error).__name__}: {words[:300]}"}
    if not all(math.isfinite(figure) for figures in clock.read for figure in figures):
        return {"error": f"loss or gradients are not finite: {clock.read}"}
    sample: dict[str, Any] = {
        "first_step_seconds": clock.first_step_seconds,
        "losses": [figures.loss for figures in clock.read],
        "grad_norms": [figures.grad_norm for figures in clock.read],
        "note": trial.note,
    }
    if not work.loss_steps:
        sample |= {
            "tokens_per_second": clock.steps * work.tokens / clock.seconds,
            "steps": clock.steps,
            "seconds": clock.seconds,
            "peak_bytes": _peak(device),
        }
    return sample


def _facts(work: Work) -> dict[str, Any]:
    facts = model_facts(spec_of(work.model), work.vocab, work.seq_len)
    return {"parameters": facts.parameters, "flops_per_token": flops_per_token(work)}


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Of the whole process since it began; Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
