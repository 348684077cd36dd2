"""Text the model writes, so that a reader sees learning and not only a number.

Written by the plain twin of the model (the same weights under transformers' own attention), with a random generator of
its own: sampling leaves no trace in the training state.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from cheaptrain.model.proof import plain_twin
from cheaptrain.recipe.schema import Samples


@torch.no_grad()
def write_samples(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Samples, *, seed: int
) -> list[dict[str, str]]:
    """One continuation of each prompt: `{"prompt": ..., "text": ...}`, without the special tokens."""
    twin = plain_twin(model).eval()
    devices = [model.device] if model.device.type == "cuda" else []
    written = []
    for number, prompt in enumerate(samples.prompts):
        ids = tokenizer(prompt, return_tensors="pt").to(model.device)
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed + number)
            output = twin.generate(
                input_ids=ids["input_ids"],
                attention_mask=ids["attention_mask"],
                max_new_tokens=_room(twin, ids["input_ids"].shape[1], samples.max_new_tokens),
                do_sample=samples.temperature > 0,
                temperature=samples.temperature if samples.temperature > 0 else None,
                top_k=None,
                top_p=None,
            )
        text = str(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
        written.append({"prompt": prompt, "text": text})
    return written


def check_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], positions: int) -> list[str]:
    """What is wrong with the prompts, before the run starts: empty, or longer than the model can read."""
    problems = []
    for prompt in prompts:
        length = len(tokenizer(prompt)["input_ids"])
        if length == 0:
            problems.append(f"samples.prompts: {prompt!r} gives no tokens")
        elif length >= positions:
            problems.append(f"samples.prompts: {prompt[:40]!r}… has {length} tokens, the model {positions} positions")
    return problems


def _room(model: PreTrainedModel, used: int, wanted: int) -> int:
    positions = getattr(model.config, "max_position_embeddings", None) or used + wanted
    return max(1, min(wanted, positions - used))
