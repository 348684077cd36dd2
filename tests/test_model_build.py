"""From `[model]` to a model: exact shapes, weights from the seed alone, nothing in the recipe ignored."""

import json
import math
from pathlib import Path

import pytest
import torch
from model_helpers import TINY, build
from transformers import AutoModelForCausalLM, Gemma3Config, GPT2Config, LlamaConfig, Qwen3Config, T5Config

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.build import build_model
from cheaptrain.model.config import model_config
from cheaptrain.model.facts import model_facts
from cheaptrain.model.parts import decoder, decoder_layers, head, hidden_matrices
from cheaptrain.model.presets import PRESETS
from cheaptrain.model.saving import load_saved, save_model
from cheaptrain.recipe.schema import Model

torch.set_num_threads(1)

PUBLISHED = {
    "mobilellm-140m": (140_250_432, 128_256),
    "mobilellm-360m": (359_433_088, 128_256),
    "mobilellm-950m": (949_688_576, 128_256),
    "mobilellm-r1-140m": (140_248_512, 128_256),
    "mobilellm-r1-360m": (359_431_168, 128_256),
    "mobilellm-r1-950m": (949_685_760, 128_256),
    "gpt2-124m": (124_439_808, 50_257),
    "smollm2-135m": (134_515_008, 49_152),
}
ON_PAPER = {"7b", "70b", "671b"}  # their counts: test_plan_scale.py


@pytest.mark.parametrize("preset", PUBLISHED)
def test_preset_has_exactly_the_published_parameters(preset: str) -> None:
    parameters, vocabulary = PUBLISHED[preset]
    facts = model_facts(Model(preset=preset, vocab_multiple=1), vocabulary, 1024)
    assert facts.parameters == parameters
    assert sum(facts.by_part.values()) == parameters
    assert "head" not in facts.by_part and "other" not in facts.by_part
    assert facts.embedding_parameters >= vocabulary * 576


def test_presets_name_their_source_and_the_small_ones_are_small() -> None:
    assert set(PUBLISHED) < set(PRESETS)
    for name, preset in PRESETS.items():
        assert preset.source
        if name not in PUBLISHED and name not in ON_PAPER:
            assert model_facts(Model(preset=name), 512, 128).parameters < 1_500_000


def test_flops_are_six_n_plus_attention() -> None:
    facts = model_facts(Model(preset="mobilellm-950m"), 128_256, 2048)
    assert facts.flops_per_token == 6 * 949_688_576 + 12 * 22 * 24 * 64 * 2048
    assert facts.by_part["embedding"] == 128_256 * 1536
    assert facts.by_part["mlp"] == 22 * 3 * 1536 * 6144
    assert facts.by_part["attention"] == 22 * (2 * 1536 * 1536 + 2 * 1536 * 384)
    assert facts.by_part["norms"] == 22 * (2 * 1536 + 2 * 64) + 1536


def test_flops_leave_out_what_is_only_looked_up() -> None:
    gpt2 = model_facts(Model(preset="gpt2-124m", vocab_multiple=1), 50_257, 1024)
    assert gpt2.flops_per_token == 6 * (124_439_808 - 1024 * 768) + 12 * 12 * 768 * 1024
    untied = model_facts(Model(preset="tiny-llama", overrides={"tie_word_embeddings": False}), 512, 64)
    tied = model_facts(Model(preset="tiny-llama"), 512, 64)
    assert untied.flops_per_token == tied.flops_per_token
    assert untied.by_part["head"] == untied.by_part["embedding"] == 512 * 64
    assert untied.parameters == tied.parameters + 512 * 64


