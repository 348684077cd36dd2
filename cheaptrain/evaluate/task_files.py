"""A folder of lm-eval task files, read strictly before lm-eval reads it.

lm-eval skips a file that is not YAML, and of two tasks with one name it silently takes the first: whoever made the slip
gets the numbers of something else. Here every file of the folder is read, and all that is wrong is said at once, each
with its file and line. The other trap is where `data_files` count from: lm-eval takes the folder that one happens to
stand in. `overlay` writes files that include the given ones and name their data by absolute paths, so the folder stays
as it is and works from anywhere.
"""

import glob
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cheaptrain.errors import RecipeError

_IGNORED = {"__pycache__", ".ipynb_checkpoints"}
_REMOTE = ("://", "hf:")


@dataclass(frozen=True)
class TaskFile:
    """One task or group: its file, and what the file says with everything it includes."""

    name: str
    path: Path
    is_group: bool
    content: Mapping[str, Any]

    @property
    def data_files(self) -> list[str]:
        """What it reads, as written; empty where it names no local files."""
        given = (self.content.get("dataset_kwargs") or {}).get("data_files")
        return [] if self.is_group else [name for name in _texts(given) if not any(sign in name for sign in _REMOTE)]


def read_task_folder(folder: Path) -> dict[str, TaskFile]:
    """Every task and group in `folder` and below, by name. Raises RecipeError with all that is wrong."""
    if not folder.is_dir():
        raise RecipeError(f"task_folder: there is no folder {folder}")
    problems: list[str] = []
    read: dict[Path, dict[str, Any]] = {}
    for path in sorted(folder.glob("**/*.yaml")):
        if not _IGNORED & set(path.parts):
            try:
                read[path] = _read(path, ())
            except RecipeError as error:
                problems.append(str(error))
    included = {path for content in read.values() for path in content.get(_INCLUDED, ())}
    found: dict[str, TaskFile] = {}
    for path, content in read.items():
        name = content.get("group", content.get("task"))
        if not isinstance(name, str):
            if path.resolve() not in included:
                problems.append(f'{path}: names no task; write "task: NAME", or "group: NAME" for several')
        elif name in found:
            problems.append(f"{path}: the task {name!r} is there already, in {found[name].path}; rename one of them")
        else:
            problems += [f"{path}: {problem}" for problem in _wrong(content)]
            found[name] = TaskFile(name, path, "group" in content, content)
    if not found and not problems:
        problems.append(f"task_folder: there is no task (*.yaml) in {folder}")
    if problems:
        raise RecipeError("\n".join(problems))
    return found


def overlay(files: Sequence[TaskFile], folder: Path, data_folder: Path | None, into: Path) -> None:
    """Write a file into `into` for each of `files`, which includes it and finds its data.

    Relative names count from `data_folder`; without one from the first of these where they are: `folder`, the one
    around it, the current one. What is nowhere stays as it is written: see `missing_data`.
    """
    for number, file in enumerate(files):
        content: dict[str, Any] = {"include": str(file.path.resolve())}
        content |= {key: file.content[key] for key in ("group", "task") if key in file.content}
        home = data_home(file, folder, data_folder)
        if home is not None and file.data_files:
            kwargs = dict(file.content["dataset_kwargs"])
            content["dataset_kwargs"] = kwargs | {"data_files": _absolute(kwargs["data_files"], home)}
        (into / f"{number:04d}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")


def missing_data(file: TaskFile, folder: Path, data_folder: Path | None) -> str | None:
    """Which data of a task is nowhere, and where it was looked for; None when all is there."""
    if data_home(file, folder, data_folder) is not None:
        return None
    homes = _homes(folder, data_folder)
    lacking = next(name for name in file.data_files if not _there(homes[0], name))
    return (
        f"{file.path}: data file {lacking} is not in {', '.join(map(str, dict.fromkeys(homes)))}; set data_folder to "
        "where the names count from"
    )


def data_home(file: TaskFile, folder: Path, data_folder: Path | None) -> Path | None:
    """The folder from which all data files of the task count; None when there is none."""
    homes = _homes(folder, data_folder)
    return next((home for home in homes if all(_there(home, name) for name in file.data_files)), None)


def _homes(folder: Path, data_folder: Path | None) -> list[Path]:
    return [data_folder.resolve()] if data_folder else [folder.resolve(), folder.resolve().parent, Path.cwd()]


def _there(home: Path, name: str) -> bool:
    return (home / name).exists() or any(glob.iglob(str(home / name)))


_INCLUDED = "__included__"


class _Loader(yaml.SafeLoader):
    """YAML of tasks: `!function module.name` stays a text, nothing is imported."""


_Loader.add_constructor("!function", lambda loader, node: f"!function {loader.construct_scalar(node)}")


def _read(path: Path, outer: tuple[Path, ...]) -> dict[str, Any]:
    """The content of a file with all it includes; its own keys count more."""
    where = f" (included by {outer[-1]})" if outer else ""
    if path.resolve() in outer:
        raise RecipeError(f"{path}{where}: includes itself")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except OSError as error:
        raise RecipeError(f"{path}{where}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}{where}: is not UTF-8 text") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        what = " ".join(str(getattr(error, "problem", None) or error).split())
        raise RecipeError(f"{path}{line}{where}: is not YAML: {what}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{path}{where}: holds no table of keys")
    includes = content.pop("include", [])
    merged: dict[str, Any] = {_INCLUDED: []}
    for name in includes if isinstance(includes, list) else [includes]:
        inner = path.parent / str(name)
        below = _read(inner, (*outer, path.resolve()))
        merged |= below | {_INCLUDED: [*merged[_INCLUDED], inner.resolve(), *below[_INCLUDED]]}
    return merged | content


def _wrong(content: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the keys of a task, as far as lm-eval would not say so, or only after the model is loaded."""
    if "group" in content:
        if not content.get("task"):
            yield f"the group {content['group']!r} has no tasks"
        return
    if "class" in content:
        return
    kind = content.get("output_type", "generate_until")
    if kind not in _OUTPUT_TYPES:
        yield f"output_type: {kind!r} is none of {', '.join(_OUTPUT_TYPES)}"
    metrics = content.get("metric_list", "default")
    if metrics == "default":
        return
    if not isinstance(metrics, list) or not metrics:
        yield "metric_list: the task has no metric, so nothing would be measured"
    elif any(not isinstance(metric, dict) or "metric" not in metric for metric in metrics):
        yield 'metric_list: an entry names no metric; write "- metric: acc"'


_OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner)


def _absolute(value: Any, home: Path) -> Any:
    if isinstance(value, str):
        return value if any(sign in value for sign in _REMOTE) else str(home / value)
    if isinstance(value, Mapping):
        return {key: _absolute(inner, home) for key, inner in value.items()}
    return [_absolute(inner, home) for inner in value]
