"""Text the model writes, so that a reader sees learning and not only a number.

Written by the model as it trains, sharded or not, all processes together: each token is a forward pass over the whole
text so far, without a cache, which is slow for long texts and right for every layout. Sampling has a random generator
of its own and leaves no trace in the training state.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.root import Root, forget_gathered
from cheaptrain.recipe.schema import Samples
from cheaptrain.train.objective import Compute, row_logits


@torch.no_grad()
def write_samples(
    root: Root,
    tokenizer: PreTrainedTokenizerBase,
    samples: Samples,
    compute: Compute,
    processes: Processes,
    *,
    seed: int,
    interrupted: Callable[[], bool] = lambda: False,
) -> list[dict[str, str]]:
    """One continuation of each prompt: `{"prompt": ..., "text": ...}`, without the special tokens.

    `interrupted` is asked before each prompt, by all processes together; once it says yes, the rest is left out.
    """
    written = []
    was_training = root.training
    root.eval()
    try:
        for number, prompt in enumerate(samples.prompts):
            if interrupted():
                break
            ids = tokenizer(prompt)["input_ids"]
            draw = torch.Generator().manual_seed(seed + number)
            new = _continue(root, ids, samples, compute, processes, draw)
            written.append({"prompt": prompt, "text": str(tokenizer.decode(new, skip_special_tokens=True))})
    finally:
        root.train(was_training)
        forget_gathered(root)
    return written


def _continue(
    root: Root, prompt: list[int], samples: Samples, compute: Compute, processes: Processes, draw: torch.Generator
) -> list[int]:
    """The tokens that follow, up to an end of text."""
    config = root.model.config
    positions = getattr(config, "max_position_embeddings", None) or len(prompt) + samples.max_new_tokens
    room = max(1, min(samples.max_new_tokens, positions - len(prompt)))
    ends = root.model.generation_config.eos_token_id if root.model.generation_config else None
    ends = ends if isinstance(ends, list) else [ends]
    row = torch.tensor([prompt + [0] * room])  # what comes later is seen by nothing before it
    new: list[int] = []
    for at in range(len(prompt) - 1, len(prompt) - 1 + room):
        logits = root(row_logits, row.to(compute.device), compute, at)[0].float().cpu()  # [vocab]
        # One process chooses for all: logits may differ in their last bit, and all must go on, or end, together.
        token = processes.on_main(partial(_choose, logits, samples.temperature, draw))
        if token in ends:
            break
        new.append(token)
        row[0, at + 1] = token
    return new


def _choose(logits: Tensor, temperature: float, draw: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=draw))


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
