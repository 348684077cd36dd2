"""Scoring checkpoints: what stands is shown, what does not is scored, one task at a time, each kept at once.

    names → suite (all loaded and checked) → jobs (a task of a checkpoint, unless its key stands) → score → keep

A task is the unit. It is what goes to a process, whole: lm-eval can split the requests of one task over processes, but
then each must make the same number of forward passes, and with a sharded model that hangs. And it is what is lost when
somebody pulls the plug: lm-eval's own cache of answers goes by the prompt alone and not by the model, so a second
checkpoint would be given the answers of the first.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import torch
from lm_eval.api.group import Group
from lm_eval.models.huggingface import HFLM

from cheaptrain.durable import fingerprint
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.evaluate.harness import HARNESS, Asking, dtype_on, load_lm, metrics_in, score
from cheaptrain.evaluate.results import TaskResult
from cheaptrain.evaluate.standing import keep, key_of, result_of, standing
from cheaptrain.evaluate.subjects import Subject
from cheaptrain.evaluate.suite import AskedTask, Suite
from cheaptrain.recipe.schema import Eval

Report = Callable[[str], None]


@dataclass(frozen=True)
class Job:
    """One task of one checkpoint that no result stands for; `cost` is only good for comparing."""

    subject: Subject
    task: str
    how: Asking
    key: str
    cost: int


@dataclass(frozen=True)
class Failure:
    """A task that could not be scored."""

    task: str
    checkpoint: str
    reason: str

    def __str__(self) -> str:
        return f"{self.checkpoint}: {self.reason}"


def asking(settings: Eval, asked: AskedTask, device: torch.device, limit: int | None) -> Asking:
    """How the settings have a task asked on `device`. A limit above the number of questions is none."""
    templated = asked.chat_template if settings.chat_template is None else settings.chat_template
    return Asking(
        shots=asked.shots,
        limit=None if limit is None or limit >= asked.questions else limit,
        chat_template=bool(templated),
        system=settings.system,
        seed=settings.seed,
        dtype=dtype_on(device, settings.dtype),
    )


def jobs_for(
    subject: Subject, suite: Suite, settings: Eval, device: torch.device, *, again: bool
) -> tuple[list[Job], list[TaskResult]]:
    """What is left to score of a checkpoint, and what stands; with `again` nothing stands."""
    kept = {result.key: result for result in standing(subject.folder, subject.scored).results}
    jobs, stands = [], []
    for asked in suite.tasks.values():
        how = asking(settings, asked, device, settings.limit)
        key = key_of(subject.scored, asked, how)
        if key in kept and not again:
            stands.append(kept[key])
            continue
        jobs.append(Job(subject, asked.name, how, key, cost_of(asked, how)))
    return jobs, stands


def share_of(jobs: Sequence[Job], rank: int, size: int) -> list[Job]:
    """The jobs of process `rank` of `size`."""
    by_name = {f"{job.subject.checkpoint} {job.key}": job for job in jobs}
    return [by_name[name] for name in shares({name: job.cost for name, job in by_name.items()}, rank, size)]


def shares(costs: Mapping[str, int], rank: int, size: int) -> list[str]:
    """What process `rank` of `size` does: whole tasks, the costly ones first, each to the one with least to do."""
    loads, mine = [0] * size, []
    for name in sorted(costs, key=lambda name: (-costs[name], name)):
        least = loads.index(min(loads))
        loads[least] += costs[name]
        if least == rank:
            mine.append(name)
    return mine


def cost_of(asked: AskedTask, how: Asking) -> int:
    """What a task takes, only good for comparing: prompts and their examples, and many passes where text is written."""
    weight = 100 if getattr(asked.task, "OUTPUT_TYPE", None) == "generate_until" else 4
    return (how.limit or asked.questions) * weight * (1 + how.shots)


def do_jobs(
    jobs: Sequence[Job],
    suite: Suite,
    settings: Eval,
    device: torch.device,
    report: Report,
    beat: Callable[[], None] = lambda: None,
) -> list[Failure]:
    """Score `jobs` and keep each result as soon as it is there; returns what failed, of which nothing is kept. Memory
    that ran out fails its task alone. Interrupted, which `beat` may raise, ends it."""
    failures = []
    lm: HFLM | None = None
    loaded: Subject | None = None
    for job in sorted(jobs, key=lambda job: job.subject.scored.step or 0):
        asked = suite.tasks[job.task]
        try:
            if lm is None or loaded != job.subject:
                lm = None  # before the next is loaded: two may not fit
                lm = load_lm(job.subject.checkpoint, job.how.dtype, settings.batch_size, device)
                loaded = job.subject
            report(f"{_place(job.subject)}: {job.task}, {_questions(job.how, asked)}")
            answers = score(lm, asked, job.how, beat)
            keep(job.subject.folder, job.subject.scored, result_of(asked, job.how, job.key, answers), answers)
        except (CheaptrainError, torch.OutOfMemoryError) as error:
            failures.append(Failure(job.task, job.subject.name, _reason(error, job.task, settings)))
            report(f"failed: {failures[-1].reason}")
    return failures


def collect(
    subject: Subject, suite: Suite, settings: Eval, device: torch.device
) -> tuple[list[TaskResult], list[TaskResult]]:
    """The results of the suite's tasks and of its groups, as far as they stand; groups are made and kept here."""
    stands = jobs_for(subject, suite, settings, device, again=False)[1]
    by_task = {result.task: result for result in stands}
    kept = {result.key: result for result in standing(subject.folder, subject.scored).results}
    groups = []
    for group in suite.groups.values():
        made = group_result(group, by_task)
        if made is None:
            continue
        before = kept.get(made.key)
        if before is None or before.metrics != made.metrics:  # its members may have been scored again
            keep(subject.folder, subject.scored, made)
            before = made
        groups.append(before)
    return stands, groups


