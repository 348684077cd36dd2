"""CORE questions a second: one at a time as the definition reads (all rows of a question in one padded batch, the loss
at every position), and in the batches of `cheaptrain.evaluate.core`.

    python benchmarks/core_speed.py --checkpoint CHECKPOINT --data shared/data [--rows 8]

DATA holds `bench/core` and `tokenizers/gpt2`. Two models: a fresh one of a million parameters beside the embeddings of
GPT-2's 50,257 tokens, and a checkpoint of the quickstart, which has 2,048 tokens. Both ways answer the same questions,
and the losses are compared. Times are of the processor, one thread, so a busy machine changes little. Five minutes.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from results import report
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cheaptrain.evaluate.core.bundle import CoreTask, questions, read_bundle
from cheaptrain.evaluate.core.prompts import prompts
from cheaptrain.evaluate.core.score import score_rows
from cheaptrain.evaluate.core.spans import Row, rows_of

TASKS = (
    "copa", "winograd", "hellaswag_zeroshot", "openbook_qa", "lambada_openai", "bigbench_qa_wikidata", "arc_easy",
    "commonsense_qa",
)  # fmt: skip
TOKENS_AT_ONCE = 16 * 2048  # what a batch size of 16 comes to
CONTEXT = 4096
Result = TypeVar("Result")


def main() -> None:
    """Time both ways on both models, task by task."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=8, help="questions a task")
    arguments = parser.parse_args()
    bundle, gpt2 = arguments.data / "bench/core", arguments.data / "tokenizers/gpt2"
    for needed in (bundle, gpt2, arguments.checkpoint):
        if not needed.exists():
            sys.exit(f"{needed} is not there: nothing to measure")
    torch.set_num_threads(1)
    torch.manual_seed(1)
    tasks = read_bundle(bundle)
    small = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype=torch.float32).eval()
    models = [_fresh(AutoTokenizer.from_pretrained(gpt2)), (small, AutoTokenizer.from_pretrained(arguments.checkpoint))]
    measured = [{label: _measured(*each, tasks[label], arguments.rows) for label in TASKS} for each in models]

    rows = [[label, f"{tasks[label].shots}", *_cells([each[label] for each in measured])] for label in TASKS]
    total = [
        {key: math.fsum(task[key] for task in each.values()) for key in ("questions", "one", "batched")}
        for each in measured
    ]
    rows.append(["all of these", "", *_cells(total)])
    report(
        "core_speed",
        title=f"CORE: questions a second, {arguments.rows} questions a task, one thread, fp32",
        header=[
            "task",
            "shots",
            "50,257 tokens: one at a time",
            "batched",
            "gain",
            "2,048 tokens: one at a time",
            "batched",
            "gain",
        ],
        rows=rows,
        data={
            "models": ["1M parameters beside the embeddings, GPT-2's tokenizer", "quickstart checkpoint"],
            "seconds": measured,
            "largest_difference": max(task["apart"] for each in measured for task in each.values()),
        },
    )


def _fresh(tokenizer: PreTrainedTokenizerBase) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=CONTEXT, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval(), tokenizer


def _measured(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: CoreTask, count: int) -> dict[str, Any]:
    everything = questions(task)
    asked = []
    for question in everything[:count]:
        encoded = tokenizer(prompts(task, question, everything), add_special_tokens=False)["input_ids"]
        asked.append(rows_of(task.kind, encoded, tokenizer.eos_token_id, CONTEXT))
    flat = [row for each in asked for row in each]
    one, one_seconds = _timed(lambda: [loss for each in asked for loss in _one(model, each)])
    batched, seconds = _timed(lambda: [scored.loss for scored in score_rows(model, flat, TOKENS_AT_ONCE)])
    apart = max(abs(a - b) for a, b in zip(one, batched, strict=True) if not math.isnan(a))
    return {"questions": len(asked), "one": one_seconds, "batched": seconds, "apart": apart}


@torch.no_grad()
def _one(model: PreTrainedModel, rows: Sequence[Row]) -> list[float]:
    """The rows of one question in one pass, padded on the right, and the loss at every position."""
    longest = max(len(row.tokens) for row in rows)
    ids = torch.tensor([[*row.tokens, *[0] * (longest - len(row.tokens))] for row in rows])
    logits = model(input_ids=ids).logits
    losses = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(rows), -1)
    return [losses[place, row.start - 1 : len(row.tokens) - 1].mean().item() for place, row in enumerate(rows)]


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    start = time.thread_time()
    result = work()
    return result, time.thread_time() - start


def _cells(measured: Sequence[dict[str, Any]]) -> list[str]:
    cells = []
    for each in measured:
        one, batched = each["questions"] / each["one"], each["questions"] / each["batched"]
        cells += [f"{one:.1f}", f"{batched:.1f}", f"{batched / one:.1f}×"]
    return cells


if __name__ == "__main__":
    main()