def test_flops_count_only_the_experts_a_token_meets(tmp_path: Path) -> None:
    fields = {
        "model_type": "mixtral",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    fields |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    facts = model_facts(Model(config=str(tmp_path)), 128, 64)
    unused = 2 * 3 * (3 * 32 * 48)
    assert facts.flops_per_token == 6 * (facts.parameters - unused) + 12 * 2 * 32 * 64


def test_published_architecture_is_the_released_one() -> None:
    config = model_config(Model(preset="mobilellm-r1-140m"), vocab_size=128_256, seq_len=2048)
    assert config.model_type == "llama4_text" and config.no_rope_layers == [1] * 15 and config.moe_layers == []
    assert config.layer_types == ["full_attention"] * 15 and not config.attn_temperature_tuning and config.use_qk_norm
    assert config.intermediate_size_mlp == config.intermediate_size == 2048
    assert config.rope_parameters["rope_theta"] == 1_000_000 and config.max_position_embeddings == 4096


@pytest.mark.parametrize("preset", TINY)
def test_weights_depend_on_the_seed_alone(preset: str) -> None:
    torch.manual_seed(11)
    first = build(preset, seed=5)
    torch.rand(100)
    again = build(preset, seed=5)
    other = build(preset, seed=6)
    for a, b in zip(first.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.get_input_embeddings().weight, other.get_input_embeddings().weight)


def test_building_draws_nothing_from_the_global_generator() -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    build(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_weights_are_fp32_and_initialised_as_the_class_says() -> None:
    model = build(Model(preset="tiny-gpt2", overrides={"n_embd": 128, "n_layer": 4}))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    block = model.transformer.h[0]
    assert block.attn.c_attn.weight.std().item() == pytest.approx(0.02, rel=0.03)
    assert block.attn.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert block.mlp.c_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(8), rel=0.03)
    assert model.get_input_embeddings().weight.std().item() == pytest.approx(0.02, rel=0.03)


def test_vocabulary_is_padded_and_the_real_one_recorded() -> None:
    model = build(Model(preset="tiny-llama", vocab_multiple=128), vocab_size=500)
    assert model.config.vocab_size == head(model).weight.shape[0] == 512
    assert model.config.unpadded_vocab_size == 500
    assert build(Model(preset="tiny-llama", vocab_multiple=1), vocab_size=501).config.vocab_size == 501
    assert build(Model(preset="tiny-llama", overrides={"vocab_size": 600})).config.vocab_size == 600
    with pytest.raises(RecipeError, match=r"vocab_size gives a vocabulary of 400, the tokenizer 500"):
        build(Model(preset="tiny-llama", overrides={"vocab_size": 400}))


@pytest.mark.parametrize("preset", TINY)
def test_end_of_text_gets_a_gradient_and_is_where_generation_stops(preset: str) -> None:
    model = build_model(Model(preset=preset), vocab_size=500, seq_len=32, seed=0, eot_id=7, bos_id=4)
    assert (model.config.eos_token_id, model.config.bos_token_id, model.config.pad_token_id) == (7, 4, None)
    generation = model.generation_config
    assert (generation.eos_token_id, generation.bos_token_id, generation.pad_token_id) == (7, 4, 7)
    embedding = model.get_input_embeddings()
    embedding(torch.tensor([[7]])).sum().backward()
    assert embedding.weight.grad[7].abs().sum() > 0
    assert model.config.use_cache
    with pytest.raises(RecipeError, match="end-of-text id 500 lies outside"):
        build_model(Model(preset=preset), vocab_size=500, seq_len=32, seed=0, eot_id=500)


@pytest.mark.parametrize("preset", TINY)
def test_parts_are_found(preset: str) -> None:
    model = build(preset)
    assert decoder(model) is not model and len(decoder_layers(model)) == 2
    assert head(model).weight is model.get_input_embeddings().weight
    matrices = hidden_matrices(model)
    assert len(matrices) == 2 * (4 if preset == "tiny-gpt2" else 7)
    assert all(m.dim() == 2 and m is not head(model).weight for m in matrices)


# Overrides


def test_overrides_reach_the_model() -> None:
    spec = Model(preset="tiny-qwen3", overrides={"num_hidden_layers": 3, "hidden_size": 32, "rope_theta": 5e5})
    model = build(spec)
    assert len(decoder_layers(model)) == 3 and head(model).weight.shape[1] == 32
    assert model.config.rope_parameters == {"rope_theta": 5e5, "rope_type": "default"}
    frequencies = decoder(model).rotary_emb.inv_freq
    assert frequencies[1].item() == pytest.approx(5e5 ** (-2 / 16))


def test_rope_parameters_are_laid_over_those_of_the_preset() -> None:
    rope = {"rope_type": "linear", "factor": 2.0}
    config = build(Model(preset="tiny-llama", overrides={"rope_parameters": rope})).config
    assert config.rope_parameters == {"rope_theta": 10_000.0, **rope}


def test_rope_theta_of_an_older_config_can_be_overridden(tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 4.0}
    fields = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(fields | {"rope_theta": 10_000.0, "rope_scaling": scaling}))
    config = model_config(Model(config=str(tmp_path), overrides={"rope_theta": 9.0}), vocab_size=100, seq_len=32)
    assert config.rope_parameters == {"rope_theta": 9.0, **scaling}


