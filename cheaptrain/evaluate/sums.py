"""Sums the model has not seen, put to it as a user would, before and after a stage.

A loss says little to a reader; "it gets 93 of 100 sums right and stops when it is done" says something. The questions
are pairs of operands that no drill of the source contains (`held_out`), so a right answer is not one remembered. The
trap is asking more kindly than a user can: the model is plain transformers, generates greedily from the chat template
of its checkpoint, and an answer counts only if its last line is exactly what a drill ends with, and it is the last: the
`#### 4` at which an answer was cut off may have been about to become `#### 47`. What is measured besides is whether it
ended by itself: a model that goes on until it is cut off has not learnt where a turn ends.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cheaptrain.durable import replace_json
from cheaptrain.model.saving import no_progress_bars

PROBE = "probe.json"  # in the run folder
_AT_ONCE = 64


@dataclass(frozen=True)
class Marks:
    """How many questions were asked, answered rightly, and how many answers ended by themselves; the first of them."""

    asked: int
    right: int
    ended: int
    question: str
    answer: str


def marks_of_checkpoint(folder: Path, questions: Sequence[tuple[str, str]], max_new_tokens: int) -> Marks:
    """Put the questions to the checkpoint in `folder`, as it lies on the disk."""
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return marks(model, AutoTokenizer.from_pretrained(folder), questions, max_new_tokens)


@torch.no_grad()
def marks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[tuple[str, str]],
    max_new_tokens: int,
) -> Marks:
    """Put `questions` (text, last line of the answer) to a plain transformers model, in its tokenizer's template."""
    ends = model.generation_config.eos_token_id if model.generation_config else None
    ends = set(ends if isinstance(ends, list) else [ends]) - {None}
    was_training, right, ended = model.training, 0, 0
    answers: list[str] = []
    model.eval()
    for start in range(0, len(questions), _AT_ONCE):
        part = questions[start : start + _AT_ONCE]
        ids, attended = _prompts(tokenizer, [question for question, _ in part], min(ends, default=0))
        out = model.generate(  # type: ignore[operator]
            input_ids=ids.to(model.device),
            attention_mask=attended.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=min(ends, default=0),
        )
        for (_, wanted), new in zip(part, out[:, ids.shape[1] :].tolist(), strict=True):
            stop = next((at for at, token in enumerate(new) if token in ends), None)
            answers.append(str(tokenizer.decode(new[:stop], skip_special_tokens=False)).rstrip())
            right += stop is not None and answers[-1].rpartition("\n")[2] == wanted
            ended += stop is not None
    model.train(was_training)
    return Marks(len(questions), right, ended, questions[0][0], answers[0])


def keep_marks(run: Path, before: Marks | None, after: Marks | None) -> None:
    """Write them to the run folder, whole or not at all."""
    replace_json(run / PROBE, {"before": before and asdict(before), "after": after and asdict(after)})


def read_marks(content: dict[str, Any], when: str) -> Marks | None:
    """The marks `before` or `after` out of what `keep_marks` wrote."""
    return Marks(**content[when]) if content.get(when) else None


def _prompts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rendered user turns, padded on the left: ids and which of them count, each `[texts, longest]`."""
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=True, return_dict=False
        )
        for text in texts
    ]
    longest = max(map(len, rendered))
    ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rendered])
    attended = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rendered])
    return ids, attended
