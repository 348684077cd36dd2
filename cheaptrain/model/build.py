"""From the recipe's `[model]` to a model ready to train: fp32 weights, our attention, its vocabulary and special ids.

Fresh weights are drawn on the CPU from the seed alone, so every process of a run has the same ones, on any device and
whatever random numbers were drawn before. The initialisation is the class's own (GPT-2's scaled residual one, say).
"""

import copy
import warnings
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model import attention
from cheaptrain.model.config import checkpoint_config, locate, model_config, vocabulary_growth
from cheaptrain.model.growth import grow
from cheaptrain.model.rotary import use_real_rotary
from cheaptrain.model.saving import no_progress_bars
from cheaptrain.recipe import schema


def build_model(
    spec: schema.Model,
    *,
    vocab_size: int,
    seq_len: int,
    seed: int,
    eot_id: int,
    bos_id: int | None = None,
    end_of_turn_id: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """The model of `spec`, in training mode on `device`, with fp32 weights (what is only read may have others).

    `vocab_size` is the tokenizer's own size (`len(hf)`); the model's is `config.vocab_size`, and the tokenizer's is
    kept as `config.unpadded_vocab_size`. Tokens that a checkpoint does not know yet get rows (`growth.py`). What is
    saved stops generating at `eot_id` and at `end_of_turn_id`. Raises RecipeError for what cannot be, PreflightError
    for weights that cannot be read.
    """
    config = model_config(spec, vocab_size=vocab_size, seq_len=seq_len, eot_id=eot_id, bos_id=bos_id)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = _fresh(config, dtype) if spec.init_from is None else _loaded(spec, config, dtype)
    _forget_padding(model)
    use_real_rotary(model)
    model.generation_config = _generation_config(model, spec, eot_id, bos_id, end_of_turn_id)
    return model.to(device).train()  # type: ignore[arg-type]


def meta_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of `config` without weights: shapes and names only. Raises RecipeError if the class cannot be built."""
    with torch.device("meta"):
        return _fresh(config, dtype)


def _fresh(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention.NAME)
    except (ValueError, TypeError, RuntimeError, AssertionError) as error:
        raise RecipeError(f"model: transformers cannot build it from this {type(config).__name__}: {error}") from error
    except KeyError as error:  # classes that look their attention up in a table of their own
        raise RecipeError(
            f"model: the classes of {config.model_type!r} take no registered attention function"
        ) from error


def _loaded(spec: schema.Model, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    growth = vocabulary_growth(spec, config.unpadded_vocab_size)
    if growth is not None:
        if "vocab_size" in spec.overrides:
            raise RecipeError(
                "model.overrides.vocab_size: the vocabulary of a checkpoint follows the tokenizer and "
                "model.vocab_multiple; drop the override"
            )
        config = copy.deepcopy(config)
        config.vocab_size = growth.rows_before
    if spec.overrides:
        refuse_other_shapes(spec, checkpoint_config(spec), config)
    where = locate(spec)
    try:
        with no_progress_bars():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                where,
                config=config,
                revision=spec.revision,
                dtype=dtype,
                attn_implementation=attention.NAME,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise PreflightError(f"model.init_from: the weights of {where} cannot be read: {reason}") from error
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise PreflightError(
            f"model.init_from: {where} is not complete: {len(missing)} weights are missing, {_some(missing)}; "
            "take another checkpoint"
        )
    if unexpected := sorted(report["unexpected_keys"]):
        warnings.warn(
            f"model.init_from: {where} holds {len(unexpected)} weights that {type(model).__name__} has no place for: "
            f"{_some(unexpected)}",
            stacklevel=2,
        )
    if growth is not None:
        grow(model, growth)
    return model


def refuse_other_shapes(spec: schema.Model, before: PreTrainedConfig, config: PreTrainedConfig) -> None:
    """Overrides may change how the weights of a checkpoint, whose config is `before`, are used, never what they are.
    Raises RecipeError."""
    there = {name: tuple(p.shape) for name, p in meta_model(before).named_parameters()}
    wanted = {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}
    differing = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
    if differing:
        raise RecipeError(
            f"model.overrides: with {', '.join(spec.overrides)} the weights of {spec.init_from} no longer fit: "
            f"{_some(differing)} would change shape; drop the override, or start fresh with model.config"
        )


def _forget_padding(model: PreTrainedModel) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            module.padding_idx = None


def _generation_config(
    model: PreTrainedModel, spec: schema.Model, eot_id: int, bos_id: int | None, end_of_turn_id: int | None
) -> GenerationConfig:
    """How the saved model generates: it stops at end-of-text, at end of turn, and at what else a checkpoint stopped at.

    Sampling settings of a checkpoint (temperature, top_p) are left behind: they were made for another model.
    """
    ends = [eot_id] if end_of_turn_id in (None, eot_id) else [eot_id, end_of_turn_id]
    found = model.generation_config
    if spec.init_from is not None and found is not None:
        known = found.eos_token_id if isinstance(found.eos_token_id, list) else [found.eos_token_id]
        ends += [end for end in known if end is not None and end not in ends and end < model.config.vocab_size]
    return GenerationConfig(eos_token_id=ends if len(ends) > 1 else eot_id, bos_token_id=bos_id, pad_token_id=eot_id)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