def group_result(group: Group, by_task: Mapping[str, TaskResult]) -> TaskResult | None:
    """lm-eval's mean of a group over its tasks; None while one of them is missing."""
    names = tuple(task.task_name for task in group.get_all_tasks())
    if any(name not in by_task for name in names):
        return None
    members = [by_task[name] for name in names]
    entries = {
        result.task: {
            "sample_len": result.n,
            **{f"{metric.name},{metric.filter}": metric.value for metric in result.metrics},
            **{
                f"{metric.name}_stderr,{metric.filter}": "N/A" if metric.stderr is None else metric.stderr
                for metric in result.metrics
            },
        }
        for result in members
    }
    higher = {metric.name: metric.higher_is_better for result in members for metric in result.metrics}
    metrics, _ = metrics_in(group.aggregate(entries), higher)  # type: ignore[arg-type]
    if not metrics:
        return None
    told = group.to_dict() if hasattr(group, "to_dict") else {}
    how = {"group": group.name, "aggregate": repr(told.get("aggregate_metric_list"))}
    return TaskResult(
        task=group.name,
        key=fingerprint({**how, "members": [result.key for result in members]})[:16],
        version=group.version,
        n=sum(result.n for result in members),
        metrics=metrics,
        settings=_common([result.settings for result in members]),
        seconds=sum(result.seconds for result in members),
        harness=HARNESS,
        when=datetime.now(UTC).isoformat(timespec="milliseconds"),
        members=names,
    )


def missing(suite: Suite, stands: Sequence[TaskResult]) -> Iterator[str]:
    """Tasks of the suite without a result."""
    there = {result.task for result in stands}
    yield from (name for name in suite.tasks if name not in there)


def device_of(asked: str | None) -> torch.device:
    """The device asked for; by default the accelerator, else the CPU. Raises RecipeError for one that is not there."""
    if asked is None:
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(asked)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(f"--device {asked}: not on this machine ({reason})") from error
    return device


def _common(settings: Sequence[Mapping[str, object]]) -> dict[str, object]:
    """What is set alike for all tasks of a group."""
    first = settings[0] if settings else {}
    return {name: value for name, value in first.items() if all(other.get(name) == value for other in settings)}


def _place(subject: Subject) -> str:
    return subject.name if subject.scored.step is None else f"{subject.name} (step {subject.scored.step:,})"


def _questions(how: Asking, asked: AskedTask) -> str:
    count = f"{how.limit:,} of {asked.questions:,}" if how.limit else f"{asked.questions:,}"
    return f"{count} questions, {how.shots}-shot{', in the chat template' if how.chat_template else ''}"


def _reason(error: Exception, task: str, settings: Eval) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return f"{task}: out of memory; lower eval.batch_size (now {settings.batch_size})"
    text = str(error)
    return text if text.startswith(task) else f"{task}: {text}"
