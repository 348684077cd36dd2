"""report.json: everything a page shows, as plain JSON values, so that nobody has to read a number off a picture.

The page is drawn from this and from nothing else, so the two cannot say different things. Environment variables of a
recipe may hold secrets, and reports are passed on: values of those that sound like one are left out.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from statistics import NormalDist, median
from typing import Any

import cheaptrain
from cheaptrain.errors import CheaptrainError
from cheaptrain.evaluate.results import Evaluation, Item, Metric, TaskResult, read_items
from cheaptrain.evaluate.sums import Marks
from cheaptrain.recipe import variables
from cheaptrain.report.account import GPU_MEMORY, Account
from cheaptrain.report.data_read import data_read
from cheaptrain.report.noticed import noticed
from cheaptrain.report.ways import Way, by_task, newest_by_way

FORMAT, VERSION = "cheaptrain report", 1


def report_content(accounts: Sequence[Account]) -> dict[str, Any]:
    """The content for stages in order. Plain JSON values; numbers that are not finite become None."""
    stages = [_stage(account) for account in accounts]
    content = {
        "format": FORMAT,
        "version": VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "cheaptrain": cheaptrain.__version__,
        "title": accounts[-1].name,
        "stages": stages,
        "together": _together(stages),
        "scores": _scores(accounts),
        "noticed": noticed(accounts),
        "prompts": _prompts(accounts),
        "shown": _shown(accounts),
    }
    finite: dict[str, Any] = _finite(content)
    return finite


def _stage(account: Account) -> dict[str, Any]:
    status = account.status
    return {
        "name": account.name,
        "state": status.state,
        "run": str(account.run.path),
        "recipe_file": status.recipe or (account.launches[-1].get("recipe") if account.launches else None),
        "made_from": dict(status.made_from),
        "checkpoint": status.checkpoint,
        "parameters": account.parameters or account.planned.get("parameters"),
        "offset_tokens": account.offset,
        "asked": _asked(account),
        "happened": _happened(account),
        "loss": _first_and_last(account, "train/loss"),
        "validation": _validation(account),
        "distillation": {key: _first_and_last(account, f"kd/{key}") for key in ("loss", "agreement")},
        "data": data_read(account),
        "marks": {"before": _marks(account.marks[0]), "after": _marks(account.marks[1])},
        "evaluations": [_evaluation(evaluation) for evaluation in account.evaluations],
        "batches": list(account.ledger.get("batches") or []),
        "launches": [{key: launch.get(key) for key in _OF_LAUNCH} for launch in account.launches],
        "environment": _environment(account),
        "settings": list(_settings(account)),
        "recipe": _without_secrets(account.recipe),
    }


_OF_LAUNCH = (
    "began", "ended", "exit_code", "reason", "host", "processes", "from_step", "first_step", "attention",
)  # fmt: skip
_OF_ENVIRONMENT = (
    "cheaptrain", "python", "packages", "cuda", "device", "gpus", "cpus", "memory_bytes", "system", "code", "folder",
)  # fmt: skip


def _environment(account: Account) -> dict[str, Any] | None:
    """Of the last launch that recorded one."""
    told = next((env for launch in reversed(account.launches) if (env := launch.get("environment"))), None)
    return {key: told.get(key) for key in _OF_ENVIRONMENT} if told else None


def _asked(account: Account) -> dict[str, Any]:
    plan, status = account.planned, account.status
    return {
        "steps": plan.get("steps") or status.steps,
        "tokens": plan.get("tokens") or status.tokens_in_all,
        "seconds": plan.get("seconds"),
        "tokens_per_second": plan.get("tokens_per_second"),
        "speed_from": plan.get("speed_from"),
        "memory_bytes": plan.get("memory_bytes"),
        "checkpoint_bytes": (plan.get("disk_bytes") or {}).get("checkpoints"),
        "dollars": plan.get("dollars"),
        "device": plan.get("device"),
        "processes": plan.get("processes"),
        "layout": plan.get("layout"),
        "flops": plan.get("flops"),
    }


def _happened(account: Account) -> dict[str, Any]:
    speeds = account.metrics["train/tokens_per_second"].finite.values
    mfu = account.metrics["train/mfu"].finite.values
    memory, process_seconds = account.memory, account.process_seconds
    price, per_token = account.planned.get("dollars_per_gpu_hour"), account.planned.get("flops_per_token")
    return {
        "steps": account.steps,
        "tokens": account.tokens,
        "supervised_tokens": account.metrics.last("train/supervised_tokens"),
        "seconds": account.train_seconds,
        "wall_seconds": account.wall_seconds,
        "tokens_per_second": median(speeds) if len(speeds) else None,
        "mfu": median(mfu) if len(mfu) else None,
        "memory_bytes": memory[1] if memory else None,
        "memory_of": None if memory is None else "GPU" if memory[0] == GPU_MEMORY else "main process",
        "checkpoint_bytes": account.checkpoint_bytes,
        "dollars": None if process_seconds is None or price is None else process_seconds / 3600 * price,
        "processes": account.processes,
        "flops": per_token * account.tokens if per_token else None,
        "skipped_steps": int((account.metrics["train/loss"].values != account.metrics["train/loss"].values).sum()),
    }


def _first_and_last(account: Account, name: str) -> dict[str, Any] | None:
    column = account.metrics[name].finite
    if not len(column):
        return None
    return {"first": float(column.values[0]), "last": float(column.values[-1]), "step": int(column.steps[-1])}


def _validation(account: Account) -> dict[str, Any]:
    """By source, and of all under "all": loss and bits a byte, before and after."""
    names = [name for name in account.metrics.columns if name.startswith("val/") and name.endswith("/loss")]
    sources = [name.removeprefix("val/").removesuffix("/loss") for name in names if name != "val/loss"]
    found = {}
    for label, prefix in [("all", "val/"), *((source, f"val/{source}/") for source in sources)]:
        scores = {key: _first_and_last(account, f"{prefix}{key}") for key in ("loss", "bpb")}
        if any(scores.values()):
            found[label] = scores
    return found


def _marks(marks: Marks | None) -> dict[str, Any] | None:
    if marks is None:
        return None
    low, high = _interval(marks.right, marks.asked)
    return {**asdict(marks), "share": marks.right / marks.asked, "low": low, "high": high}


def _interval(right: int, asked: int) -> tuple[float, float]:
    """Between which shares the true one lies, 95 times of 100 (Wilson): the plain standard error is 0 where none or all
    are right, as if one knew."""
    z = NormalDist().inv_cdf(0.975)
    share, scale = right / asked, 1 + z**2 / asked
    middle = (share + z**2 / (2 * asked)) / scale
    half = z * math.sqrt(share * (1 - share) / asked + z**2 / (4 * asked**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {
        **asdict(evaluation.checkpoint),
        "folder": str(evaluation.folder),
        "tasks": {task: _result(result) for task, result in evaluation.newest().items()},
    }


def _result(result: TaskResult) -> dict[str, Any]:
    return {key: value for key, value in asdict(result).items() if key not in ("items", "results", "task")}


def _scores(accounts: Sequence[Account]) -> dict[str, Any]:
    """The last evaluation of each stage, side by side: for each way a task was asked a row for each of its metrics, the
    main one first. `asked` tells in words what the row's columns do not."""
    scored = [(account.name, account.evaluations[-1]) for account in accounts if account.evaluations]
    columns = [{"stage": name, "step": evaluation.checkpoint.step} for name, evaluation in scored]
    names, found = [name for name, _ in scored], [newest_by_way(evaluation) for _, evaluation in scored]
    rows = [
        row
        for task, ways in by_task(result for one in found for result in one.values()).items()
        for way in ways
        for row in _rows(
            task, way, ways, [(name, one.get((task, way))) for name, one in zip(names, found, strict=True)]
        )
    ]
    members = {member for one in found for result in one.values() for member in result.members}
    return {"columns": columns, "rows": [row | {"member": row["task"] in members} for row in rows]}


