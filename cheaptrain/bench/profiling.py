"""Where a step goes: the profiler's kernels of a few steps, by what they are for.

Kernels are told apart by their names, which are those of cuBLAS, cuDNN, flash-attn, inductor and our own; what no rule
knows is counted as "other", never dropped. The gap that remains between the sum of the kernels and the time of the
steps is "idle": the device had nothing to do. On a CPU it is the time of operators, and "idle" is what lies between.
"""

import gc
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.profiler import profile as torch_profile

from cheaptrain.bench.measure import wait_for
from cheaptrain.bench.trial import Figures, Unavailable
from cheaptrain.bench.variants import prepare
from cheaptrain.bench.works import Work
from cheaptrain.errors import CheaptrainError

STEPS, WARM, TOP = 3, 4, 15
# The first that fits counts.
CATEGORIES = (
    ("attention", r"flash|fmha|cudnn.*(sdpa|attn)|attention|varlen|flex"),
    (
        "loss kernels",
        r"cross_entropy|divergence|row_statistics|statistics_of_row|softmax_gradient|jsd|kl_div|log_?softmax|nll_loss"
        r"|logsumexp|(^|_)(loss|logits)",
    ),
    ("optimizer", r"adam|muon|multi_tensor|foreach|lerp"),
    ("matmul", r"gemm|nvjet|cutlass|cublas|aten::(mm|addmm|bmm|baddbmm|linear|matmul)_?$|mkldnn|_scaled_mm|xmma"),
    ("copies and casts", r"memcpy|memset|copy|aten::(_?to|clone|contiguous|cat|fill_|zero_)|CatArray"),
    ("communication", r"nccl|all_?reduce|reduce_scatter|all_?gather|broadcast|c10d|gloo"),
    (
        "norms and element-wise",
        r"triton|^_(forward|backward)$|norm|elementwise|reduce|aten::|index|gather|scatter|embedding|softmax",
    ),
)


def profile(work: Work, variant: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds a step of each category, the kernels that take longest, and the gaps; or {"error"}."""
    on_gpu, at_once = device.type == "cuda", work.micro_rows
    seen: tuple[torch_profile, float] | None = None
    while seen is None and at_once:
        try:
            seen = _recorded(work, variant, device, at_once)
        except torch.OutOfMemoryError:
            at_once //= 2
        except (Unavailable, CheaptrainError, ImportError) as error:
            return {"error": str(error)}
        gc.collect()
        if on_gpu:
            torch.cuda.empty_cache()
    if seen is None:
        return {"error": "out of memory with one row at once"}
    profiler, seconds = seen
    times: defaultdict[str, float] = defaultdict(float)
    calls: defaultdict[str, int] = defaultdict(int)
    for event in profiler.key_averages():
        # On a GPU the operators of the host are listed as well, with the time of the kernels they started, and so are
        # stretches that somebody gave a name.
        if event.is_user_annotation or (on_gpu and event.device_type == DeviceType.CPU):
            continue
        milliseconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1000 / STEPS
        if milliseconds > 0:
            times[event.key] += milliseconds
            calls[event.key] += event.count // STEPS
    step = 1000 * seconds / STEPS
    categories: defaultdict[str, float] = defaultdict(float)
    for name, milliseconds in times.items():
        categories[category(name)] += milliseconds
    categories["idle"] = max(0.0, step - sum(times.values()))
    return {
        "step_ms": step,
        "categories_ms": dict(_longest(categories)),
        "kernels": [
            {"name": name, "ms": milliseconds, "calls": calls[name], "category": category(name)}
            for name, milliseconds in _longest(times)[:TOP]
        ],
    }


def _longest(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda item: -item[1])


def _recorded(work: Work, variant: str, device: torch.device, micro_rows: int) -> tuple[torch_profile, float]:
    """The profiler of some steps after it was stopped, and their seconds."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    profiler = torch_profile(activities=activities)
    moments: list[float] = []
    done = 0

    def clock(figures: Callable[[], Figures]) -> bool:
        nonlocal done
        done += 1
        if done in (WARM, WARM + STEPS):
            wait_for(device)
            if moments:
                moments.append(time.perf_counter())
                profiler.stop()
                return False
            profiler.start()
            moments.append(time.perf_counter())
        return True

    prepare(variant)(work, variant, device, micro_rows).run(clock)
    return profiler, moments[1] - moments[0]


def category(name: str) -> str:
    """What a kernel or operator of this name is for."""
    return next((what for what, rule in CATEGORIES if re.search(rule, name, re.IGNORECASE)), "other")
