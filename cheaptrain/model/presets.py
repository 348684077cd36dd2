"""Named shapes: what `model.preset` may say.

A preset is nothing but fields of a transformers config; every one of them can be overridden in the recipe. The trap it
avoids: a preset does not fix the vocabulary. The embedding takes the tokenizer's size, so the parameter counts below
hold for the vocabulary beside them only.

7b, 70b and 671b are there to be planned with (`recipes/scale`): they are built without memory.
"""

import difflib
from dataclasses import dataclass
from typing import Any

from cheaptrain.errors import RecipeError


@dataclass(frozen=True)
class Preset:
    """Fields of the transformers config of class `model_type`, and where they come from."""

    model_type: str
    fields: dict[str, Any]
    source: str


def find_preset(name: str) -> Preset:
    """The preset called `name`. Raises RecipeError with the nearest names and the whole list."""
    if name in PRESETS:
        return PRESETS[name]
    near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.4)
    hint = f" Did you mean {' or '.join(near)}?" if near else ""
    raise RecipeError(f"model.preset: there is no preset {name!r}.{hint} There are: {', '.join(PRESETS)}")


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": ffn,
        "tie_word_embeddings": True,
    }


# The base models read 4k tokens. Their rope theta was never published: the 32k models have 8,000,000, and the released
# notes say that 32k was reached by multiplying theta by 8, so 1,000,000 is inferred.
_R1_COMMON = {
    "max_position_embeddings": 4096,
    "rope_theta": 1_000_000.0,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.02,
}


def _mobilellm(*shape: int) -> Preset:
    return Preset("qwen3", _shape(*shape) | _R1_COMMON, f"{_R1_SOURCE}; built as Qwen3: QK-norm with learned gains")


def _mobilellm_r1(*shape: int) -> Preset:
    return Preset("llama4_text", _llama4(*shape) | _R1_COMMON, _R1_SOURCE)


def _llama4(*shape: int) -> dict[str, Any]:
    fields = _shape(*shape)
    layers = fields["num_hidden_layers"]
    return fields | {
        "intermediate_size_mlp": fields["intermediate_size"],
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "num_local_experts": 0,
        "use_qk_norm": True,  # without weights, after RoPE
        "attn_temperature_tuning": False,
        # The class always builds a chunked mask and refuses None; a chunk as long as the longest row means no chunks.
        "attention_chunk_size": 32768,
        "no_rope_layers": [1] * layers,  # 1: this layer *has* RoPE
        "layer_types": ["full_attention"] * layers,
    }


_R1_SOURCE = "MobileLLM-R1, arXiv 2509.24945 table 1 and the released config.json"
_SMOLLM2_SOURCE = "config.json of HuggingFaceTB/SmolLM2-"
_GPT2_SOURCE = "config.json of openai-community/gpt2; dropout 0, as all its later reproductions have it"
_LLAMA3_SOURCE = "config.json of meta-llama/Llama-3.1-{}, without its scaling of RoPE for rows beyond 8k"
_DEEPSEEK_SOURCE = (
    "config.json of deepseek-ai/DeepSeek-V3 as it was pretrained: rows of 4k, no YaRN, no extra prediction"
)
_OURS = "cheaptrain's own"

_GPT2 = {"n_positions": 1024, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
_SMOLLM2 = {"max_position_embeddings": 8192, "rope_theta": 100_000.0, "rms_norm_eps": 1e-5}
_LLAMA3 = {
    "tie_word_embeddings": False,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
}
_DEEPSEEK_V3 = {
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
    "rope_theta": 10_000.0,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
_TINY = {"max_position_embeddings": 256, "rope_theta": 10_000.0, "initializer_range": 0.02}

# fmt: off
PRESETS: dict[str, Preset] = {
    # _shape: layers, hidden, heads, kv heads, head_dim, ffn                       parameters (at a vocabulary of)
    "mobilellm-140m":    _mobilellm(15, 576, 9, 3, 64, 2048),                    # 140,250,432 (128,256)
    "mobilellm-360m":    _mobilellm(15, 1024, 16, 4, 64, 4096),                  # 359,433,088 (128,256)
    "mobilellm-950m":    _mobilellm(22, 1536, 24, 6, 64, 6144),                  # 949,688,576 (128,256)
    "mobilellm-r1-140m": _mobilellm_r1(15, 576, 9, 3, 64, 2048),                 # 140,248,512 (128,256)
    "mobilellm-r1-360m": _mobilellm_r1(15, 1024, 16, 4, 64, 4096),               # 359,431,168 (128,256)
    "mobilellm-r1-950m": _mobilellm_r1(22, 1536, 24, 6, 64, 6144),               # 949,685,760 (128,256)
    "gpt2-124m": Preset(                                                         # 124,439,808 (50,257)
        "gpt2", {"n_layer": 12, "n_embd": 768, "n_head": 12} | _GPT2, _GPT2_SOURCE),
    "smollm2-135m": Preset(                                                      # 134,515,008 (49,152)
        "llama", _shape(30, 576, 9, 3, 64, 1536) | _SMOLLM2 | {"initializer_range": 1 / 24}, _SMOLLM2_SOURCE + "135M"),
    # As wide and deep as Llama 3.1 8B, and as Mistral 7B, which is 7,241,732,096 with its vocabulary of 32,000.
    "7b": Preset(                                                                # 8,030,261,248 (128,256)
        "llama", _shape(32, 4096, 32, 8, 128, 14336) | _LLAMA3, _LLAMA3_SOURCE.format("8B")),
    "70b": Preset(                                                               # 70,553,706,496 (128,256)
        "llama", _shape(80, 8192, 64, 8, 128, 28672) | _LLAMA3, _LLAMA3_SOURCE.format("70B")),
    "671b": Preset("deepseek_v3", _DEEPSEEK_V3, _DEEPSEEK_SOURCE),               # 671,026,404,352 (129,280)
    "quickstart":  Preset("qwen3", _shape(4, 128, 4, 2, 32, 384) | _R1_COMMON, _OURS),
    "tiny-qwen3":  Preset("qwen3", _shape(2, 64, 4, 2, 16, 128) | _TINY, _OURS),
    "tiny-llama":  Preset("llama", _shape(2, 64, 4, 2, 16, 128) | _TINY, _OURS),
    "tiny-llama4": Preset("llama4_text", _llama4(2, 64, 4, 2, 16, 128) | _TINY, _OURS),
    "tiny-gpt2":   Preset("gpt2", {"n_layer": 2, "n_embd": 64, "n_head": 4} | _GPT2 | {"n_positions": 256}, _OURS),
}
# fmt: on
