"""Which attention kernel is the fastest right one here: each candidate is proven, then timed, at the shape of the run.

Which of them wins depends on the GPU, on versions, on heads and on row lengths, and a figure from elsewhere is a guess.
So each candidate first attends over a small input with this run's own heads, forward and backward, against plain
arithmetic in fp32: two rows, in the packed case with documents of one token and with the empty ones that pad the
boundaries. Then it is timed, forward and backward, at the real shape. That takes about a second in all (flash-attn 4
compiles itself first). Nothing is left behind: memory is given back and no random number is drawn.

The trap: a kernel that is fast because it is wrong. Only what was proven is timed; what cannot do the shape, runs out
of memory or breaks the graph of a compiled layer is no candidate, and the reason is kept and printed.
"""

import statistics
import time
import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from cheaptrain.model.attention import kernels, libraries
from cheaptrain.model.attention.check import HALF_ALLOWED, forward_backward, largest_difference, written_out
from cheaptrain.model.attention.packing import packing_of

CAUSAL, PACKED = "causal", "packed"
_DTYPE = torch.bfloat16
_PROOF_SEQ = 192  # tokens of a row of the proof: more than one block of any kernel, and not a power of two
_WARM_UP, _FEWEST, _MOST = 2, 3, 10
_SDPA_HAS_NONE = ("No available kernel", "No viable backend")
_SECONDS = 0.1  # of timing one candidate, beyond the fewest runs


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer as a process runs it: its own heads, over whole rows."""

    rows: int
    seq: int
    heads: int
    kv_heads: int
    head_dim: int
    dropout: float = 0.0


@dataclass(frozen=True)
class Trial:
    """What came of the candidates of one situation: milliseconds of a layer forward and backward, by kernel; or why it
    is none."""

    milliseconds: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def fastest(self) -> str | None:
        return min(self.milliseconds, key=self.milliseconds.__getitem__, default=None)

    def __str__(self) -> str:
        """`cuDNN 2.27 ms a layer (flash 3.56, flash-attn 3 not installed)`"""
        if self.fastest is None:
            return "; ".join(f"{kernels.LABELS[name]} {reason}" for name, reason in self.refused.items())
        slower = sorted((ms, name) for name, ms in self.milliseconds.items() if name != self.fastest)
        others = [f"{kernels.LABELS[name]} {ms:.2f}" for ms, name in slower]
        others += [f"{kernels.LABELS[name]} {reason}" for name, reason in self.refused.items()]
        return f"{kernels.LABELS[self.fastest]} {self.milliseconds[self.fastest]:.2f} ms a layer" + (
            f" ({', '.join(others)})" if others else ""
        )


def attention_shape(config: PreTrainedConfig, rows: int, seq: int, processes: int = 1) -> AttentionShape | None:
    """The attention of a model of `config`, whose heads are shared by `processes`; None where its heads are not all of
    one size."""
    if getattr(config, "v_head_dim", None) or getattr(config, "global_head_dim", None):
        return None
    heads = config.num_attention_heads
    return AttentionShape(
        rows=rows,
        seq=seq,
        heads=heads // processes,
        kv_heads=max(1, (getattr(config, "num_key_value_heads", None) or heads) // processes),
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        # Llama's name for it, and GPT-2's.
        dropout=float(getattr(config, "attention_dropout", None) or getattr(config, "attn_pdrop", None) or 0.0),
    )


def try_attention(
    shape: AttentionShape,
    device: torch.device,
    document_ids: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Trial:
    """Prove and time the kernels `names`, by default all there are, in half precision. `document_ids` `[rows, seq]`:
    of packed rows, those to time them with; None: rows that are one document each."""
    if names is None:
        names = kernels.CAUSAL_KERNELS if document_ids is None else kernels.PACKED_KERNELS
    trial = Trial()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for name in names:
            reason = _cannot(name, shape) or _out_of_its_errors(partial(_why_wrong, name, shape, device, document_ids))
            if reason is None:
                timed = partial(_time, name, shape, device, document_ids, trial.milliseconds)
                reason = _out_of_its_errors(timed)
            if reason is not None:
                trial.refused[name] = reason
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return trial


def sample_documents(rows: int, seq: int, mean: int = 500) -> Tensor:
    """Packed rows `[rows, seq]` to time with where the run has none at hand: short and long documents of `mean` tokens
    on average, or a quarter of a row if that is less."""
    mean = max(1, min(mean, seq // 4))
    lengths = torch.tensor([mean // 4, 7 * mean // 4, mean // 2, 3 * mean // 2, mean]).clamp_min(1)
    starts = lengths.repeat(-(-seq // int(lengths.sum()))).cumsum(0)
    positions = torch.arange(seq).expand(rows, seq)
    return torch.searchsorted(starts, positions.contiguous(), right=True, out_int32=True)


def _cannot(name: str, shape: AttentionShape) -> str | None:
    if shape.dropout > 0 and not kernels.drops(name):
        return "has no attention dropout"
    return libraries.why_not(name) if name in libraries.NAMES else None


def _why_wrong(name: str, shape: AttentionShape, device: torch.device, document_ids: Tensor | None) -> str | None:
    """Run a kernel over a small input; what is wrong with its numbers, or None. Raises what it raises."""
    small = replace(shape, rows=2, seq=_PROOF_SEQ)
    documents = torch.zeros(small.rows, small.seq, dtype=torch.int32)
    if document_ids is not None:
        cuts = torch.tensor([[1, 2, 70, 71, 150], [small.seq - 1, small.seq - 2, 64, 128, 129]])
        positions = torch.arange(small.seq)
        documents = (positions[None, :, None] >= cuts[:, None, :]).sum(-1, dtype=torch.int32)
    query, key, value, gradient = _tensors(small, device)
    scaling = 1.5 * shape.head_dim**-0.5  # not what a kernel takes when it is not told
    attend = _attend(name, documents if document_ids is not None else None, device, scaling)
    if name in libraries.NAMES:
        attend = torch.compile(_own_code(attend), fullgraph=True, backend="aot_eager")
    got = forward_backward(attend, (query, key, value), gradient)

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return written_out(query, key, value, documents.to(device), scaling).transpose(1, 2)

    expected = forward_backward(plain, [x.float() for x in (query, key, value)], gradient.float())
    difference = largest_difference(got, expected)
    return None if difference <= HALF_ALLOWED else f"is wrong by {difference:.2g} of the largest number"


def _time(
    name: str, shape: AttentionShape, device: torch.device, document_ids: Tensor | None, into: dict[str, float]
) -> None:
    query, key, value, gradient = _tensors(shape, device)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    attend = _attend(name, document_ids, device, None)

    def run() -> None:
        torch.autograd.grad(attend(query, key, value), (query, key, value), gradient)

    into[name] = _milliseconds(run, device)


def _milliseconds(run: Callable[[], None], device: torch.device) -> float:
    """The median of some runs."""
    clock = _gpu_clock if device.type == "cuda" else _cpu_clock
    for _ in range(_WARM_UP):
        once = clock(run)
    count = min(_MOST, max(_FEWEST, int(_SECONDS / max(once / 1000, 1e-6))))
    return statistics.median(clock(run) for _ in range(count))


def _gpu_clock(run: Callable[[], None]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _cpu_clock(run: Callable[[], None]) -> float:
    began = time.perf_counter()
    run()
    return 1000 * (time.perf_counter() - began)


def _attend(
    name: str, document_ids: Tensor | None, device: torch.device, scaling: float | None
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`[rows, heads, seq, head_dim]` → `[rows, seq, heads, head_dim]` by this kernel and no other."""
    if document_ids is None:
        if name in libraries.NAMES:
            return lambda query, key, value: kernels.causal(name, query, key, value, 0.0, scaling)
        return lambda query, key, value: kernels.sdpa_alone(name, query, key, value, scaling)
    boundaries = packing_of(document_ids, True).boundaries
    assert boundaries is not None
    there = boundaries.to(device)
    return lambda query, key, value: kernels.packed(name, query, key, value, there, 0.0, scaling)


