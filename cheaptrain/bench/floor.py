"""The floor of a step: what its matmuls, attention and memory traffic take on this machine, each measured by itself.

    matmuls       forward and both backward ones of every matrix, at the real number of rows; queries, keys and values,
                  and gate and up, as one matrix where that is faster; the head in pieces of at most 8,192 rows
    attention     forward and backward of the fastest kernel there is at the shape
    traffic       bytes that the rest cannot do without, over the bandwidth of a copy: residuals and norms, RoPE, the
                  activation, logits into their gradient, weights to bf16 and gradients back, clipping, AdamW

No training step of this arithmetic is faster than the sum, short of doing several of its parts at once, or of matmuls
that other shapes make faster. It is a yardstick, not a promise: "share of floor" says how much of a step is not
explained by it. The embedding's lookup is left out.
"""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from cheaptrain.bench.measure import wait_for
from cheaptrain.bench.rows import step_rows
from cheaptrain.bench.trial import config_of
from cheaptrain.bench.works import Shape, Work
from cheaptrain.model.attention.choice import AttentionShape, try_attention
from cheaptrain.model.build import meta_model
from cheaptrain.model.parts import decoder_layers, head

HEAD_ROWS = 8192
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_REPEATS, _AT_LEAST_SECONDS = 3, 0.03


@dataclass(frozen=True)
class Dimensions:
    """What the floor of a model follows from. `matrices`: (inputs, outputs of those that read the same) → how many."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    gated: bool
    vocab: int
    parameters: int
    matrices: dict[tuple[int, tuple[int, ...]], int]


def measure_floor(work: Work, device: torch.device) -> dict[str, Any]:
    """Milliseconds of each part of one step of `work`, and tokens/s if it took no longer."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    micro_batches = work.rows // work.micro_rows
    tokens = work.micro_rows * work.seq_len
    bandwidth = copy_bandwidth(device)
    shape = dimensions(work, work.model)
    parts = _model_parts(work, shape, tokens, device, dtype, backward=True)
    logits_read_or_written = 2
    if work.teacher is not None:
        of_teacher = _model_parts(work, dimensions(work, work.teacher), tokens, device, dtype, backward=False)
        parts |= {f"teacher's {name}": milliseconds for name, milliseconds in of_teacher.items()}
        logits_read_or_written = 3
    seconds_a_byte = 1 / bandwidth
    bytes_of = {
        "residuals, norms, RoPE, activation": _elementwise_numbers(shape) * tokens * dtype.itemsize,
        "logits": logits_read_or_written * shape.vocab * tokens * dtype.itemsize,
    }
    if dtype != torch.float32:
        bytes_of["weights to bf16, gradients back"] = shape.parameters * (4 + 2 + 2 + 4)
    parts |= {name: 1000 * count * seconds_a_byte for name, count in bytes_of.items()}
    parts = {name: milliseconds * micro_batches for name, milliseconds in parts.items()}
    parts["clipping and AdamW"] = 1000 * shape.parameters * 4 * (2 + 7) * seconds_a_byte
    total = sum(parts.values())
    return {
        "tokens_per_second": work.tokens / total * 1000,
        "parts_ms": {name: round(milliseconds, 4) for name, milliseconds in parts.items()},
        "copy_bytes_per_second": bandwidth,
        "note": f"{total:.1f} ms a step",
    }


def dimensions(work: Work, of: Shape) -> Dimensions:
    """Read off the model itself, built without weights."""
    model = meta_model(config_of(work, of))
    config, found = model.config, Counter[tuple[int, tuple[int, ...]]]()
    gated, ffn = False, 0
    for layer in decoder_layers(model):
        # By the whole name: GPT-2's attention and its MLP both have a `c_proj`.
        sizes = {name: _size(module) for name, module in layer.named_modules() if _is_matrix(module)}
        gates = [size for name, size in sizes.items() if name.endswith("gate_proj")]
        gated, ffn = bool(gates), gates[0][1] if gates else max(outputs for _, outputs in sizes.values())
        for group in _TOGETHER:
            members = [name for name in sizes if name.rpartition(".")[2] in group]
            if len(members) == len(group):
                shapes = [sizes.pop(name) for name in members]
                found[shapes[0][0], tuple(outputs for _, outputs in shapes)] += 1
        for inputs, outputs in sizes.values():
            found[inputs, (outputs,)] += 1
    heads = config.num_attention_heads
    return Dimensions(
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=ffn,
        gated=gated,
        vocab=head(model).weight.shape[0],
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=dict(found),
    )


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by a copy too large for any cache."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / seconds_of(lambda: target.copy_(source), device)


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """The median of a few timings of `work`, each of as many calls as take a measurable time; the first are not
    counted."""
    work()
    wait_for(device)
    began = time.perf_counter()
    work()
    wait_for(device)
    calls = max(1, min(100, int(_AT_LEAST_SECONDS / max(time.perf_counter() - began, 1e-7))))
    timings = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        for _ in range(calls):
            work()
        wait_for(device)
        timings.append((time.perf_counter() - began) / calls)
    return statistics.median(timings)


