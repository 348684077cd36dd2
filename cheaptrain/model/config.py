"""From the recipe's `[model]` to a transformers config: preset, hub id or folder, overrides, vocabulary, special ids.

The trap it avoids: a transformers config takes any keyword and keeps it, so `hiden_size = 512` would train the default
width. Every override is checked against the fields the class really has.
"""

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
from transformers.utils import cached_file

from cheaptrain.errors import RecipeError
from cheaptrain.model.attention.asked import unsupported_attention
from cheaptrain.model.growth import Growth, plan_growth, size_of_tokenizer
from cheaptrain.model.presets import find_preset
from cheaptrain.recipe import schema

_ONLY_WHAT_IS_HERE: dict[str, Any] = {
    "local_files_only": True, "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_gated_repo": False, "_raise_exceptions_for_connection_errors": False,
}  # fmt: skip

# Set by cheaptrain itself; the value says why or where instead.
_NOT_FOR_OVERRIDES = {
    "use_cache": "it is off in training and on in what is saved",
    "eos_token_id": "it is the end-of-text of the tokenizer: set tokenizer.end_of_text",
    "bos_token_id": "it is the tokenizer's own",
    "pad_token_id": "rows have no padding",
    "dtype": "weights are fp32; train.precision says how to compute",
    "torch_dtype": "weights are fp32; train.precision says how to compute",
    "rope_scaling": "transformers calls it rope_parameters now",
}


