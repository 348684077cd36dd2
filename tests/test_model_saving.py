"""What is saved is the model, loads anywhere, and says nothing of ours."""

import json
import random
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._device
from model_helpers import LAYOUTS, TINY, build, packed_logits, separate_logits, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.utils import logging as transformers_logging

from cheaptrain.checkpoint.load import saved_tensors
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model import streamed
from cheaptrain.model.proof import plain_twin
from cheaptrain.model.saving import load_saved, save_model
from cheaptrain.model.streamed import saved_form, streamed_logits
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


UNTIED = Model(preset="tiny-llama", overrides={"tie_word_embeddings": False})


@pytest.mark.parametrize("preset", [*TINY, UNTIED], ids=str)
def test_a_folder_run_layer_by_layer_gives_the_live_logits_bit_for_bit(preset: str | Model, tmp_path: Path) -> None:
    model, ids = build(preset), tokens()
    form = saved_form(model)
    for name, content in form.files.items():
        (tmp_path / name).write_bytes(content)
    save_file({name: tensor.detach() for name, tensor in saved_tensors(model).items()}, tmp_path / "model.safetensors")
    with torch.no_grad():
        live = plain_twin(model)(ids, use_cache=False).logits
    for _ in range(2):  # the second time nothing is left of the first
        assert torch.equal(streamed_logits(form, tmp_path, ids), live)
        assert all(parameter.is_meta for parameter in form.empty.parameters())
    again = load_saved(tmp_path)
    assert torch.equal(again(ids, use_cache=False).logits, live)
    assert {n: tuple(p.shape) for n, p in again.named_parameters()} == {
        n: tuple(p.shape) for n, p in model.named_parameters()
    }


@pytest.mark.parametrize("preset", TINY)
def test_the_small_files_are_those_that_transformers_writes(preset: str, tmp_path: Path) -> None:
    model = build(preset)
    form = saved_form(model, lambda folder: (folder / "sub").mkdir() or (folder / "sub" / "x.txt").write_text("more"))
    save_model(model, tmp_path)
    assert form.files.pop("sub/x.txt") == b"more"
    assert form.files.keys() == {"config.json", "generation_config.json"}
    for name, content in form.files.items():
        assert json.loads(content) == json.loads((tmp_path / name).read_text())


def test_no_more_than_one_layer_is_in_memory_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(Model(preset="tiny-qwen3", overrides={"num_hidden_layers": 8, "layer_types": ["full_attention"] * 8}))
    form = saved_form(model)
    save_model(model, tmp_path)
    most, plain = [0], streamed._Part.fill

    def counted(self: Any, *where: Any) -> None:
        plain(self, *where)
        most[0] = max(most[0], sum(p.numel() for p in form.empty.parameters() if not p.is_meta))

    monkeypatch.setattr(streamed._Part, "fill", counted)
    streamed_logits(form, tmp_path, tokens())
    layers = sum(p.numel() for p in model.model.layers.parameters())
    outside = sum(p.numel() for p in model.parameters()) - layers
    assert outside < most[0] <= outside + layers // 8


def test_a_proof_beside_training_touches_nothing_that_training_uses(tmp_path: Path) -> None:
    """Building a model in a thread changes the default device, the way parameters are registered, random states."""
    model, ids = build(), tokens()
    form = saved_form(model)
    save_model(model, tmp_path)

    def watched() -> list[Any]:
        return [
            torch.get_default_dtype(),
            torch.utils._device.CURRENT_DEVICE,
            torch.get_default_device(),
            nn.Module.register_parameter,
            nn.Module.__setattr__,
            torch.is_grad_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.get_num_threads(),
            torch.get_rng_state().sum().item(),
            random.getstate(),
            np.random.get_state()[2],
        ]

    seen, before, running = [], watched(), threading.Event()

    def prove() -> None:
        running.set()
        for _ in range(10):
            streamed_logits(form, tmp_path, ids)

    thread = threading.Thread(target=prove)
    thread.start()
    running.wait()
    while thread.is_alive():
        seen.append(watched())
    thread.join()
    assert len(seen) > 10
    assert all(now == before for now in seen)


def test_making_the_form_draws_no_random_number() -> None:
    model = build()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[2])
    saved_form(model)
    assert torch.get_rng_state().equal(before[0]) and (random.getstate(), np.random.get_state()[2]) == before[1:]


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "index"])
def test_weights_under_other_names_or_shapes_are_no_proof(damage: str, tmp_path: Path) -> None:
    model = build()
    form = saved_form(model)
    save_model(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = weights["model.norm.weight"]
    if damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "extra":
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    elif damage == "shape":
        weights["model.norm.weight"] = norm[:-1].clone()
    else:
        table = {name: "model.safetensors" for name in weights if name != "model.norm.weight"}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(CheaptrainError, match=r"do not belong together: (model.norm.weight|lm_head.weight|the index)"):
        streamed_logits(form, tmp_path, tokens())


@pytest.mark.parametrize("part", ["config", "generation_config"])
def test_a_saved_model_that_would_not_stop_where_the_live_one_does_is_refused(part: str) -> None:
    model = build()
    getattr(model, part).eos_token_id = 7
    saved_form(model)  # what is live is what counts

    class Other(type(model.config)):  # type: ignore[misc]
        def save_pretrained(self, folder: Path, **_: Any) -> None:
            super().save_pretrained(folder)
            file = Path(folder) / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 3}))

    if part == "config":
        model.config.__class__ = Other
    else:
        model.generation_config.save_pretrained = lambda folder: (Path(folder) / "generation_config.json").write_text(
            json.dumps({"eos_token_id": 3})
        )
    with pytest.raises(PreflightError, match=f"eos_token_id of the saved {part}"):
        saved_form(model)


def test_a_config_that_builds_another_model_is_refused() -> None:
    model = build()
    model.config.num_hidden_layers = 3
    model.config.layer_types = ["full_attention"] * 3
    with pytest.raises(PreflightError, match="another model"):
        saved_form(model)
