"""Context parallelism: several processes share each row, each holding one stretch of its tokens.

Everything in a decoder but attention looks at one token at a time, so only attention has to send anything. Before it,
the processes exchange: each gives away all heads but its share, for its tokens, and gets its share of the heads for
all tokens of the row (an all-to-all). Attention then runs on whole rows with the kernels and the document boundaries
it has anyway; after it, they exchange back. That is two messages a layer forward, and two backward.

The trap it avoids: a model part that looks beyond one token by other means (a convolution, a recurrence, a rotary
frequency taken from the longest position at hand) would see its own stretch only and train on, quietly, as another
model. `check_context` refuses what a config says of such parts; what it does not say shows in
`proof.prove_documents_isolated`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from transformers import PreTrainedConfig

from cheaptrain.errors import CheaptrainError, PreflightError


@dataclass(frozen=True)
class Context:
    """The processes that share a row: the name of their group, how many they are, and which of them this one is.

    Process r holds the r-th of `size` equal stretches of the row. A name and numbers only: torch.compile takes them
    for constants.
    """

    group: str
    size: int
    rank: int

    @classmethod
    def of(cls, group: ProcessGroup) -> "Context | None":
        """The context of the processes of `group` (the mesh's "cp" axis); None for a group of one, which has nothing
        to exchange."""
        return cls(group.group_name, group.size(), group.rank()) if group.size() > 1 else None


def check_context(config: PreTrainedConfig, *, seq_len: int, cp: int, tp: int = 1) -> None:
    """Raise PreflightError, with all reasons, when rows of `seq_len` tokens of a model of `config` cannot be shared by
    `cp` processes, of which `tp` at a time share each matrix. Looks at the config only; nothing is built."""
    problems = [] if cp == 1 else [*_heads_left_over(config, cp, tp), *_beyond_attention(config)]
    if seq_len % (cp * tp):
        axes = [f"parallel.{name} = {size}" for name, size in (("cp", cp), ("tp", tp)) if size > 1]
        nearest = max(1, seq_len // (cp * tp)) * cp * tp
        problems.append(
            f"data.seq_len = {seq_len} does not divide by {' × '.join(axes)}, and every process holds as many of a "
            f"row's tokens: set data.seq_len = {nearest} or {nearest + cp * tp}"
        )
    if problems:
        raise PreflightError("\n".join(problems))


def heads_for_tokens(tensors: Sequence[Tensor], context: Context) -> list[Tensor]:
    """All heads of this process's tokens → this process's heads of all tokens, in one message.

    Each tensor `[rows, heads, seq / size, dim]` comes back as `[rows, heads / size, seq, dim]`, not contiguous; their
    numbers of heads and their dims may differ. Process r gets heads [r × heads / size, (r + 1) × heads / size), so
    that grouped queries keep their keys. Differentiable. Collective.
    """
    size = context.size
    for tensor in tensors:
        if tensor.shape[1] % size:
            raise CheaptrainError(f"{tensor.shape[1]} heads cannot be shared by {size} processes: change parallel.cp")
    # [size, rows, seq / size, heads / size × dim]: block r goes to process r
    blocks = [t.unflatten(1, (size, -1)).permute(1, 0, 3, 2, 4).flatten(3) for t in tensors]
    received = _Exchange.apply(torch.cat(blocks, -1), context.group)
    whole = received.movedim(0, 1).flatten(1, 2)  # [rows, seq, heads / size × dim of all tensors]
    parts = whole.split([block.shape[3] for block in blocks], -1)
    return [
        part.unflatten(-1, (-1, tensor.shape[3])).transpose(1, 2) for part, tensor in zip(parts, tensors, strict=True)
    ]


def tokens_for_heads(attended: Tensor, context: Context) -> Tensor:
    """The way back: `[rows, seq, heads / size, dim]` → `[rows, seq / size, heads, dim]`. Differentiable. Collective."""
    blocks = attended.unflatten(1, (context.size, -1)).movedim(1, 0)  # [size, rows, seq / size, heads / size, dim]
    received = _Exchange.apply(blocks, context.group)
    return received.permute(1, 2, 0, 3, 4).flatten(2, 3)


class _Exchange(torch.autograd.Function):
    """Block r of the first axis goes to process r, block r of the result came from it: its own inverse, and its own
    gradient.

    An autograd function of its own, because what torch's functional collectives return outside of torch.compile is a
    tensor that is waited for later, and the gradient's way through such a one has been lost silently before.
    """

    @staticmethod
    def forward(ctx: Any, blocks: Tensor, group: str) -> Tensor:
        ctx.group = group
        return _exchange(blocks, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _exchange(gradient, ctx.group), None


def _exchange(blocks: Tensor, group: str) -> Tensor:
    sizes = [1] * blocks.shape[0]
    functional = torch.ops._c10d_functional
    result: Tensor = functional.wait_tensor(functional.all_to_all_single(blocks.contiguous(), sizes, sizes, group))
    return result


_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def _heads_left_over(config: PreTrainedConfig, cp: int, tp: int) -> Iterator[str]:
    heads = config.num_attention_heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    if heads % (cp * tp) == 0 and shared % (cp * tp) == 0:
        return
    common = gcd(heads, shared)
    fitting = [str(n) for n in range(2, common + 1) if common % (n * tp) == 0]
    kinds = f"{heads} attention heads" + (f" and {shared} key/value heads" if shared != heads else "")
    over = f", of which parallel.tp = {tp} leaves each process {heads / tp:g} and {shared / tp:g}" if tp > 1 else ""
    possible = f"set parallel.cp = {' or '.join(fitting)}, or 1" if fitting else "set parallel.cp = 1"
    yield (
        f"parallel.cp = {cp} does not divide the {kinds} of this model{over}: processes that share a row share its "
        f"heads in attention, evenly; {possible}"
    )


def _beyond_attention(config: PreTrainedConfig) -> Iterator[str]:
    """Parts of a model that look beyond their own token and would not know that the row goes on elsewhere."""
    remedy = "train it with parallel.cp = 1"
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _ATTENTION)
    if others:
        yield f"layers of type {' and '.join(others)} cannot take a part of a row: {remedy}"
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = {str(r.get("rope_type")) for r in (rope, *rope.values()) if isinstance(r, dict)} & {"dynamic", "longrope"}
    if kinds:
        longest = "the longest position in a part of a row"
        yield f"rope_type = {' and '.join(sorted(kinds))} takes its frequencies from {longest}: {remedy}"
    if getattr(config, "attn_temperature_tuning", False) and 0 in (getattr(config, "no_rope_layers", None) or ()):
        yield f"attn_temperature_tuning counts positions from the start of a part of a row: {remedy}"