def _tensors(shape: AttentionShape, device: torch.device) -> list[Tensor]:
    """Query, key and value `[rows, heads, seq, head_dim]`, laid out in memory as projections leave them, and the
    gradient of the output `[rows, seq, heads, head_dim]`."""
    generator = torch.Generator(device).manual_seed(0)
    tensors = [
        torch.randn((shape.rows, shape.seq, heads, shape.head_dim), generator=generator, device=device, dtype=_DTYPE)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    ]
    return [*(tensor.transpose(1, 2) for tensor in tensors[:3]), tensors[3]]


def _own_code(function: Any) -> Any:
    """The same function with a code object of its own: dynamo counts compilations by it, and gives up after a few."""
    return types.FunctionType(
        function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__
    )


def _out_of_its_errors(work: Callable[[], str | None]) -> str | None:
    """What `work` returns, or its error in a few words: whatever a kernel raises only means that it is not for us."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # SDPA warns of every reason for which a kernel was left out
            return work()
    except torch.OutOfMemoryError:
        return "does not fit in memory at this shape"
    except Exception as error:
        if isinstance(error, torch._dynamo.exc.Unsupported):
            return "breaks the graph of a compiled layer"
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if lines[0].startswith(_SDPA_HAS_NONE):
            return "does not do this shape here"
        return f"does not run ({lines[0][:120]})"
