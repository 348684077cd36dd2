"""From names to tasks that can be asked, each with a hash of what it asks.

Names come from three places: the folder of the recipe, the tasks of cheaptrain, and lm-eval's own, which take five
seconds to list and are only listed when a name is in neither of the others. All of it is loaded, data included, before
any model is: a name or a file that is missing costs seconds and not the evaluation.

The trap is what makes two scores comparable. A version in a task file is raised by hand or forgotten, so the hash is
over the questions and the worked examples themselves, the keys of the task file, and the code beside it.
"""

import difflib
import hashlib
import inspect
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from cheaptrain.data import domain
from cheaptrain.durable import sha256_of
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.evaluate.quiet import quiet
from cheaptrain.evaluate.task_files import TaskFile, missing_data, overlay, read_task_folder
from cheaptrain.evaluate.task_folders import task_folders
from cheaptrain.recipe.schema import ALL_TASKS, Eval

PYTHON_SEED = 0  # of Python's `random`, as lm-eval has it


@dataclass(frozen=True, eq=False)
class AskedTask:
    """One task, loaded. `content`: hash of its questions, worked examples, file and code; `shots`: None where lm-eval
    counts none; `chat_template`: whether its file says it is to be asked in one (None: it says nothing)."""

    name: str
    task: Task
    version: str
    content: str
    questions: int
    shots: int
    chat_template: bool | None
    baseline: float | None
    shown: bool  # what it measures is to be read, not compared
    state: Any = field(repr=False)  # Python's and numpy's random state after loading, where some tasks go on drawing


@dataclass(frozen=True, eq=False)
class Suite:
    """What was asked for: the tasks, each once, and the groups with a mean of their own."""

    tasks: Mapping[str, AskedTask]
    groups: Mapping[str, Group]  # innermost first


def load_suite(settings: Eval, names: Sequence[str], tokenizer: Path | None = None, *, complete: bool = True) -> Suite:
    """Load the tasks called `names`, with their data. `tokenizer`: a folder, for tasks that count tokens; `complete`:
    whether `names` are all that the settings may speak of, so that shots of any other are a mistake.

    Raises RecipeError for a name that is unknown, a task file or folder that is wrong, data that is missing, and
    settings that a task does not take.
    """
    if not names:
        raise RecipeError("no task is named: give --tasks, or eval.tasks in the recipe")
    files = read_task_folder(Path(settings.task_folder)) if settings.task_folder else {}
    with tempfile.TemporaryDirectory(prefix="cheaptrain-tasks-") as folder:
        manager = _manager(settings, names, files, Path(folder), tokenizer)
        members = _members(manager, names)
        _refuse_missing(settings, files, members)
        tasks: dict[str, AskedTask] = {}
        groups: dict[str, Group] = {}
        for name in dict.fromkeys(names):
            with quiet(), random_state_kept():
                seed_all(PYTHON_SEED, settings.seed)
                loaded = _load(manager, name, files)
                for inner, task in loaded["tasks"].items():
                    if inner not in tasks:
                        entry = manager.task_index.get(inner)  # a group may define a task of its own
                        path = files[inner].path if inner in files else entry and entry.yaml_path
                        tasks[inner] = _asked(inner, task, path, settings, _groups_of(inner, name, loaded))
            for group in reversed(loaded.get("groups", {}).values()):
                groups.setdefault(group.name, group)
    unknown = settings.shots.keys() - tasks.keys() - groups.keys() - {ALL_TASKS, *members}
    if unknown and complete:
        raise RecipeError(f"eval.shots: no task asked for is called {sorted(unknown)[0]!r}")
    return Suite(tasks, {name: group for name, group in groups.items() if group.has_aggregation})


def seed_all(python: int, others: int) -> None:
    """Seed Python's random numbers with `python`, those of numpy and torch with `others`."""
    random.seed(python)
    np.random.seed(others)
    torch.manual_seed(others)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Within the block any random numbers may be drawn; after it all generators are where they were."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)


def _manager(
    settings: Eval, names: Sequence[str], files: Mapping[str, TaskFile], folder: Path, tokenizer: Path | None
) -> TaskManager:
    """Every name there is, as far as needed; those of the recipe's folder count more than lm-eval's."""
    home = Path(settings.task_folder or ".")
    overlay(list(files.values()), home, Path(settings.data_folder) if settings.data_folder else None, folder)
    own = [str(path) for path in task_folders() if path.is_dir()]
    metadata: dict[str, Any] = dict(settings.metadata)
    if tokenizer is not None:
        metadata["tokenizer"] = str(tokenizer)
    ours = TaskManager(include_path=[*own], include_defaults=False, metadata=metadata)
    if taken := sorted(files.keys() & set(ours.all_tasks)):
        raise RecipeError(f"{files[taken[0]].path}: cheaptrain has a task {taken[0]!r} already; rename yours")
    near = TaskManager(include_path=[*own, str(folder)], include_defaults=False, metadata=metadata)
    if set(_with_members(near, names)) <= set(near.all_tasks):
        return near
    every = TaskManager(include_path=[*own, str(folder)], include_defaults=True, metadata=metadata)
    unknown = [name for name in names if name not in every.all_tasks]
    if unknown:
        raise RecipeError("\n".join(_unknown(name, every.all_tasks) for name in unknown))
    return every


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, 3, cutoff=0.6)
    meant = f"did you mean {' or '.join(close)}?" if close else "`lm_eval ls tasks` lists those of lm-eval"
    return f"eval.tasks: no task or group is called {name!r}; {meant}"