def test_lists_of_layers_follow_the_number_of_layers() -> None:
    config = build(Model(preset="tiny-llama4", overrides={"num_hidden_layers": 5})).config
    assert config.no_rope_layers == [1] * 5 and config.layer_types == ["full_attention"] * 5
    assert build(Model(preset="tiny-gpt2", overrides={"num_hidden_layers": 3})).config.n_layer == 3


def test_lists_of_unlike_layers_are_not_guessed(tmp_path: Path) -> None:
    config = LlamaConfig(num_hidden_layers=2, num_attention_heads=4, hidden_size=64).to_dict()
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": ["full_attention", "sliding_attention"]}))
    with pytest.raises(RecipeError, match=r"set model\.overrides\.layer_types too"):
        build(Model(config=str(tmp_path), overrides={"num_hidden_layers": 4}))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hiden_size": 32}, "overrides.hiden_size: Qwen3Config has no such field; did you mean hidden_size"),
        ({"zzz": 1}, "its fields are attention_bias, "),
        ({"hidden_size": "wide"}, "Qwen3Config refuses it"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3 key-value heads"),
        ({"use_cache": False}, "overrides.use_cache: cannot be set"),
        ({"eos_token_id": 1}, "set tokenizer.end_of_text"),
        ({"dtype": "bfloat16"}, "train.precision"),
        ({"rope_scaling": {}}, "rope_parameters"),
        ({"layer_types": ["full_attention"]}, "Qwen3Config refuses it"),
    ],
)
def test_overrides_that_cannot_be_are_refused(overrides: dict, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        build(Model(preset="tiny-qwen3", overrides=overrides))
    assert message in str(error.value)


def test_every_wrong_override_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        build(Model(preset="tiny-gpt2", overrides={"n_layers": 3, "n_heads": 2, "rope_theta": 1.0}))
    for name in ("n_layers", "n_heads", "rope_theta"):
        assert f"model.overrides.{name}: GPT2Config has no such field" in str(error.value)


def test_unknown_preset_names_the_nearest_and_all() -> None:
    with pytest.raises(
        RecipeError, match=r"no preset 'mobilellm-150m'\. Did you mean mobilellm-.*There are: .*quickstart"
    ):
        build("mobilellm-150m")


def test_rows_longer_than_the_positions_are_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"data\.seq_len: 512 .* 256 positions.*max_position_embeddings = 512"):
        build("tiny-gpt2", seq_len=512)
    assert (
        build(Model(preset="tiny-gpt2", overrides={"n_positions": 512}), seq_len=512).transformer.wpe.num_embeddings
        == 512
    )


# Starting from others


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "final"
    save_model(build("tiny-qwen3", seed=9), folder)
    return folder


def test_init_from_takes_the_weights_and_config_only_the_shape(checkpoint: Path) -> None:
    saved = load_saved(checkpoint).state_dict()
    weights = build(Model(init_from=str(checkpoint)), seed=1).state_dict()
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    fresh = build(Model(config=str(checkpoint)), seed=1)
    seeded = build("tiny-qwen3", seed=1).state_dict()
    assert all(torch.equal(value, seeded[name]) for name, value in fresh.state_dict().items())


def test_init_from_keeps_its_larger_vocabulary_and_grows_a_smaller_one(checkpoint: Path) -> None:
    model = build(Model(init_from=str(checkpoint)), vocab_size=300)
    assert (model.config.vocab_size, model.config.unpadded_vocab_size) == (512, 300)
    assert build(Model(init_from=str(checkpoint)), vocab_size=513).config.vocab_size == 576


