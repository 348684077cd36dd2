"""`[eval]` of a stage: the light set while it trains, all tasks on the checkpoint that it ended with.

While training, each process scores whole tasks on a plain copy of its own, gathered for the occasion, so requests are
never split over a sharded model. The trap is everything that evaluating touches besides: random numbers, evaluation
mode, a tokenizer that is given a padding token, weights that are tied anew. So the model that is asked is a twin, the
tokenizer is read from a folder, and the training state is bit for bit what it was.

At the end the files on the disk are scored, with nothing of training in memory: what anybody else would get from them.
A task that fails costs its score and not the run.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from cheaptrain.checkpoint.load import saved_tensors
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.errors import CheaptrainError, RecipeError, StoppedError
from cheaptrain.model.twin import plain_twin
from cheaptrain.parallel.meeting import Meeting
from cheaptrain.parallel.processes import Processes
from cheaptrain.recipe.schema import Eval, Recipe
from cheaptrain.say import say
from cheaptrain.train.signals import StopRequest, agreed_stop

_WAITS_SECONDS = 7 * 86_400.0  # those still at work are watched
SIGN = "eval/seconds"  # in a record of metrics.jsonl: the light set was scored


@dataclass(frozen=True, eq=False)
class LightSet:
    """The tasks scored while training, loaded, and a tokenizer that may be changed."""

    settings: Eval
    suite: Any
    tokenizer: PreTrainedTokenizerBase
    folder: tempfile.TemporaryDirectory[str]  # of the tokenizer, for as long as tasks may read it


@dataclass(frozen=True)
class LightScores:
    """What came of the light set: values for metrics.jsonl, a line for people, what failed."""

    metrics: dict[str, Any]
    line: str
    failures: tuple[str, ...]


def wrong_tasks(recipe: Recipe, tokenizer: TextTokenizer) -> list[str]:
    """What is wrong with the tasks of a recipe, all loaded with their data; empty when nothing is."""
    settings = recipe.eval
    names = list(dict.fromkeys([*settings.tasks, *settings.light]))
    if not names:
        return []
    from cheaptrain.evaluate.suite import load_suite

    with tempfile.TemporaryDirectory(prefix="cheaptrain-tokenizer-") as folder:
        tokenizer.hf.save_pretrained(folder)
        try:
            suite = load_suite(settings, names, Path(folder))
        except CheaptrainError as error:
            return [f"{error} (what is on the hub is fetched by `cheaptrain prepare`)"]
    templated = [asked.name for asked in suite.tasks.values() if _in_template(settings, asked.chat_template)]
    if templated and tokenizer.hf.chat_template is None:
        return [f"eval: {templated[0]} is to be asked in a chat template, and the tokenizer has none; see [chat]"]
    return []


def load_light(recipe: Recipe, tokenizer: TextTokenizer, processes: Processes) -> LightSet | None:
    """The light set of a recipe, on every process; the main one first, so that data is unpacked once. Collective."""
    settings = recipe.eval
    if not settings.light:
        return None
    from cheaptrain.evaluate.suite import load_suite

    folder = tempfile.TemporaryDirectory(prefix="cheaptrain-light-")
    tokenizer.hf.save_pretrained(folder.name)
    light = settings.model_copy(update={"limit": settings.light_limit or settings.limit})
    found: list[Any] = []
    processes.on_main(lambda: found.append(load_suite(light, light.light, Path(folder.name), complete=False)))
    suite = found[0] if found else load_suite(light, light.light, Path(folder.name), complete=False)
    return LightSet(light, suite, AutoTokenizer.from_pretrained(folder.name), folder)


def score_light(
    light: LightSet,
    model: PreTrainedModel,
    processes: Processes,
    *,
    stop: Callable[[], bool],
    beat: Callable[[float], None],
) -> LightScores | None:
    """Score the light set of the model as it stands, which stays as it is; None when a process was asked to stop.

    `stop` is whether this one was; `beat` tells that it got on, with the seconds that it may be silent. Collective.
    """
    from cheaptrain.evaluate.harness import Interrupted, as_lm, dtype_on, score
    from cheaptrain.evaluate.run import asking, cost_of, group_result, shares
    from cheaptrain.evaluate.standing import result_of

    began = time.perf_counter()
    device, suite, settings = processes.device, light.suite, light.settings
    dtype = dtype_on(device, settings.dtype)
    beat(0.0)
    copy = whole_copy(model, device, None if dtype == "auto" else getattr(torch, dtype))
    meeting = Meeting(processes)
    how = {name: asking(settings, asked, device, settings.limit) for name, asked in suite.tasks.items()}
    costs = {name: cost_of(asked, how[name]) for name, asked in suite.tasks.items()}
    done: list[Any] = []
    failed: list[str] = []
    interrupted = False

    def get_on() -> None:
        beat(0.0)
        if stop():
            raise Interrupted

    try:
        lm = as_lm(copy, light.tokenizer, settings.batch_size)
        for name in shares(costs, processes.rank, processes.size):
            try:
                done.append(
                    result_of(suite.tasks[name], how[name], "", score(lm, suite.tasks[name], how[name], get_on))
                )
            except torch.OutOfMemoryError:
                failed.append(f"{name}: out of memory; lower eval.batch_size (now {settings.batch_size})")
            except CheaptrainError as error:
                failed.append(str(error))
    except Interrupted:
        interrupted = True
    finally:
        del copy
    beat(_WAITS_SECONDS)
    meeting.wait()
    beat(0.0)
    told = processes.all_of((done, failed, interrupted))
    if any(broken for _, _, broken in told):
        return None
    by_task = {result.task: result for results, _, _ in told for result in results}
    failures = tuple(text for _, texts, _ in told for text in texts)
    groups = [made for group in suite.groups.values() if (made := group_result(group, by_task))]
    ordered = [*groups, *(by_task[name] for name in suite.tasks if name in by_task)]
    metrics: dict[str, Any] = {}
    for result in ordered:
        if result.shown:
            continue
        main = result.metrics[0]
        metrics[f"eval/{result.task}"] = main.value
        if main.stderr is not None:
            metrics[f"eval/{result.task}/stderr"] = main.stderr
        metrics[f"eval/{result.task}/n"] = result.n
    if failures:
        metrics["eval/failed"] = len(failures)
    shown = [result for result in (groups or ordered) if not result.shown]
    line = ", ".join(f"{result.task} {_with_error(result.metrics[0])} (n = {result.n:,})" for result in shown[:6])
    return LightScores(metrics | {SIGN: time.perf_counter() - began}, line, failures)


def score_final(
    recipe: Recipe, name: str, run: RunDirectory, processes: Processes, stop: StopRequest, console: Console
) -> list[str]:
    """Score the tasks of a finished run from its last checkpoint, as far as no result stands; print them, and return
    what failed. Raises StoppedError when a process is asked to stop: what is scored stands. Collective."""
    settings = recipe.eval
    if not settings.tasks:
        return []
    from cheaptrain.evaluate.harness import Interrupted
    from cheaptrain.evaluate.run import collect, do_jobs, jobs_for, missing, share_of
    from cheaptrain.evaluate.subjects import subject_of
    from cheaptrain.evaluate.suite import load_suite
    from cheaptrain.evaluate.table import print_scores

    found: list[Any] = []
    try:
        subject = processes.on_main(lambda: subject_of(run.final, name))
        processes.on_main(
            lambda: found.append(load_suite(settings, settings.tasks, subject.checkpoint, complete=False))
        )
        jobs, stands = processes.on_main(lambda: jobs_for(subject, found[0], settings, processes.device, again=False))
    except CheaptrainError as error:  # the same on all processes
        return [str(error)]
    suite = found[0] if found else load_suite(settings, settings.tasks, subject.checkpoint, complete=False)
    if jobs:
        say(console, f"{name}: scoring {len(jobs)} tasks ({len(stands)} stand already)")
    meeting = Meeting(processes)

    def get_on() -> None:
        if stop:
            raise Interrupted

    failures: list[str] = []
    try:
        mine = share_of(jobs, processes.rank, processes.size)
        report = partial(say, console, style="dim")
        failures = [str(each) for each in do_jobs(mine, suite, settings, processes.device, report, get_on)]
    except Interrupted:
        pass
    meeting.wait()
    failures = [text for texts in processes.all_of(failures) for text in texts]
    if agreed_stop(stop, processes):
        raise StoppedError(
            f"{stop.name}: stopped while {name} was being scored; it is trained, and what is scored stands. Run the "
            "same command to go on."
        )

    def show() -> None:
        tasks, groups = collect(subject, suite, settings, processes.device)
        print_scores(f"{name} in tasks", [*groups, *tasks], console, missing=list(missing(suite, tasks)))

    try:
        processes.on_main(show)
    except CheaptrainError as error:
        failures.append(str(error))
    return failures


@torch.no_grad()
def whole_copy(model: PreTrainedModel, device: torch.device, dtype: torch.dtype | None) -> PreTrainedModel:
    """The plain twin of `model` with whole weights, on `device`, in `dtype` (None: as they are); `model` is untouched.

    Weights that are whole already and of that dtype are shared, not copied. Collective.
    """
    saved_tensors(model)  # makes FSDP drop what it had gathered: parameters are their shards again
    twin = plain_twin(model)
    made: dict[int, nn.Parameter] = {}
    for module in twin.modules():
        for name, parameter in module._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in made:
                whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
                moved = whole.to(device, dtype if whole.is_floating_point() else None)
                made[id(parameter)] = nn.Parameter(moved, requires_grad=False)
            module._parameters[name] = made[id(parameter)]
        for name, buffer in module._buffers.items():
            if isinstance(buffer, DTensor):
                module._buffers[name] = buffer.full_tensor().to(device)
    return twin


def fetch_tasks(recipe: Recipe) -> None:
    """Bring the data of a recipe's tasks to this machine, once its own is prepared. Raises RecipeError when something
    is wrong with them."""
    if problems := wrong_tasks(recipe, load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)):
        raise RecipeError("\n".join(problems))


def _in_template(settings: Eval, of_task: bool | None) -> bool:
    return bool(of_task if settings.chat_template is None else settings.chat_template)


def _with_error(metric: Any) -> str:
    from cheaptrain.evaluate.table import with_error

    return with_error(metric)