def _rows(
    task: str, way: Way, ways: Sequence[Way], asked: Sequence[tuple[str, TaskResult | None]]
) -> Iterator[dict[str, Any]]:
    """Of one way to ask a task; `asked`: the stages, each with its result, where it was asked so."""
    results = [(stage, result) for stage, result in asked if result is not None]
    metrics = {(metric.name, metric.filter): metric for _, result in reversed(results) for metric in result.metrics}
    main = results[-1][1].metrics[0]
    baselines = [result.baseline for _, result in results if result.baseline is not None]
    notes = [f"{stage}: {note}" if len(asked) > 1 else note for stage, result in results for note in result.notes]
    for metric in metrics.values():
        is_main = (metric.name, metric.filter) == (main.name, main.filter)
        yield {
            "task": task,
            "metric": metric.name if metric.filter == "none" else f"{metric.name}, {metric.filter}",
            "main": is_main,
            "higher_is_better": metric.higher_is_better,
            "baseline": baselines[-1] if baselines and is_main else None,
            "notes": notes,
            "version": way.version,
            "shots": way.shots,
            "limit": way.limit,
            "limited": way.limited,
            "chat_template": way.chat_template,
            "system": way.system,
            "asked": way.told(ways, columns=True),
            "cells": [_cell(result, metric) for _, result in asked],
        }