def _model_parts(
    work: Work, of: Dimensions, tokens: int, device: torch.device, dtype: torch.dtype, *, backward: bool
) -> dict[str, float]:
    """Milliseconds of matmuls and attention of one micro-batch."""

    def matmul(rows: int, inputs: int, outputs: int) -> float:
        return 1000 * _matmul_seconds(rows, inputs, outputs, device, dtype, backward)

    matrices = 0.0
    for (inputs, outputs), count in of.matrices.items():
        alone = sum(matmul(tokens, inputs, each) for each in outputs)
        together = matmul(tokens, inputs, sum(outputs)) if len(outputs) > 1 else alone
        matrices += count * min(alone, together)
    rows = min(tokens, HEAD_ROWS)
    return {
        "matmuls of the layers": matrices,
        "matmuls of the head": matmul(rows, of.hidden, of.vocab) * tokens / rows,
        "attention": 1000 * of.layers * _attention_seconds(work, of, device, dtype, backward),
    }


def _matmul_seconds(
    rows: int, inputs: int, outputs: int, device: torch.device, dtype: torch.dtype, backward: bool
) -> float:
    x = torch.randn(rows, inputs, device=device, dtype=dtype)
    weight = torch.randn(outputs, inputs, device=device, dtype=dtype)
    total = seconds_of(lambda: functional.linear(x, weight), device)
    if backward:
        gradient = torch.randn(rows, outputs, device=device, dtype=dtype)
        total += seconds_of(lambda: gradient @ weight, device) + seconds_of(lambda: gradient.t() @ x, device)
    return total


def _attention_seconds(work: Work, of: Dimensions, device: torch.device, dtype: torch.dtype, backward: bool) -> float:
    """Of the fastest kernel at the shape of one micro-batch."""
    rows = step_rows(work, 0, work.micro_rows)[0]
    if device.type == "cuda" and backward:
        shape = AttentionShape(work.micro_rows, work.seq_len, of.heads, of.kv_heads, of.head_dim)
        trial = try_attention(shape, device, None if work.documents is None else rows.document_ids)
        if trial.milliseconds:
            return min(trial.milliseconds.values()) / 1000

    def tensor(heads: int) -> Tensor:
        shape = (work.micro_rows, heads, work.seq_len, of.head_dim)
        return torch.randn(shape, device=device, dtype=dtype, requires_grad=backward)

    query, key, value = tensor(of.heads), tensor(of.kv_heads), tensor(of.kv_heads)
    gradient = torch.randn_like(query)

    def run() -> None:
        out = _one_by_one(query, key, value, rows.lengths) if work.documents else _causal(query, key, value)
        if backward:
            torch.autograd.grad(out, (query, key, value), gradient)

    if device.type != "cuda":
        return seconds_of(run, device)
    timings = []
    for backend in _BACKENDS:
        with sdpa_kernel(backend), suppress(RuntimeError):  # one that does not know this shape is no candidate
            timings.append(seconds_of(run, device))
    return min(timings)


_BACKENDS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def _elementwise_numbers(of: Dimensions) -> float:
    """Numbers that one token's way through the layers, forth and back, has to read or write between the matmuls.

    Twice a layer a residual is added and normed (read two, write two; the same again back); queries and keys are turned
    (read and write; back they are read besides); the activation reads what the matmul wrote and writes what the next
    one reads (back it reads the gradient besides, and writes one for each of its inputs).
    """
    turned = (of.heads + of.kv_heads) * of.head_dim
    inner = of.ffn * (8 if of.gated else 5)
    return float(of.layers * (2 * 8 * of.hidden + (5 * turned if of.gated else 0) + inner))


def _is_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 2


def _size(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs; GPT-2's Conv1D stores them the other way round than nn.Linear."""
    rows, columns = module.weight.shape  # type: ignore[union-attr,misc]
    return (columns, rows) if isinstance(module, nn.Linear) else (rows, columns)


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, lengths: Sequence[Sequence[int]]) -> Tensor:
    rows = []
    for row, of_row in enumerate(lengths):
        ends = list(accumulate(of_row))
        parts = [
            _causal(*(x[row : row + 1, :, end - length : end] for x in (query, key, value)))
            for end, length in zip(ends, of_row, strict=True)
        ]
        rows.append(torch.cat(parts, dim=2))
    return torch.cat(rows)
