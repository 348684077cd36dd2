"""One attention function for every model class, which keeps the documents of a packed row apart.

transformers lets a model call a registered function instead of its own attention; ours is called "cheaptrain". Which
tokens may see which is decided once per micro-batch by `attention_inputs`, outside the model, and travels through the
decoder as keyword arguments. On a GPU rows of several documents run as one variable-length batch without any seq × seq
mask; on a CPU SDPA gets a block-diagonal mask, or, in rows so long that the mask would cost more than the tokens, one
document after the other; rows that are one document each are plain causal attention everywhere.
Where several processes share a row, they exchange tokens for heads before and after (see context.py), so the rest here
always deals with whole rows.

The trap it avoids: transformers' own packing is switched off silently by a cache object or by a mask of ones, and the
documents then see each other. This function never guesses: without its inputs, or handed a feature it does not honour,
it raises. It is no good for generating, which needs a cache: `proof.plain_twin` is.
"""

import inspect
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.context import Context, heads_for_tokens, tokens_for_heads

NAME = "cheaptrain"

CAUSAL, DENSE, VARLEN, SINGLY = "causal", "dense", "varlen", "singly"
# Tokens of a row. At 2,048 a mask takes ten times as long as none, at 32,768 a gigabyte, and four more as floats.
LONGEST_MASK = 512


def attention_inputs(
    document_ids: Tensor,
    document_mask: bool,
    device: torch.device | str | None = None,
    context: Context | None = None,
) -> dict[str, Any]:
    """Keyword arguments for the decoder's forward pass that say who may see whom in this micro-batch.

    `document_ids` is `[rows, seq]`: a new document starts wherever the id changes. With `document_mask` off every row
    is one document. `device` is the model's, by default that of `document_ids`; ids that lie on the CPU save a GPU
    synchronisation, because the choice of the kernel depends on their values.

    With `context` the decoder gets this process's stretch of the tokens and of their positions, and `document_ids` are
    still those of the whole rows, the same on all processes that share them (`RowBatch.share` makes both).
    """
    target = document_ids.device if device is None else torch.device(device)
    inputs: dict[str, Any] = {
        "use_cache": False,
        "packing": CAUSAL,
        "packing_mask": None,
        "packing_segments": None,
        "packing_boundaries": None,
        "packing_context": context,
        "packing_seq": None if context is None else document_ids.shape[1],
    }
    changes = document_ids[:, 1:] != document_ids[:, :-1]  # [rows, seq - 1]
    if not document_mask or not bool(changes.any()):
        return inputs
    segments = F.pad(changes.cumsum(1, dtype=torch.int32), (1, 0))  # [rows, seq]
    if target.type == "cuda":
        boundaries = _boundaries(changes).to(target, non_blocking=True)
        segments = segments.to(target, non_blocking=True)
        return inputs | {"packing": VARLEN, "packing_boundaries": boundaries, "packing_segments": segments}
    if segments.shape[1] > LONGEST_MASK:
        return inputs | {"packing": SINGLY, "packing_boundaries": _boundaries(changes)}
    return inputs | {"packing": DENSE, "packing_mask": _document_causal_mask(segments.to(target))}


def cheaptrain_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: str | None = None,
    packing_mask: Tensor | None = None,
    packing_segments: Tensor | None = None,
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
    _refuse_what_is_not_honoured(module, seq, key.shape[2] * processes, attention_mask, packing, others)
    if torch.is_autocast_enabled(query.device.type):
        # Norms of queries and keys answer in fp32. SDPA is on autocast's list and would cast them, varlen_attn is not.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(compute), key.to(compute), value.to(compute)
    if packing_context is not None:
        query, key, value = heads_for_tokens((query, key, value), packing_context)
    output = _attend(query, key, value, dropout, scaling, packing, packing_mask, packing_segments, packing_boundaries)
    if packing_context is not None:
        output = tokens_for_heads(output, packing_context)
    return output, None


# Registered with AttentionInterface alone. Left unknown to the mask interface, transformers builds no mask at all and
# does not look into position_ids for packed rows either, which would stop the GPU once per forward pass.
AttentionInterface.register(NAME, cheaptrain_attention)


def unsupported_attention(config: PreTrainedConfig, seq_len: int) -> list[str]:
    """What the model's config asks of attention that rows of `seq_len` tokens would not get; empty if nothing."""
    problems = []
    types = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if window is not None and window < seq_len and (not types or "sliding_attention" in types):
        problems.append(f"sliding_window = {window} is shorter than data.seq_len = {seq_len}")
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < seq_len and "chunked_attention" in types:
        problems.append(f"attention_chunk_size = {chunk} is shorter than data.seq_len = {seq_len}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        problems.append(
            f"attn_logit_softcapping = {config.attn_logit_softcapping}: attention scores are not capped here"
        )
    return problems