def _cell(result: TaskResult | None, metric: Metric) -> dict[str, Any] | None:
    for found in result.metrics if result is not None else ():
        if result is not None and (found.name, found.filter) == (metric.name, metric.filter):
            return {"value": found.value, "stderr": found.stderr, "n": result.n}
    return None


def _settings(account: Account) -> Iterator[dict[str, Any]]:
    """What of the recipe is not as it is by default: key, value, and where it was written."""
    origins = account.kept.get("provenance") or {}
    for key, value in _leaves(account.recipe):
        origin = origins.get(key) or _origin_above(key, origins)
        if origin not in (None, "default"):
            shown = variables.shown(key, value) if key.startswith("env.") else value
            yield {"key": key, "value": shown, "from": origin}


def _origin_above(key: str, origins: Mapping[str, str]) -> str | None:
    """Of a table that was written in one place, such as `model.overrides`."""
    while "." in key:
        key = key.rpartition(".")[0]
        if key in origins:
            return origins[key]
    return None


def _leaves(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
            for item in value:
                yield from _leaves(item, f"{prefix}{key}.{item['name']}.")
        elif isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            yield f"{prefix}{key}", value


def _without_secrets(recipe: Mapping[str, Any]) -> dict[str, Any]:
    shown: dict[str, Any] = json.loads(json.dumps(recipe))
    if isinstance(shown.get("env"), dict):
        shown["env"] = {key: variables.shown(key, value) for key, value in shown["env"].items()}
    return shown


def _together(stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of all stages: sums, where every stage that ran says something."""
    happened = [stage["happened"] for stage in stages if stage["happened"]["steps"]]

    def total(key: str) -> float | None:
        values = [one[key] for one in happened]
        return sum(values) if values and all(value is not None for value in values) else None

    return {key: total(key) for key in ("tokens", "steps", "seconds", "wall_seconds", "dollars", "flops")}


def _prompts(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """Each prompt with what was written to it: first of all by the first stage that was asked, then by every stage in
    the end."""
    prompts: dict[str, list[dict[str, Any]]] = {}
    for account in accounts:
        written: dict[str, list[Mapping[str, Any]]] = {}
        for sample in account.samples:
            if isinstance(sample.get("prompt"), str):
                written.setdefault(sample["prompt"], []).append(sample)
        for prompt, samples in written.items():
            before = prompt not in prompts or account.offset == 0
            told = [samples[0], samples[-1]] if before and len(samples) > 1 else [samples[-1]]
            prompts.setdefault(prompt, []).extend(
                {"stage": account.name, "step": sample["step"], "text": str(sample.get("text", ""))} for sample in told
            )
    return [{"prompt": prompt, "written": written} for prompt, written in prompts.items()]


def _shown(accounts: Sequence[Account]) -> list[dict[str, Any]]:
    """What the last stage that was asked wrote in tasks that are there to be read."""
    for account in reversed(accounts):
        for evaluation in reversed(account.evaluations):
            read = [result for result in evaluation.newest().values() if result.shown]
            if read:
                return [
                    {
                        "task": result.task,
                        "stage": account.name,
                        "step": evaluation.checkpoint.step,
                        "written": [
                            {"prompt": item.extra.get("prompt"), "text": item.answer}
                            for item in _items(evaluation, result)
                        ],
                    }
                    for result in read
                ]
    return []


def _items(evaluation: Evaluation, result: TaskResult) -> list[Item]:
    try:
        return read_items(evaluation, result)
    except CheaptrainError:
        return []  # only to be read


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.item() if hasattr(value, "item") else value
