"""A model as a transformers folder, and back.

What is saved is the plain twin: the same weights under transformers' own attention and with its cache on. So no name
of ours stands in config.json, and `AutoModelForCausalLM.from_pretrained` and `lm_eval` take the folder as they take
any other.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.twin import plain_twin


def save_model(model: PreTrainedModel, directory: Path) -> None:
    """Write `model`, whole on this process, to `directory`: safetensors weights, config.json, generation_config.json.
    Tied weights once."""
    with no_progress_bars():
        plain_twin(model).save_pretrained(directory)


def saved_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The config that is saved with `model`: as transformers' `save_pretrained` would, with nothing of ours in it."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "sdpa"
    config.use_cache = True
    config.dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    return config


def load_saved(directory: Path) -> PreTrainedModel:
    """The model saved in `directory` as anyone would load it: fp32, SDPA, no network, in evaluation mode."""
    with no_progress_bars():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True, output_loading_info=True
        )
    model, report = loaded
    wrong = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    if wrong:
        raise CheaptrainError(f"{directory}: its weights and its config do not belong together: {', '.join(wrong[:3])}")
    return model.eval()


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Keep transformers' bars for reading and writing weights off the console."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