def test_init_from_overrides_may_change_use_but_not_shapes(checkpoint: Path) -> None:
    spec = Model(init_from=str(checkpoint), overrides={"rope_theta": 8e6, "max_position_embeddings": 4096})
    model = build(spec, seq_len=4096)
    assert model.config.rope_parameters["rope_theta"] == 8e6
    assert decoder(model).rotary_emb.inv_freq[1].item() == pytest.approx(8e6 ** (-2 / 16))
    with pytest.raises(
        RecipeError, match=r"with intermediate_size the weights .* model\.layers\.0\.mlp\.gate_proj\.weight"
    ):
        build(Model(init_from=str(checkpoint), overrides={"intermediate_size": 64}))
    with pytest.raises(RecipeError, match=r"model\.layers\.2\."):
        build(Model(init_from=str(checkpoint), overrides={"num_hidden_layers": 3}))
    with pytest.raises(RecipeError, match=r"lm_head\.weight"):
        build(Model(init_from=str(checkpoint), overrides={"tie_word_embeddings": False}))


def test_init_from_trains_the_token_a_checkpoint_padded_with(tmp_path: Path) -> None:
    """transformers freezes the embedding of the padding id, which many checkpoints set to their end-of-text."""
    config = Qwen3Config(**{**SMALL, "pad_token_id": 3, "eos_token_id": [3, 5]})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = build(Model(init_from=str(tmp_path)), vocab_size=120)
    model.get_input_embeddings()(torch.tensor([[3]])).sum().backward()
    assert model.get_input_embeddings().weight.grad[3].abs().sum() > 0
    assert model.generation_config.eos_token_id == [3, 5]


SMALL = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16}


def test_half_precision_checkpoints_become_fp32(tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_config(Qwen3Config(**SMALL), dtype=torch.bfloat16)
    source.save_pretrained(tmp_path)
    model = build(Model(init_from=str(tmp_path)), vocab_size=128)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, source.lm_head.weight.float())


def test_dropout_of_a_checkpoint_is_kept_as_it_is(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    assert build(Model(init_from=str(tmp_path)), vocab_size=128).config.attn_pdrop == 0.1
    spec = Model(init_from=str(tmp_path), overrides={"attn_pdrop": 0.0})
    assert build(spec, vocab_size=128).config.attn_pdrop == 0.0


def test_places_that_hold_no_model_are_refused(checkpoint: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "file").write_text("")
    for given, message in [
        (str(checkpoint.parent), rf"holds no config\.json; did you mean {checkpoint}"),
        (str(tmp_path), r"holds no config\.json: it is no transformers model"),
        (str(tmp_path / "none"), "there is no folder"),
        ("./none", "there is no folder"),
        (str(tmp_path / "file"), "is a file; give the folder"),
        ("outputs/never-was", "no folder outputs/never-was is here, and the hub did not give it"),
    ]:
        with pytest.raises(RecipeError, match=f"model.init_from: .*{message}"):
            build(Model(init_from=given))
    with pytest.raises(RecipeError, match="only hub ids have revisions"):
        build(Model(init_from=str(checkpoint), revision="main"))


def test_models_that_are_no_causal_language_model_are_refused(tmp_path: Path) -> None:
    for config, message in [
        (T5Config(), "transformers has no causal language model"),
        (Gemma3Config(), "more than a language model"),
        ({"model_type": "own", "auto_map": {}}, "runs no code from checkpoints"),
        ({"model_type": "llama", "quantization_config": {}}, "quantised"),
    ]:
        fields = config if isinstance(config, dict) else config.to_dict()
        (tmp_path / "config.json").write_text(json.dumps(fields))
        with pytest.raises(RecipeError, match=message):
            build(Model(config=str(tmp_path)))
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(RecipeError, match=r"model\.config"):
        build(Model(config=str(tmp_path)))


def test_broken_weights_are_refused_by_name(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(checkpoint / "model.safetensors")
    (tmp_path / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    spec = Model(init_from=str(tmp_path))
    with pytest.raises(PreflightError, match="cannot be read"):
        build(spec)
    (tmp_path / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(PreflightError, match="cannot be read"):
        build(spec)
    partial = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(partial, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError, match=r"not complete: 3 weights are missing, model\.layers\.1\.mlp"):
        build(spec)
    save_file(weights | {"model.norm.weight": torch.ones(8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(PreflightError):
        build(spec)
    save_file(weights | {"model.extra": torch.ones(8)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.warns(UserWarning, match=r"no place for: model\.extra"):
        build(spec)
