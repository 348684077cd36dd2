"""CORE's tasks as tasks of lm-eval: `lm_eval --include_path FOLDER --tasks core --metadata '{"core": "BUNDLE"}'`.

lm-eval's own kinds of request are in text: a context, a continuation, the sum of their log-probabilities. CORE compares
means over tokens, of parts that are found by comparing tokens, and so needs the tokenizer of the very model that is
asked. So there is one more kind of request, `core_question`: all prompts of a question at once. It is a method that
this module gives to lm-eval's `LM`, which is where the harness looks for it; it reads the model, its tokenizer, its
context length and its batch size there, and nothing has to be said twice. On a transformers model rows are scored by
`core.score`; on any other that takes tokens, by its own `_loglikelihood_tokens`.
"""

import itertools
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.model import LM, TemplateLM
from lm_eval.api.task import Task
from lm_eval.config.task import TaskConfig
from lm_eval.filters import build_filter_ensemble
from lm_eval.models.huggingface import HFLM

from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.evaluate.core.bundle import CoreTask, digest, questions, read_bundle
from cheaptrain.evaluate.core.prompts import prompts
from cheaptrain.evaluate.core.score import Scored, score_rows
from cheaptrain.evaluate.core.spans import Row, rows_of

ENVIRONMENT = "CHEAPTRAIN_CORE"
_REQUEST = "core_question"
_AT_ONCE = 2048  # tokens of a forward pass for each row of the harness's batch size
_TOKENISED_AT_ONCE = 4096  # prompts

_log = logging.getLogger("lm_eval")  # where lm-eval says what it does


class CoreQuestions(Task):
    """One task of CORE. `config` is what lm-eval makes of its YAML file: `metadata.label` names the task in the bundle,
    `metadata.core` the bundle (or the environment variable CHEAPTRAIN_CORE), `metadata.core_rows` how many of the
    shuffled questions there are to be at all (nanochat's max_per_task: examples come from them too).
    """

    OUTPUT_TYPE = _REQUEST

    def __init__(self, config: dict[str, Any]) -> None:
        metadata = dict(config["metadata"])
        label = metadata["label"]
        folder = metadata.get("core") or os.environ.get(ENVIRONMENT)
        if not folder:
            raise RecipeError(
                f'the CORE bundle is needed: metadata {{"core": FOLDER}} (lm_eval --metadata), or {ENVIRONMENT}=FOLDER'
            )
        tasks = read_bundle(Path(folder))
        if label not in tasks:
            raise RecipeError(f"{folder}/core.yaml: no task {label!r}, only {', '.join(tasks)}")
        self.core: CoreTask = tasks[label]
        rows = int(metadata["core_rows"]) if "core_rows" in metadata else None
        self.questions = questions(self.core, rows)
        version = f"{metadata['version']}-{digest(self.core)}"
        self.VERSION = version if rows is None else f"{version}-{rows}"
        self._docs = [{"index": question.index, **question.row} for question in self.questions]
        self._config = TaskConfig(
            task=config["task"],
            num_fewshot=self.core.shots,
            output_type=_REQUEST,
            metadata={**metadata, "version": self.VERSION, "baseline": self.core.baseline, "chat_template": False},
        )
        self._instances: list[Instance] | None = None
        self._filters = [build_filter_ensemble("none", [("take_first", None)])]

    def has_training_docs(self) -> bool:
        return False

    def has_validation_docs(self) -> bool:
        return False

    def has_test_docs(self) -> bool:
        return True

    def test_docs(self) -> list[dict[str, Any]]:
        return self._docs

    def doc_to_text(self, doc: dict[str, Any]) -> str:
        return prompts(self.core, self.questions[doc["index"]], self.questions)[0]

    def doc_to_target(self, doc: dict[str, Any]) -> int | str:
        """The number of the right choice, or what has to be said."""
        return doc["gold"] if "gold" in doc else doc["continuation"]

    def fewshot_context(self, doc: dict[str, Any], num_fewshot: int, **kwargs: Any) -> str:
        """Nothing: the prompts hold their examples. Raises RecipeError for settings with which it would not be CORE."""
        if kwargs.get("apply_chat_template") or kwargs.get("system_instruction"):
            raise RecipeError(
                f"{self.task_name} is CORE only without chat template and system prompt: score it by itself"
            )
        if num_fewshot != self.core.shots:
            raise RecipeError(f"{self.task_name} is CORE only with {self.core.shots} examples, not {num_fewshot}")
        return ""

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        texts = prompts(self.core, self.questions[doc["index"]], self.questions)
        # The first argument is what the harness hashes and shows as the prompt.
        arguments = (texts[0], self.core.kind, *texts[1:])
        return Instance(_REQUEST, doc, arguments, 0, metadata=kwargs["metadata"])  # type: ignore[arg-type]

    def process_results(self, doc: dict[str, Any], results: Sequence[dict[str, Any]]) -> dict[str, float]:
        (answer,) = results
        right = float(answer["right"] if self.core.kind == "language_modeling" else answer["lowest"] == doc["gold"])
        return {
            "acc": right,
            "acc_centred": self.core.centred(right),
            "cropped": float(answer["cropped"] > 0),
        }

    def aggregation(self) -> dict[str, Callable[[Iterable[float]], float]]:
        return dict.fromkeys(("acc", "acc_centred", "cropped"), mean)

    def higher_is_better(self) -> dict[str, bool]:
        return {"acc": True, "acc_centred": True, "cropped": False}