def model_config(
    spec: schema.Model, *, vocab_size: int, seq_len: int, eot_id: int | None = None, bos_id: int | None = None
) -> PreTrainedConfig:
    """The config of the model `spec` describes, for a tokenizer of `vocab_size` tokens and rows of `seq_len`.

    With fresh weights the vocabulary is `vocab_size` padded to `spec.vocab_multiple` (or `overrides.vocab_size`); with
    `init_from` it is the checkpoint's, grown when the tokenizer has more. The tokenizer's own size is kept in the
    config as `unpadded_vocab_size`. Raises RecipeError for whatever does not exist or does not fit.
    """
    if spec.preset is not None:
        preset = find_preset(spec.preset)
        model_type, fields = preset.model_type, dict(preset.fields)
    else:
        model_type, fields = _read_config(spec)
    for name, given in (("end-of-text", eot_id), ("beginning-of-text", bos_id)):
        if given is not None and not 0 <= given < vocab_size:
            raise RecipeError(f"tokenizer: its {name} id {given} lies outside its {vocab_size:,} tokens")
    if spec.init_from is None:
        fields["vocab_size"] = -(-vocab_size // spec.vocab_multiple) * spec.vocab_multiple
    elif growth := _growth(spec, fields, vocab_size):
        fields["vocab_size"] = growth.rows_after
    fields |= {"unpadded_vocab_size": vocab_size, "use_cache": True, "eos_token_id": eot_id, "bos_token_id": bos_id}
    # transformers gives the embedding of a padding id no gradient. There is no padding here, and where a checkpoint
    # pads with its end-of-text, that token would silently never learn.
    fields["pad_token_id"] = None
    config = _construct(model_type, fields, spec.overrides)
    _check_fit(spec, config, seq_len)
    return config


def vocabulary_growth(spec: schema.Model, vocab_size: int) -> Growth | None:
    """What the checkpoint of `spec` needs for a tokenizer of `vocab_size` tokens; None: nothing, or fresh weights."""
    return None if spec.init_from is None else _growth(spec, _read_config(spec)[1], vocab_size)


def checkpoint_config(spec: schema.Model) -> PreTrainedConfig:
    """The config of `spec.init_from` as it lies there, nothing overridden."""
    model_type, fields = _read_config(spec)
    return _construct(model_type, fields, {})


def locate(spec: schema.Model) -> str:
    """`spec.config` or `spec.init_from` as a folder that exists or a hub id. Raises RecipeError if it is neither."""
    key, given = ("config", spec.config) if spec.config is not None else ("init_from", spec.init_from)
    assert given is not None
    folder = Path(given).expanduser()
    if folder.is_dir():
        if spec.revision is not None:
            raise RecipeError(
                f"model.revision: {given} is a folder, only hub ids have revisions; remove model.revision"
            )
        if not (folder / "config.json").is_file():
            final = folder / "final"
            hint = f"; did you mean {final}?" if (final / "config.json").is_file() else ": it is no transformers model"
            raise RecipeError(f"model.{key}: {given} holds no config.json{hint}")
        return str(folder)
    if folder.exists():
        raise RecipeError(f"model.{key}: {given} is a file; give the folder it lies in")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", given) or given.startswith((".", "~")):
        raise RecipeError(f"model.{key}: there is no folder {given}")
    return given


def _growth(spec: schema.Model, fields: dict[str, Any], vocab_size: int) -> Growth | None:
    if "unpadded_vocab_size" in fields:
        return plan_growth(fields, None, vocab_size, spec.vocab_multiple)
    file = cached_file(locate(spec), "tokenizer.json", revision=spec.revision, **_ONLY_WHAT_IS_HERE)
    size = size_of_tokenizer(file) if file else None
    return plan_growth(fields, size, vocab_size, spec.vocab_multiple)


def _read_config(spec: schema.Model) -> tuple[str, dict[str, Any]]:
    """Model type and fields of a config.json, as they are written there."""
    key = "config" if spec.config is not None else "init_from"
    where = locate(spec)
    try:
        fields, _ = PreTrainedConfig.get_config_dict(where, revision=spec.revision)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(f"model.{key}: no folder {where} is here, and the hub did not give it: {reason}") from error
    model_type = fields.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise RecipeError(
            f"model.{key}: {where} is of type {model_type!r}, which this transformers does not know; cheaptrain runs "
            "no code from checkpoints, only transformers' own classes"
        )
    if CONFIG_MAPPING[model_type] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RecipeError(
            f"model.{key}: {where} is a {model_type} model, which transformers has no causal language model of"
        )
    if CONFIG_MAPPING[model_type].sub_configs:
        raise RecipeError(
            f"model.{key}: {where} ({model_type}) is more than a language model; take its text model alone"
        )
    if "quantization_config" in fields:
        raise RecipeError(f"model.{key}: the weights of {where} are quantised; take the full-precision checkpoint")
    # Where it was written and by which version says nothing about the model.
    for name in ("architectures", "transformers_version", "dtype", "torch_dtype", "_name_or_path", "auto_map"):
        fields.pop(name, None)
    return model_type, fields


def _construct(model_type: str, fields: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    config_class = CONFIG_MAPPING[model_type]
    merged = _override(config_class, fields, overrides)
    try:
        config = config_class(**merged)
    except Exception as error:  # transformers validates with errors of several kinds of its own
        reason = " ".join(str(error).split())
        what = "model.overrides" if overrides else f"model ({config_class.__name__})"
        raise RecipeError(f"{what}: {config_class.__name__} refuses it: {reason}") from error
    if "rope_theta" in overrides and config.rope_parameters.get("rope_theta") != overrides["rope_theta"]:
        raise RecipeError(
            "model.overrides.rope_theta: this model has a theta for each kind of layer; set overrides.rope_parameters"
        )
    return config


def _override(
    config_class: type[PreTrainedConfig], fields: dict[str, Any], overrides: dict[str, Any]
) -> dict[str, Any]:
    """`fields` with `overrides` over them, under the names the class uses. Raises RecipeError for unknown ones."""
    own = {field.name for field in dataclasses.fields(config_class)}
    own -= {field.name for field in dataclasses.fields(PreTrainedConfig)} | set(_NOT_FOR_OVERRIDES)
    known = own | set(config_class.attribute_map)
    if "rope_parameters" in own:
        known.add("rope_theta")
    _refuse_unknown(config_class, known, overrides)

    names = config_class.attribute_map
    merged = {names.get(name, name): value for name, value in fields.items()}
    renamed = {names.get(name, name): value for name, value in overrides.items()}
    merged |= _resize_layer_lists(merged, renamed, names.get("num_hidden_layers", "num_hidden_layers"))
    if "rope_theta" in renamed or "rope_parameters" in renamed:
        # Older config.json files spread over rope_theta and rope_scaling what is rope_parameters now.
        rope = {**(merged.pop("rope_scaling", None) or {}), **(merged.get("rope_parameters") or {})}
        rope |= renamed.pop("rope_parameters", None) or {}
        if "rope_theta" in renamed:
            rope["rope_theta"] = renamed.pop("rope_theta")
        merged["rope_parameters"] = rope
    return merged | renamed


def _refuse_unknown(config_class: type[PreTrainedConfig], known: set[str], overrides: dict[str, Any]) -> None:
    problems = []
    for name in overrides:
        if name in _NOT_FOR_OVERRIDES:
            problems.append(f"model.overrides.{name}: cannot be set, {_NOT_FOR_OVERRIDES[name]}")
        elif name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"its fields are {', '.join(sorted(known))}"
            problems.append(f"model.overrides.{name}: {config_class.__name__} has no such field; {hint}")
    if problems:
        raise RecipeError("\n".join(problems))


def _resize_layer_lists(fields: dict[str, Any], overrides: dict[str, Any], layers_name: str) -> dict[str, Any]:
    """Lists with one entry a layer (`layer_types`), for another number of layers: repeated where all entries agree."""
    before, after = fields.get(layers_name), overrides.get(layers_name)
    if not isinstance(before, int) or not isinstance(after, int) or before == after:
        return {}
    resized = {}
    for name, value in fields.items():
        if isinstance(value, list) and len(value) == before and name not in overrides:
            if any(entry != value[0] for entry in value):
                raise RecipeError(
                    f"model.overrides.{layers_name}: {name} differs from layer to layer; set model.overrides.{name} too"
                )
            resized[name] = value[:1] * after
    return resized


def _check_fit(spec: schema.Model, config: PreTrainedConfig, seq_len: int) -> None:
    """Everything about the config that this recipe could trip over later. Raises RecipeError with all of it."""
    problems = []
    vocabulary, needed = config.vocab_size, config.unpadded_vocab_size
    if vocabulary < needed:
        problems.append(
            f"model: model.overrides.vocab_size gives a vocabulary of {vocabulary:,}, the tokenizer {needed:,}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        problems.append(
            f"data.seq_len: {seq_len:,} tokens a row, but the model has {positions:,} positions: shorten data.seq_len, "
            f"or set model.overrides.max_position_embeddings = {seq_len}"
        )
    heads, kv_heads = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if heads and kv_heads and heads % kv_heads:
        problems.append(f"model: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    problems += [f"model: {problem}" for problem in unsupported_attention(config, seq_len)]
    if problems:
        raise RecipeError("\n".join(problems))
