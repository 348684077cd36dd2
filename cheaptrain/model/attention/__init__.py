"""One attention function for every model class, which keeps the documents of a packed row apart.

transformers lets a model call a registered function instead of its own attention; ours is called "cheaptrain". Which
tokens may see which is decided once per micro-batch by `attention_inputs`, outside the model, and travels through the
decoder as keyword arguments. On a GPU rows of several documents run as one variable-length batch without any seq × seq
mask; on a CPU SDPA gets a block-diagonal mask, or, in rows so long that the mask would cost more than the tokens, one
document after the other; rows that are one document each are plain causal attention everywhere. Which of the GPU's
kernels (`kernels.py`) does it is the run's choice (`AttentionChoice`).
Where several processes share a row, they exchange tokens for heads before and after (see context.py), so the rest here
always deals with whole rows.

The trap it avoids: transformers' own packing is switched off silently by a cache object or by a mask of ones, and the
documents then see each other. This function never guesses: without its inputs, or handed a feature it does not honour,
it raises. It is no good for generating, which needs a cache: `proof.plain_twin` is.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.attention import kernels
from cheaptrain.model.attention.asked import refuse_what_is_not_honoured
from cheaptrain.model.attention.packing import Packing, Padded, packing_of, segments_of
from cheaptrain.model.context import Context, heads_for_tokens, tokens_for_heads

NAME = "cheaptrain"

CAUSAL, DENSE, VARLEN, SINGLY = "causal", "dense", "varlen", "singly"
# Tokens of a row. At 2,048 a mask takes ten times as long as none, at 32,768 a gigabyte, and four more as floats.
LONGEST_MASK = 512


@dataclass(frozen=True)
class AttentionChoice:
    """Which kernel runs on a GPU in half precision, for rows that are one document each and for packed ones; names of
    `kernels.py`. What `choice.py` measures replaces these."""

    causal: str = kernels.CUDNN
    packed: str = kernels.VARLEN


DEFAULT = AttentionChoice()


def attention_inputs(
    document_ids: Tensor,
    document_mask: bool,
    device: torch.device | str | None = None,
    context: Context | None = None,
    *,
    choice: AttentionChoice = DEFAULT,
    padded: Padded | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the decoder's forward pass that say who may see whom in this micro-batch.

    `document_ids` is `[rows, seq]`: a new document starts wherever the id changes. With `document_mask` off every row
    is one document. `device` is the model's, by default that of `document_ids`; ids that lie on the CPU save a GPU
    synchronisation, because the choice of the kernel depends on their values. `padded`: see `packing_of`.

    With `context` the decoder gets this process's stretch of the tokens and of their positions, and `document_ids` are
    still those of the whole rows, the same on all processes that share them (`RowBatch.share` makes both).
    """
    target = document_ids.device if device is None else torch.device(device)
    if target.type != "cuda" and document_mask and document_ids.shape[1] <= LONGEST_MASK:
        changes = document_ids[:, 1:] != document_ids[:, :-1]  # [rows, seq - 1]
        if bool(changes.any()):
            segments = F.pad(changes.cumsum(1, dtype=torch.int32), (1, 0)).to(target)
            alone = inputs_of(Packing(*document_ids.shape), target, context, choice)
            return alone | {"packing": DENSE, "packing_mask": _document_causal_mask(segments)}
    return inputs_of(packing_of(document_ids, document_mask, padded), target, context, choice)


def inputs_of(
    packing: Packing,
    device: torch.device | str,
    context: Context | None = None,
    choice: AttentionChoice = DEFAULT,
) -> dict[str, Any]:
    """What `attention_inputs` gives, from a packing made earlier: only moves it to the model's `device`, and does not
    wait for that."""
    target = torch.device(device)
    on_gpu = target.type == "cuda"
    inputs: dict[str, Any] = {
        "use_cache": False,
        "packing": CAUSAL,
        "packing_kernel": choice.causal if on_gpu else None,
        "packing_mask": None,
        "packing_boundaries": None,
        "packing_context": context,
        "packing_seq": None if context is None else packing.seq,
    }
    if packing.boundaries is None:
        return inputs
    if on_gpu:
        boundaries = packing.pinned().boundaries
        assert boundaries is not None
        there = boundaries.to(target, non_blocking=True)
        return inputs | {"packing": VARLEN, "packing_kernel": choice.packed, "packing_boundaries": there}
    return inputs | {"packing": SINGLY, "packing_boundaries": packing.boundaries}


