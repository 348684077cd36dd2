"""Tiny checkpoints to talk to, that say what a test wants.

The tokenizer knows bytes, three special tokens and the pieces of a script. The model is a table: after each token one
other is far likelier than the rest, so what it answers, and whether it ends, is known. In a chat it begins after the
newline behind `<|im_start|>assistant`.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def save_talker(
    folder: Path,
    script: Sequence[str],
    *,
    template: str | None = CHATML,
    positions: int = 512,
    eos: str | None = END_OF_TEXT,
    others: float = -50.0,
    padded: int = 0,
) -> Path:
    """Write a checkpoint that says the pieces of `script` one after the other and, when they are at their end, the last
    one again. No piece may come twice. `others` is the score of all other tokens, against 50 for the one that follows.
    The model has `padded` ids more than the tokenizer, and they are likelier than all.
    """
    tokenizer = _tokenizer(script)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size + padded,
        hidden_size=size + size % 2,
        intermediate_size=2,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    chain = ["Ċ", *script]  # Ċ: how byte-level tokenizers spell a newline
    ids = [tokenizer.convert_tokens_to_ids(piece) for piece in chain]
    assert None not in ids and len(set(ids)) == len(ids)
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(torch.eye(size + padded, config.hidden_size))
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.fill_(others / config.hidden_size**0.5)  # the norm makes the one 1 a root of hidden_size
        model.lm_head.weight[size:] = 90.0 / config.hidden_size**0.5
        for now, following in zip(ids, [*ids[1:], ids[-1]], strict=True):
            model.lm_head.weight[following, now] = 50.0 / config.hidden_size**0.5
    end = tokenizer.convert_tokens_to_ids(eos) if eos else None
    model.generation_config = GenerationConfig(eos_token_id=end)
    model.save_pretrained(folder)
    return folder


def _tokenizer(script: Sequence[str]) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in (END_OF_TEXT, START, END)])
    known = {*alphabet, END_OF_TEXT, START, END}
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in script if piece not in known])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT)