def _members(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """The names, and those of the tasks and groups in them."""
    return list(dict.fromkeys(_with_members(manager, names)))


def _with_members(manager: TaskManager, names: Sequence[str], seen: tuple[str, ...] = ()) -> Iterator[str]:
    for name in names:
        yield name
        entry = manager.task_index.get(name)
        if entry is None or name in seen:
            continue
        inner = (entry.cfg or {}).get("task") if entry.kind.name == "GROUP" else sorted(entry.tags)
        if entry.kind.name in ("GROUP", "TAG") and isinstance(inner, list):
            named = [item if isinstance(item, str) else item.get("group", item.get("task")) for item in inner]
            known = [each for each in named if isinstance(each, str)]
            # A table with keys of its own may define a new one: lm-eval then finds it, or says what is wrong.
            defined = {item.get("task") for item in inner if isinstance(item, dict)}
            below = [each for each in known if each in manager.task_index or each not in defined]
            yield from _with_members(manager, below, (*seen, name))


def _refuse_missing(settings: Eval, files: Mapping[str, TaskFile], members: Sequence[str]) -> None:
    home = Path(settings.task_folder or ".")
    data = Path(settings.data_folder) if settings.data_folder else None
    problems = [missing_data(files[name], home, data) for name in members if name in files]
    if found := [problem for problem in problems if problem]:
        raise RecipeError("\n".join(found))


def _load(manager: TaskManager, name: str, files: Mapping[str, TaskFile]) -> Any:
    try:
        return manager.load([name])
    except CheaptrainError:
        raise
    except Exception as error:  # of lm-eval, datasets, jinja2, or the code of a task
        where = f"{files[name].path}: " if name in files else ""
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        raise RecipeError(f"{where}the task {name!r} cannot be loaded: {reason}") from error


def _groups_of(task: str, name: str, loaded: Any) -> list[str]:
    """The groups that `task` came in when `name` was loaded, innermost first, and `name` itself."""
    groups = [
        group.name
        for group in reversed(loaded.get("groups", {}).values())
        if task in {member.task_name for member in group.get_all_tasks()}
    ]
    return [*groups, name]


def _asked(name: str, task: Task, path: Path | None, settings: Eval, groups: Sequence[str]) -> AskedTask:
    state = (random.getstate(), np.random.get_state())
    documents = getattr(task, "task_docs", None)
    if documents is None:  # a task of its own class
        documents = task.eval_docs
    config = task.config
    metadata = config.metadata if isinstance(config.metadata, dict) else {}
    of_file = config.num_fewshot
    said_of = next((each for each in (name, *groups, ALL_TASKS) if each in settings.shots), None)
    shots = None if said_of is None else settings.shots[said_of]
    if shots is not None and of_file == 0 and shots != 0:
        if said_of != ALL_TASKS:
            raise RecipeError(f"eval.shots: the file of {name} says 0 and lm-eval never changes that; leave it out")
        shots = 0
    shots = (of_file or 0) if shots is None else shots
    examples = list(getattr(getattr(task, "sampler", None), "df", None) or ()) if shots else []
    if getattr(task, "UNSAFE_CODE", False):
        raise RecipeError(f"the task {name!r} runs code that the model writes; score it with `lm_eval` in a sandbox")
    measured = task.aggregation()
    if not measured:
        raise RecipeError(f"{path or name}: the task {name!r} has no metric, so nothing would be measured")
    return AskedTask(
        name=name,
        task=task,
        version=str(task.VERSION),
        content=_hash(_file_of(config), _code_of(task, path), documents, examples),
        questions=len(documents),
        shots=shots,
        chat_template=metadata.get("chat_template"),
        baseline=metadata.get("baseline"),
        shown=bool(metadata.get("shown")),
        state=state,
    )


def _file_of(config: Any) -> dict[str, Any]:
    """The keys of the task file, without where things are and what is a setting of ours."""
    left_out = {"num_fewshot", "dataset_kwargs", "metadata"}
    return {key: value for key, value in config.to_dict().items() if key not in left_out}


def _code_of(task: Task, path: Path | None) -> list[str]:
    """Hashes of the Python files beside the task's own and beside that of its class, unless it is lm-eval's, which has
    a version; for tasks of cheaptrain also of what reads their answers."""
    files = set(path.resolve().parent.glob("*.py")) if path else set()
    if not type(task).__module__.startswith("lm_eval."):
        files.update(Path(inspect.getfile(type(task))).resolve().parent.glob("*.py"))
    if path and any(path.resolve().is_relative_to(folder) for folder in task_folders()):
        files.add(Path(domain.__file__))
    return [sha256_of(file) for file in sorted(files)]


def _hash(*parts: Any) -> str:
    digest = hashlib.sha256()
    for part in parts:
        rows: Sequence[Any] = part if not isinstance(part, dict) else [part]
        digest.update(f"{len(rows)};".encode())
        for row in rows:
            digest.update(json.dumps(row, sort_keys=True, default=_plain, ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: Any) -> str:
    """A stable text of what JSON does not know. An address in memory is another one in each process."""
    if isinstance(value, Callable):  # type: ignore[arg-type]
        return getattr(value, "__qualname__", type(value).__qualname__)
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text
