"""What is saved is the model, loads anywhere, and says nothing of ours."""

import json
from pathlib import Path

import pytest
import torch
from model_helpers import LAYOUTS, TINY, build, packed_logits, separate_logits, tokens
from safetensors import safe_open
from transformers.utils import logging as transformers_logging

from cheaptrain.errors import CheaptrainError
from cheaptrain.model.proof import plain_twin
from cheaptrain.model.saving import load_saved, save_model
from cheaptrain.recipe.schema import Model

torch.set_num_threads(1)


@pytest.mark.parametrize("preset", TINY)
def test_saved_model_gives_the_live_logits_bit_for_bit(preset: str, tmp_path: Path, capfd) -> None:
    model, ids = build(preset), tokens()
    save_model(model, tmp_path)
    again = load_saved(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, plain_twin(model)(ids).logits)
        assert (separate_logits(again, ids) - packed_logits(model.eval(), ids, LAYOUTS)).abs().max() < 1e-6
    assert capfd.readouterr() == ("", "")

    text = (tmp_path / "config.json").read_text()
    config = json.loads(text)
    assert "cheaptrain" not in text and config["use_cache"] and config["dtype"] == "float32"
    assert config["architectures"] == [type(model).__name__]
    assert (config["vocab_size"], config["unpadded_vocab_size"], config["eos_token_id"]) == (512, 500, 3)
    with safe_open(tmp_path / "model.safetensors", "pt") as weights:
        shapes = [tuple(weights.get_slice(name).get_shape()) for name in weights.keys()]  # noqa: SIM118
        assert {weights.get_slice(name).get_dtype() for name in weights.keys()} == {"F32"}  # noqa: SIM118
    assert shapes.count((512, 64)) == 1
    assert load_saved(tmp_path).generation_config.eos_token_id == 3


def test_untied_weights_are_both_saved(tmp_path: Path) -> None:
    model, ids = build(Model(preset="tiny-llama", overrides={"tie_word_embeddings": False})), tokens()
    save_model(model, tmp_path)
    again = load_saved(tmp_path)
    assert torch.equal(again(ids).logits, plain_twin(model)(ids).logits)
    assert again.lm_head.weight is not again.model.embed_tokens.weight


def test_saving_leaves_the_live_model_as_it_was(tmp_path: Path) -> None:
    model = build()
    before = model.config.to_dict()
    shown = transformers_logging.is_progress_bar_enabled()
    save_model(model, tmp_path)
    assert model.config.to_dict() == before and model.config._attn_implementation == "cheaptrain" and model.training
    assert transformers_logging.is_progress_bar_enabled() == shown


def test_weights_that_do_not_fit_their_config_are_not_loaded(tmp_path: Path) -> None:
    save_model(build(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheaptrainError, match="do not belong together"):
        load_saved(tmp_path)
