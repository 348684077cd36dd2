"""One task put to one model by lm-eval, and what came of it in the form that is kept.

Scoring is lm-eval's alone: prompts, requests, metrics and their errors are what `lm_eval --model hf` gives on the same
folder. Here is only what it takes to call it from within another program: random numbers, loggers and progress bars are
left as they were, nothing is split over processes (lm-eval would, wherever it finds several), and a prompt that did not
fit the model is counted, because lm-eval cuts it and only warns.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lm_eval
import numpy as np
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.utils import handle_non_serializable
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.evaluate.quiet import Told, quiet
from cheaptrain.evaluate.results import Item, Metric
from cheaptrain.evaluate.suite import PYTHON_SEED, AskedTask, random_state_kept, seed_all
from cheaptrain.model.saving import no_progress_bars

HARNESS = f"lm-eval {version('lm-eval')}"
_BOOTSTRAP = 1000  # draws for the error of what is no mean (perplexity, F1); that of a mean has a formula


class Interrupted(BaseException):
    """What `beat` raises to break a task off. No Exception, so that no library takes it for a failure of its own."""


@dataclass(frozen=True)
class Asking:
    """How one task is asked: what of the settings changes its numbers."""

    shots: int
    limit: int | None
    chat_template: bool
    system: str | None
    seed: int
    dtype: str


@dataclass(frozen=True)
class Answers:
    """What lm-eval made of one task: `metrics` as it orders them, its own `results` without the samples, the items."""

    metrics: tuple[Metric, ...]
    n: int
    baseline: float | None
    notes: tuple[str, ...]
    results: dict[str, Any]
    items: tuple[Item, ...]
    seconds: float
    when: str


def load_lm(folder: Path, dtype: str, batch_size: int, device: torch.device) -> HFLM:
    """The checkpoint in `folder` as lm-eval asks it. Raises PreflightError when it cannot be loaded."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with no_progress_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:400]
        raise PreflightError(f"{folder}: not a checkpoint that transformers can load: {reason}") from error
    return as_lm(model.to(device), tokenizer, batch_size)  # type: ignore[arg-type]


def as_lm(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> HFLM:
    """A loaded model as lm-eval asks it, alone in this process. Puts it in evaluation mode."""
    with quiet():
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)  # type: ignore[arg-type]


def dtype_on(device: torch.device, asked: str) -> str:
    """What "auto" comes to: as saved on a GPU, float32 on a CPU, where nothing else is both fast and exact."""
    return "float32" if asked == "auto" and device.type == "cpu" else asked