def core_question(lm: LM, requests: Sequence[Instance]) -> list[dict[str, Any]]:
    """What a model makes of CORE questions, in their order.

    Each: `losses` and `tokens`, mean loss and number of scored tokens of each row, None where they do not fit into the
    context; `lowest`, the row of lowest loss, the first of several, None when one does not fit; `right`, whether all
    scored tokens of a single row are the likeliest; `cropped`, tokens cut off on the left. Warns of what was cut and of
    what could not be scored, which counts as wrong. Raises CheaptrainError for a model that takes text alone.
    """
    if not isinstance(lm, TemplateLM) or lm.tokenizer is None:
        raise CheaptrainError(
            f"CORE compares tokens, and {type(lm).__name__} does not let them be scored: use --model hf"
        )
    answers: list[dict[str, Any]] = []
    # A task at a time: its numbers must not depend on which other tasks are asked with it and share its padding.
    for _, group in itertools.groupby(requests, key=lambda request: request.task_name):
        answers += _asked(lm, list(group))
    return answers


setattr(LM, _REQUEST, core_question)


def _asked(lm: TemplateLM, requests: Sequence[Instance]) -> list[dict[str, Any]]:
    rows = _tokenised(lm, requests)
    scores = iter(_scored(lm, [row for each in rows for row in each if row.fits]))
    answers = [_answer(each, [next(scores) if row.fits else None for row in each]) for each in rows]
    _warn(requests, answers, lm.max_length)
    return answers


def _tokenised(lm: TemplateLM, requests: Sequence[Instance]) -> list[list[Row]]:
    texts = [[request.arguments[0], *request.arguments[2:]] for request in requests]
    flat = [text for each in texts for text in each]
    encoded: list[list[int]] = []
    for start in range(0, len(flat), _TOKENISED_AT_ONCE):
        encoded += lm.tokenizer(flat[start : start + _TOKENISED_AT_ONCE], add_special_tokens=False)["input_ids"]
    ids = iter(encoded)
    return [
        rows_of(request.arguments[1], [next(ids) for _ in each], lm.prefix_token_id, lm.max_length)
        for request, each in zip(requests, texts, strict=True)
    ]


def _scored(lm: TemplateLM, rows: list[Row]) -> list[Scored]:
    if isinstance(lm, HFLM) and lm.backend == "causal" and not getattr(lm.model, "_is_stateful", False):
        size = lm.batch_size if isinstance(lm.batch_size, int) else lm.max_batch_size or 1
        dtype = lm.mixed_precision_dtype
        with torch.autocast(lm.device.type, dtype, enabled=dtype is not None):
            return score_rows(lm.model, rows, size * _AT_ONCE)
    asked = [(("", ""), list(row.tokens[: row.start]), list(row.tokens[row.start :])) for row in rows]
    given = iter(lm._loglikelihood_tokens([request for request in asked if request[2]]))
    scores = []
    for _, _, ending in asked:
        if ending:
            total, greedy = next(given)
            scores.append(Scored(-total / len(ending), bool(greedy)))
        else:
            scores.append(Scored(math.nan, True))
    return scores


def _answer(rows: Sequence[Row], scores: Sequence[Scored | None]) -> dict[str, Any]:
    losses = [score.loss if score else None for score in scores]
    return {
        "losses": losses,
        "tokens": [len(row.tokens) - row.start if row.fits else None for row in rows],
        "lowest": _lowest([loss for loss in losses if loss is not None]) if None not in losses else None,
        "right": len(scores) == 1 and scores[0] is not None and scores[0].greedy,
        "cropped": max(row.cropped for row in rows),
    }


def _lowest(losses: Sequence[float]) -> int:
    """The first of the lowest. A choice that all others begin with has no token of its own and NaN for a mean, which
    is lower than nothing and nothing is lower than it: it wins where it stands first, and only there."""
    best = 0
    for place, loss in enumerate(losses):
        if loss < losses[best]:
            best = place
    return best


def _warn(requests: Sequence[Instance], answers: Sequence[dict[str, Any]], context: int) -> None:
    cropped = sum(answer["cropped"] > 0 for answer in answers)
    lost = sum(None in answer["losses"] for answer in answers)
    if cropped:
        _log.warning(
            "%s: %d of %d questions are longer than the context of %d tokens and were cut on the left%s",
            requests[0].task_name, cropped, len(requests), context,
            f"; {lost} of them do not fit at all and count as wrong" if lost else "",
        )  # fmt: skip
