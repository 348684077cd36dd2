"""A GGUF file becomes a transformers folder with the same weights, the right tokenizer, and an end."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from tiny_recipe import pipe
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from cheaptrain.errors import PreflightError
from cheaptrain.model.gguf import QUESTION, convert

gguf = pytest.importorskip("gguf")

SHARED = Path(__file__).parents[2] / "shared" / "data"
REAL = SHARED / "teacher" / "SmolLM2-135M-Instruct.Q4_1.gguf.zst"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<|end|>", *letters, "th", "Ġa"])}
    backend = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("Ġ", "a")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=128,  # transformers does not read another from this file, and refuses the weights
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )
    made = Qwen3ForCausalLM(config).eval()
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Path:
    return _write(tmp_path_factory.mktemp("gguf") / "tiny.gguf", model, tokenizer)


def _write(
    path: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, without: str = "", extra: str = ""
) -> Path:
    config, writer = model.config, gguf.GGUFWriter(path, "qwen3")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["t h", "Ġ a"])
    writer.add_eos_token_id(0)
    for name, tensor in model.state_dict().items():
        if _name(name) != without:
            writer.add_tensor(_name(name), tensor.float().numpy().astype(np.float32))
    if extra:
        writer.add_tensor(extra, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _name(name: str) -> str:
    fixed = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    fixed["lm_head.weight"] = "output.weight"
    if name in fixed:
        return fixed[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def _quiet() -> Console:
    return Console(quiet=True)


def test_a_tensor_that_lands_under_another_name_shows_in_the_logits(
    tmp_path: Path, file: Path, model: Qwen3ForCausalLM
) -> None:
    convert(file, tmp_path / "hf", tokenizer=None, dtype="fp32", console=_quiet())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    ids = torch.arange(40)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert type(loaded) is Qwen3ForCausalLM and loaded.config.rope_parameters["rope_theta"] == 5000.0
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())


@pytest.mark.parametrize("missing, extra", [("blk.1.ffn_up.weight", ""), ("", "blk.0.attn_q.bias")])
def test_weights_that_would_be_random_or_dropped_are_refused(
    tmp_path: Path, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, missing: str, extra: str
) -> None:
    file = _write(tmp_path / "odd.gguf", model, tokenizer, missing, extra)
    with pytest.raises(
        PreflightError, match="not in it: model.layers.1.mlp.up_proj" if missing else "some were dropped"
    ):
        convert(file, tmp_path / "hf", tokenizer=None, dtype="fp32", console=_quiet())
    assert not (tmp_path / "hf").exists()


def test_bf16_weights_are_the_rounded_ones_and_positions_are_not_rounded(
    tmp_path: Path, file: Path, model: Qwen3ForCausalLM
) -> None:
    convert(file, tmp_path / "hf", tokenizer=None, dtype="bf16", console=_quiet())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    expected = Qwen3ForCausalLM(model.config).eval()
    expected.load_state_dict({name: tensor.bfloat16().float() for name, tensor in model.state_dict().items()})
    ids = torch.arange(60)[None]
    assert torch.equal(loaded(ids).logits, expected(ids).logits)


def test_the_folder_ends_at_the_end_of_text_of_its_tokenizer(
    tmp_path: Path, file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    convert(file, tmp_path / "hf", tokenizer=None, dtype="bf16", console=_quiet())
    generation = json.loads((tmp_path / "hf" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == 0 and generation["pad_token_id"] == 0
    text = "a path that the others thought a\n thing"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf")(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_the_tokenizer_of_another_model_is_refused_and_the_right_one_taken(
    tmp_path: Path, file: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer.save_pretrained(tmp_path / "right")
    convert(file, tmp_path / "hf", tokenizer=tmp_path / "right", dtype="bf16", console=_quiet())
    swapped = (tmp_path / "right" / "tokenizer.json").read_text()
    content = json.loads(swapped)
    vocabulary = content["model"]["vocab"]
    vocabulary["th"], vocabulary["Ġa"] = vocabulary["Ġa"], vocabulary["th"]
    (tmp_path / "right" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(PreflightError, match=r"2 of 259 tokens differ; 257 is 'th' there and 'Ġa' here"):
        convert(file, tmp_path / "other", tokenizer=tmp_path / "right", dtype="bf16", console=_quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "right"]


def test_nothing_is_overwritten_and_a_damaged_file_leaves_nothing(tmp_path: Path, file: Path) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(PreflightError, match="nothing is overwritten"):
        convert(file, tmp_path / "there", tokenizer=None, dtype="bf16", console=_quiet())
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(PreflightError, match="cannot read it"):
        convert(cut, tmp_path / "out", tokenizer=None, dtype="bf16", console=_quiet())
    packed = tmp_path / "cut.gguf.zst"
    packed.write_bytes(b"\x28\xb5\x2f\xfd not a frame")
    with pytest.raises(PreflightError, match="cannot be unpacked"):
        convert(packed, tmp_path / "out", tokenizer=None, dtype="bf16", console=_quiet())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.gguf", "cut.gguf.zst", "there"]


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason=f"needs {REAL}")
def test_the_real_teacher_answers_in_its_template_and_stops(tmp_path: Path) -> None:
    console, written = pipe()
    folder = SHARED / "tokenizers" / "smollm2-instruct"
    convert(REAL, tmp_path / "hf", tokenizer=folder, dtype="bf16", console=console)
    assert QUESTION in written.getvalue()
    assert "The capital of France is Paris.<|im_end|>" in " ".join(written.getvalue().split())
    assert "134,515,008 parameters" in written.getvalue()