def cheaptrain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: str | None = None,
    packing_kernel: str | None = None,
    packing_mask: Tensor | None = None,
    packing_boundaries: Tensor | None = None,
    packing_context: Context | None = None,
    packing_seq: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of `query` `[rows, heads, seq, head_dim]` over `key`, `value` `[rows, kv_heads, seq, head_dim]`.

    Returns `[rows, seq, heads, head_dim]` and None (no weights), as transformers wants it. Under a context `seq` is
    this process's stretch of the row, here and there. Raises CheaptrainError when the inputs of `attention_inputs` are
    missing or the module asks for something this function would not honour.
    """
    processes = 1 if packing_context is None else packing_context.size
    seq = query.shape[2] * processes
    if packing_seq is not None and packing_seq != seq:
        raise CheaptrainError(
            f"{type(module).__name__} was given {query.shape[2]} tokens of each row by each of {processes} processes, "
            f"and rows have {packing_seq}: every process takes its own stretch of them"
        )
    refuse_what_is_not_honoured(module, seq, key.shape[2] * processes, attention_mask, packing, others)
    if torch.is_autocast_enabled(query.device.type):
        # Norms of queries and keys answer in fp32. SDPA is on autocast's list and would cast them, varlen_attn is not.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    if packing_context is not None:
        query, key, value = heads_for_tokens((query, key, value), packing_context)
    if packing == CAUSAL and query.is_cuda:
        # fp32 is for checking, not for speed: SDPA takes what can do it.
        kernel = packing_kernel if packing_kernel and query.dtype in _HALF else kernels.CUDNN
        output = kernels.causal(kernel, query, key, value, dropout, scaling)
    elif packing == VARLEN and query.dtype in _HALF:
        assert packing_boundaries is not None
        kernel = packing_kernel or kernels.VARLEN
        output = kernels.packed(kernel, query, key, value, packing_boundaries, dropout, scaling)
    else:
        if packing == VARLEN:  # in fp32, which the kernels for packed documents do not know
            assert packing_boundaries is not None
            if seq <= LONGEST_MASK:
                packing_mask = _document_causal_mask(segments_of(packing_boundaries, query.shape[0], seq))
        output = _plainly(query, key, value, dropout, scaling, packing_mask, packing_boundaries)
    if packing_context is not None:
        output = tokens_for_heads(output, packing_context)
    return output, None


# Registered with AttentionInterface alone. Left unknown to the mask interface, transformers builds no mask at all and
# does not look into position_ids for packed rows either, which would stop the GPU once per forward pass.
AttentionInterface.register(NAME, cheaptrain_attention)


_HALF = (torch.bfloat16, torch.float16)


def _plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    mask: Tensor | None,
    boundaries: Tensor | None,
) -> Tensor:
    """With a mask if there is one, else document by document if there are boundaries, else causal; anywhere, in any
    precision: `[rows, heads, seq, dim]` → `[rows, seq, heads, dim]`."""
    if boundaries is not None and mask is None:
        return _one_by_one(query, key, value, boundaries, dropout, scaling)
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2)


@torch.compiler.disable  # the lengths of documents are numbers here, and other ones in every batch
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, dropout: float, scaling: float | None
) -> Tensor:
    """One document after the other: `[rows, heads, seq, dim]` → `[rows, seq, heads, dim]`. Memory grows with the
    tokens, time with the squares of the documents' lengths."""
    seq, grouped = query.shape[2], query.shape[1] != key.shape[1]
    rows: list[list[Tensor]] = [[] for _ in query]
    for start, stop in pairwise(boundaries.tolist()):
        if start == stop:
            continue
        row, first = divmod(start, seq)
        document = slice(first, first + stop - start)
        q, k, v = (x[row : row + 1, :, document] for x in (query, key, value))
        rows[row].append(
            F.scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat([torch.cat(parts, dim=2) for parts in rows]).transpose(1, 2)


def _document_causal_mask(segments: Tensor) -> Tensor:
    """`[rows, 1, seq, seq]`, True where a token may look: the same document, and not later."""
    return (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