# Keyword arguments that reach an attention function from the decoder and change nothing in it.
_HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states", "return_dict"}
)
_OFF_BY_DEFAULT = frozenset({"output_attentions", "output_router_logits"})
_GPU_KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH
]  # fmt: skip
_VARLEN_KNOWS_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.13 does, 2.11 does not


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout: float,
    scaling: float | None,
    packing: str | None,
    mask: Tensor | None,
    segments: Tensor | None,
    boundaries: Tensor | None,
) -> Tensor:
    """The right kernel for whole rows: `[rows, heads, seq, dim]` → `[rows, seq, heads, dim]`."""
    if packing == VARLEN:
        if query.dtype in (torch.bfloat16, torch.float16):
            if dropout > 0:
                raise CheaptrainError(
                    f"attention dropout is {dropout}, which the GPU kernel for packed documents does not do: set the "
                    "model's attention dropout to 0 in model.overrides, or data.document_mask = false"
                )
            assert boundaries is not None
            return _variable_length(query, key, value, boundaries, scaling)
        # The variable-length kernel knows half precision only. fp32 on a GPU is for checking, not for speed.
        assert segments is not None
        if segments.shape[1] <= LONGEST_MASK:
            mask = _document_causal_mask(segments)
    if boundaries is not None and mask is None:
        return _one_by_one(query, key, value, boundaries, dropout, scaling)
    grouped = query.shape[1] != key.shape[1]
    if mask is not None:
        output = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling, enable_gqa=grouped
        )
    elif query.is_cuda:
        # cuDNN first: SDPA left to itself takes flash, which is a third slower forward and backward on Hopper GPUs.
        with sdpa_kernel(_GPU_KERNELS, set_priority=True):
            output = F.scaled_dot_product_attention(
                query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
            )
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=grouped
        )
    return output.transpose(1, 2)


def _refuse_what_is_not_honoured(
    module: nn.Module,
    seq: int,
    key_seq: int,
    attention_mask: Tensor | None,
    packing: str | None,
    others: dict[str, Any],
) -> None:
    """Raise rather than attend to something else than the module asked for. Looks at Python values and shapes only.

    `seq` and `key_seq` are the lengths of whole rows.
    """
    if packing is None:
        raise CheaptrainError(
            f"{type(module).__name__} was called without document boundaries, so documents would see each other: pass "
            "**attention_inputs(document_ids, document_mask) to the decoder; to generate, use plain_twin(model)"
        )
    if attention_mask is not None:
        raise CheaptrainError(
            f"{type(module).__name__} was given an attention_mask besides the document boundaries: rows here have no "
            "padding; leave attention_mask out, or use plain_twin(model)"
        )
    if key_seq != seq:
        raise CheaptrainError(
            f"{type(module).__name__} attends from {seq} to {key_seq} positions (a cache, or another sequence): "
            "training attention takes whole rows only; to generate, use plain_twin(model)"
        )
    if getattr(module, "is_causal", True) is False:
        raise CheaptrainError(
            f"{type(module).__name__} is not causal: only models that predict the next token train here"
        )
    for name, given in others.items():
        if name == "sliding_window":
            refused = given is not None and given < seq
        elif name == "is_causal":
            refused = given is False
        elif name in _OFF_BY_DEFAULT:
            refused = bool(given)
        else:
            refused = name not in _HARMLESS and given is not None
        if refused:
            what = given if isinstance(given, bool | int | float | str) else type(given).__name__
            raise CheaptrainError(
                f"{type(module).__name__} asks its attention for {name} = {what}, which rows of {seq} tokens would not "
                "get here: this model cannot be trained faithfully; override the field or take another model"
            )
    _refuse_chunks(module, seq)


def _refuse_chunks(module: nn.Module, seq: int) -> None:
    """Llama 4 asks for chunked attention through its mask alone, so it has to be read off the config.

    Not layer by layer: reading `layer_idx` here would make torch.compile build one graph for each layer.
    """
    config = getattr(module, "config", None)
    if "chunked_attention" not in (getattr(config, "layer_types", None) or ()):
        return
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk is not None and chunk < seq:
        raise CheaptrainError(
            f"{type(module).__name__} attends in chunks of {chunk}, rows have {seq} tokens: shorten data.seq_len, or "
            "raise model.overrides.attention_chunk_size"
        )


def _variable_length(query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, scaling: float | None) -> Tensor:
    """All rows end to end as one batch of documents: `[rows, heads, seq, dim]` → `[rows, seq, heads, dim]`."""
    rows, heads, seq, dim = query.shape
    grouped = heads != key.shape[1]
    if grouped and not _VARLEN_KNOWS_GQA:
        key = key.repeat_interleave(heads // key.shape[1], dim=1)
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
    extra: dict[str, Any] = {"enable_gqa": grouped} if _VARLEN_KNOWS_GQA else {}
    query, key, value = (x.transpose(1, 2).reshape(rows * seq, x.shape[1], dim) for x in (query, key, value))
    output = varlen_attn(
        query, key, value, boundaries, boundaries, seq, seq, scale=scaling, window_size=(-1, 0), **extra
    )
    assert isinstance(output, Tensor)
    return output.view(rows, seq, heads, dim)


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


def _boundaries(changes: Tensor) -> Tensor:
    """Where documents start in the rows laid end to end, and the end: int32, padded with the end to a power of two + 1.

    The number of documents differs from batch to batch. Padding with empty documents keeps the shape, and with it the
    compiled layer, the same.
    """
    starts = F.pad(changes, (1, 0), value=True).flatten().nonzero().flatten()  # [documents]
    total = changes.shape[0] * (changes.shape[1] + 1)
    padded = max(16, 1 << (len(starts) - 1).bit_length())
    ends = starts.new_full((padded + 1 - len(starts),), total)
    return torch.cat([starts, ends]).to(torch.int32)


def _document_causal_mask(segments: Tensor) -> Tensor:
    """`[rows, 1, seq, seq]`, True where a token may look: the same document, and not later."""
    return (segments[:, :, None] == segments[:, None, :]).tril()[:, None]
