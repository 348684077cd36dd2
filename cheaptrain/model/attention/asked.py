"""What models ask of attention beyond plain causal attention, and which of it is refused.

Models hand features to their attention function by keyword, through their config, or through a mask alone. The trap is
one that nobody reads: the model would train on, as another model. So whatever is not known to be harmless is refused,
before a run where the config tells it (`unsupported_attention`), else in the first forward pass.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from cheaptrain.errors import CheaptrainError


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


def refuse_what_is_not_honoured(
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


# Keyword arguments that reach an attention function from the decoder and change nothing in it.
_HARMLESS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "use_cache", "output_hidden_states", "return_dict"}
)
_OFF_BY_DEFAULT = frozenset({"output_attentions", "output_router_logits"})