def score(lm: HFLM, asked: AskedTask, how: Asking, beat: Callable[[], None] = lambda: None) -> Answers:
    """Put `asked` to `lm`. `beat` is called before each forward pass, and may raise Interrupted.

    Raises CheaptrainError naming the task when it cannot be scored.
    """
    began, when = time.perf_counter(), datetime.now(UTC).isoformat(timespec="milliseconds")
    if how.chat_template and not getattr(lm.tokenizer, "chat_template", None):
        raise CheaptrainError(f"{asked.name}: to be asked in a chat template, and the tokenizer has none")
    with random_state_kept(), quiet() as told, _no_pool(), torch.no_grad(), _beating(lm.model, beat):
        seed_all(PYTHON_SEED, how.seed)
        random.setstate(asked.state[0])
        np.random.set_state(asked.state[1])
        asked.task.set_config("num_fewshot", how.shots)
        asked.task.set_fewshot_seed(how.seed)
        try:
            found: Any = lm_eval.evaluate(
                lm=lm,
                task_dict={"tasks": {asked.name: asked.task}, "groups": {}, "group_map": {}},
                limit=how.limit,
                bootstrap_iters=_BOOTSTRAP,
                log_samples=True,
                system_instruction=how.system,
                apply_chat_template=how.chat_template,
                fewshot_as_multiturn=how.chat_template,
            )
        except (CheaptrainError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of lm-eval, transformers, or the code of a task
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
            raise CheaptrainError(f"{asked.name}: lm-eval could not score it: {reason}") from error
        finally:
            asked.task._instances = None  # the prompts and answers of ten thousand items
    samples: list[dict[str, Any]] = found.pop("samples")[asked.name]
    found["config"] = {"model": "hf", "batch_size": lm.batch_size, "device": str(lm.device), **how.__dict__}
    metrics, undefined = metrics_in(found["results"][asked.name], found["higher_is_better"].get(asked.name) or {})
    if not metrics:
        raise CheaptrainError(f"{asked.name}: lm-eval gave no number ({', '.join(undefined) or 'no metric'})")
    return Answers(
        metrics=metrics,
        n=int(found["n-samples"][asked.name]["effective"]),
        baseline=asked.baseline if asked.baseline is not None else _guessing(asked, samples),
        notes=(*_notes(told, asked.name), *(f"{name} is not a number, and left out" for name in undefined)),
        results=json.loads(json.dumps(found, default=handle_non_serializable)),
        items=tuple(_item(sample, found["configs"][asked.name].get("output_type"), asked.shown) for sample in samples),
        seconds=time.perf_counter() - began,
        when=when,
    )


def metrics_in(entries: Mapping[str, Any], higher: Mapping[str, Any]) -> tuple[tuple[Metric, ...], list[str]]:
    """The numbers among lm-eval's results of a task or group, and the names of those that are none. `higher`: whether
    more is better, by metric."""
    metrics, undefined = [], []
    for key, value in entries.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        if not isinstance(value, int | float | np.number) or not math.isfinite(value):
            undefined.append(metric)
            continue
        error = entries.get(f"{metric}_stderr,{kind}")
        known = float(error) if isinstance(error, int | float | np.number) and math.isfinite(error) else None
        metrics.append(Metric(metric, float(value), known, kind, bool(higher.get(metric, True))))
    return tuple(metrics), undefined


def _item(sample: dict[str, Any], output_type: str | None, shown: bool) -> Item:
    metrics: dict[str, float] = {}
    extra: dict[str, Any] = {"prompt": sample["arguments"][0][0]} if shown else {}  # what is read needs its beginning
    for name in sample["metrics"]:
        value = sample[name]
        if isinstance(value, bool | int | float | np.number) and math.isfinite(value):
            metrics[name] = float(value)
        else:  # pairs such as log-likelihood and bytes: the metric is made of all of them together
            extra[name] = json.loads(json.dumps(value, default=handle_non_serializable))
    answer = sample["filtered_resps"][0] if output_type == "generate_until" else None
    return Item(
        index=int(sample["doc_id"]),
        doc=sample["doc_hash"],
        metrics=metrics,
        filter=sample["filter"],
        answer=answer if answer is None or isinstance(answer, str) else json.dumps(answer, default=str),
        extra=extra,
    )


def _guessing(asked: AskedTask, samples: Sequence[dict[str, Any]]) -> float | None:
    """What guessing gets right of a multiple choice, where its first metric counts right answers."""
    if getattr(asked.task, "OUTPUT_TYPE", None) != "multiple_choice" or not samples:
        return None
    if not next(iter(asked.task.aggregation()), "").startswith(("acc", "exact_match")):
        return None
    kind = samples[0]["filter"]
    return float(np.mean([1 / len(sample["filtered_resps"]) for sample in samples if sample["filter"] == kind]))


def _notes(told: Told, task: str) -> list[str]:
    notes = [f"{told.cut:,} prompts were longer than the model can read and cut from the left"] if told.cut else []
    return notes + [
        f"{text.removeprefix(f'{task}: ')}{f' ({count} times)' if count > 1 else ''}"
        for text, count in told.warnings.items()
    ]


@contextmanager
def _no_pool() -> Iterator[None]:
    """lm-eval would start a process a core to draw the errors of what is no mean."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextmanager
def _beating(model: torch.nn.Module, beat: Callable[[], None]) -> Iterator[None]:
    handle = model.register_forward_pre_hook(lambda *_: beat())
    try:
        yield
    finally:
        handle.remove()
