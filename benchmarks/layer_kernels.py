"""The kernels for layers beside what torch.compile makes of the plain code: `python benchmarks/layer_kernels.py`.

RMSNorm with the addition before it, SwiGLU, and RoPE with the norm of queries and keys, forward and backward, at the
shapes of two presets, in bf16 over an fp32 residual stream. What counts is the time that the GPU itself is busy, not
what launching takes: inside a compiled layer nobody waits for that. Beside both stands what the bytes alone take that
have to be read and written, at the bandwidth of a copy measured in the same run. A kernel that does not beat
torch.compile clearly has no place in training.

On a GPU machine it writes benchmarks/results/layer_kernels.json. Without one it runs small shapes of the plain code,
compiled and not, prints the table, and writes nothing: that shows that it works, and no more. (It is not called
kernels.py: transformers would take that for the package of this name.)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cheaptrain_kernels.rms_norm import add_rms_norm, add_rms_norm_reference
from cheaptrain_kernels.rope import rope, rope_reference
from cheaptrain_kernels.swiglu import swiglu, swiglu_reference
from results import report, table
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from cheaptrain.bench.floor import copy_bandwidth, seconds_of
from cheaptrain.model.presets import find_preset

PRESETS = {"mobilellm-950m": 32_768, "mobilellm-140m": 65_536}  # tokens of a micro-batch
FEW_TOKENS = 64  # without a GPU
EPS = 1e-5
REPEATS = 10

Function = Callable[..., Tensor | tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One operation at one shape; `bytes`: what forward and backward have to read and write at least."""

    name: str
    kernel: Function
    plain: Function
    inputs: Sequence[Tensor]
    bytes: int


def main() -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    bandwidth = copy_bandwidth(device)
    rows, data = [], {}
    for preset, tokens in PRESETS.items():
        for case in _cases(preset, tokens if on_gpu else FEW_TOKENS, device):
            torch._dynamo.reset()  # else later shapes would be compiled for any size
            took = {
                "kernel": _seconds(case.kernel if on_gpu else case.plain, case.inputs, device),
                "compiled": _seconds(torch.compile(case.plain, dynamic=False), case.inputs, device),
                "bytes": case.bytes / bandwidth,
            }
            data[f"{preset}: {case.name}"] = took
            times = [f"{took[name] * 1e3:.3f}" for name in ("kernel", "compiled", "bytes")]
            rows.append([preset, case.name, *times, f"{took['compiled'] / took['kernel']:.2f}×"])
            print(" | ".join(rows[-1]), flush=True)
    where = torch.cuda.get_device_name(device) if on_gpu else "CPU, plain code in place of the kernels"
    header = ["shape", "forward + backward, ms", "kernel", "torch.compile", "bytes at copy speed", "kernel faster"]
    if not on_gpu:
        print(f"\n{where}\n{table(header, rows)}")
        return
    report(
        "layer_kernels",
        title=f"Kernels for layers, {where}, a copy moves {bandwidth / 1e12:.2f} TB/s",
        header=header,
        rows=rows,
        data=data,
    )


def _cases(preset: str, tokens: int, device: torch.device) -> Iterator[Case]:
    fields = find_preset(preset).fields
    hidden, ffn, dim = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    heads = fields["num_attention_heads"] + fields["num_key_value_heads"]

    def given(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device=device).to(dtype).requires_grad_()

    # Forward reads 2 + 4 bytes a number and writes 4 + 2; backward reads 2 + 4 + 4 and writes 2 + 4.
    yield Case(
        "sum and RMSNorm",
        lambda x, stream, gain: add_rms_norm(x, stream, gain, EPS, torch.bfloat16),
        lambda x, stream, gain: add_rms_norm_reference(x, stream, gain, EPS, torch.bfloat16),
        [given(tokens, hidden), given(tokens, hidden, dtype=torch.float32), given(hidden, dtype=torch.float32)],
        28 * tokens * hidden,
    )
    # 4 + 2 and 2 + 4 + 4.
    yield Case("SwiGLU", swiglu, swiglu_reference, [given(tokens, 2 * ffn)], 16 * tokens * ffn)
    angles = torch.randn(1, tokens, dim // 2, device=device)
    cosines, sines = angles.cos(), angles.sin()
    for name, interleaved, gains in (
        ("norm with gains and RoPE, half-split", False, [given(dim, dtype=torch.float32)]),
        ("norm and RoPE, interleaved", True, []),
    ):

        def turned(function: Callable[..., Tensor], interleaved: bool = interleaved) -> Callable[..., Tensor]:
            def run(states: Tensor, *gain: Tensor) -> Tensor:
                return function(
                    states, cosines, sines, interleaved=interleaved, eps=EPS, gain=gain[0] if gain else None
                )

            return run

        # 2 + 2 and 2 + 2 + 2, and both tables, which are half as long as a head, in fp32, twice.
        yield Case(
            name,
            turned(rope),
            turned(rope_reference),
            [given(1, tokens, heads, dim), *gains],
            10 * tokens * heads * dim + 8 * tokens * dim,
        )


def _seconds(function: Function, inputs: Sequence[Tensor], device: torch.device) -> float:
    """Of a forward and a backward pass; on a GPU only while it is busy."""
    outputs = function(*inputs)
    above = [torch.randn_like(x) for x in (outputs if isinstance(outputs, tuple) else (outputs,))]

    def work() -> Any:
        return torch.autograd.grad(function(*inputs), inputs, above)

    if device.type != "cuda":
        return seconds_of(work, device)
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as kept:
        for _ in range(REPEATS):
            work()
        torch.cuda.synchronize()
    # Only what ran on the GPU itself: calls of the host are listed with the time of what they started as well.
    busy = (e.self_device_time_total for e in kept.key_averages() if e.device_type == DeviceType.CUDA)
    return sum(busy) / REPEATS / 1e6


if __name__ == "__main__":
    main()
