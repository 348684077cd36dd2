"""What is held against what: from the words of a command line to runs, grouped by what they are seeds of.

A side is one run, one checkpoint, or several runs of one recipe with different seeds. Seeds of a recipe are known by
their folders (`RUN-seed1`, `RUN-seed2`, as `--seeds` makes them), or named together: a folder of runs, a pattern, or
`name=run1,run2`. The trap is a mean over runs that are not the same experiment, so the runs of one side must have the
same recipe but for seed and folder, and if they have not it is refused with the keys in which they differ.
"""

import glob
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory, step_of
from cheaptrain.checkpoint.rundir import read_run
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError
from cheaptrain.evaluate.results import EVAL, Evaluation, evaluation_folder, holding_evaluations, read_evaluation
from cheaptrain.recipe.identity import leaves
from cheaptrain.recipe.parents import PARENT_KEYS

_SEEDED = re.compile(r"(.+)-seed(\d+)")
Report = Callable[[str], None]


@dataclass(frozen=True)
class Member:
    """One run, up to `step` (None: to its end), or one checkpoint that is of no run. `kept`: what its recipe.json
    holds, {} where there is none; `evaluation`: what was scored of it, None where nothing was."""

    name: str
    path: Path
    run: RunDirectory | None = None
    step: int | None = None
    kept: dict[str, Any] | None = None
    evaluation: Evaluation | None = None

    @property
    def seed(self) -> int | None:
        seed = (self.kept or {}).get("identity", {}).get("seed")
        return seed if isinstance(seed, int) else None


@dataclass(frozen=True)
class Side:
    """What stands in one column: its runs are seeds of one recipe."""

    name: str
    members: tuple[Member, ...]

    @property
    def seeds(self) -> list[int | None]:
        return [member.seed for member in self.members]


def sides_of(what: Sequence[str], report: Report) -> list[Side]:
    """The sides that `what` names, in order. What cannot be read of one goes to `report`.

    Raises RecipeError for a path that is not there or holds nothing to compare, for fewer than two sides, and for a
    side whose runs are not seeds of one recipe.
    """
    named = [_named(text, report) for text in what]
    sides = _gathered(named)
    if len(sides) < 2:
        raise RecipeError(f"compare takes two or more; {', '.join(what) or 'nothing'} is one: name another beside it")
    for side in sides:
        _refuse_strangers(side)
    return _told_apart(sides)


def _named(text: str, report: Report) -> Side:
    """The side of one word of the command line."""
    path = Path(text)
    name, equals, listed = text.partition("=")
    if equals and not path.exists():
        paths = [Path(part.strip()) for part in listed.split(",") if part.strip()]
        if not paths:
            raise RecipeError(f"{text}: no run is named; write name=run1,run2")
        return Side(name, tuple(_member(member, report) for member in paths))
    if path.suffix == ".toml" and path.is_file():
        from cheaptrain.recipe.load import load_recipe

        path = Path(load_recipe(text, []).recipe.run.dir)
    if any(sign in text for sign in "*?["):
        found = sorted(Path(match) for match in glob.glob(text) if Path(match).is_dir())
        if not found:
            raise RecipeError(f"{text}: no folder matches")
        return Side(path.name.rstrip("*-_.") or text, tuple(_member(folder, report) for folder in found))
    if not path.exists():
        seeds = _seeds_of(path)
        if not seeds:
            raise RecipeError(f"{path}: there is no such run, checkpoint or recipe")
        return Side(path.name, tuple(_member(folder, report) for folder in seeds))
    if path.is_dir() and not (_is_run(path) or _is_scored(path) or _is_model(path)):
        below = [folder for folder in _by_number(path.iterdir()) if _is_run(folder) or _is_scored(folder)]
        if below:
            return Side(path.name, tuple(_member(folder, report) for folder in below))
    member = _member(path, report)
    return Side(member.name, (member,))


def _member(path: Path, report: Report) -> Member:
    if _is_run(path):
        run = RunDirectory(path)
        return Member(path.resolve().name, path, run, None, _kept(run, report), _newest(run, report))
    folder = path if _is_scored(path) else evaluation_folder(path)
    if folder is None and _is_model(path):
        from cheaptrain.evaluate.subjects import subject_of  # takes seconds to import

        folder = subject_of(path, str(path)).folder
    around = _run_around(path)
    evaluation = _evaluation(folder, report) if folder and _is_scored(folder) else None
    if around is None and evaluation is None:
        raise RecipeError(
            f"{path}: neither a run nor a checkpoint that was scored: name a run folder, or score it first with "
            f"`cheaptrain eval {path}`"
        )
    name, step = path.resolve().name, step_of(path.resolve())
    if around is None:
        return Member(name, path, evaluation=evaluation)
    return Member(f"{around.path.name}/{name}", path, around, step, _kept(around, report), evaluation)


def _newest(run: RunDirectory, report: Report) -> Evaluation | None:
    """Of the last checkpoint that was scored; one that cannot be read is passed over and told."""
    found = None
    try:
        holding, stale = holding_evaluations(run)
        for evaluation in stale:
            report(f"{evaluation.folder}: scored of other weights than the checkpoint has now, and left out")
        for evaluation in holding:
            found = evaluation if evaluation.results else found
    except CheaptrainError as error:
        report(str(error))
    return found


def _evaluation(folder: Path, report: Report) -> Evaluation | None:
    try:
        return read_evaluation(folder)
    except CheaptrainError as error:
        report(str(error))
        return None


def _kept(run: RunDirectory, report: Report) -> dict[str, Any] | None:
    try:
        return read_run(run)
    except FileNotFoundError:
        report(f"{run.recipe} is not there: the recipe of {run.path.name} is not compared")
    except (PreflightError, OSError, UnicodeDecodeError) as error:
        report(f"{error}; the recipe of {run.path.name} is not compared")
    return None


def _is_run(path: Path) -> bool:
    """A checkpoint has a recipe.json too, and a manifest beside it."""
    signs = (RunDirectory(path).metrics, RunDirectory(path).checkpoints, RunDirectory(path).launch)
    return path.is_dir() and not (path / "manifest.json").exists() and any(sign.exists() for sign in signs)


def _is_scored(path: Path) -> bool:
    return (path / EVAL).is_file()


def _is_model(path: Path) -> bool:
    return (path / "config.json").is_file()


def _run_around(path: Path) -> RunDirectory | None:
    """RUN of RUN/checkpoints/step-000100 and RUN/eval/step-000100."""
    folder = path.resolve()
    inside = step_of(folder) is not None and folder.parent.name in ("checkpoints", "eval")
    return RunDirectory(folder.parent.parent) if inside and _is_run(folder.parent.parent) else None


def _seeds_of(path: Path) -> list[Path]:
    """RUN-seed1, RUN-seed2, … beside where RUN would be."""
    if not path.parent.is_dir():
        return []
    matches = ((folder, _SEEDED.fullmatch(folder.name)) for folder in path.parent.iterdir() if folder.is_dir())
    return _by_number(folder for folder, match in matches if match and match.group(1) == path.name)


def _by_number(folders: Iterator[Path]) -> list[Path]:
    """Sorted, seed 10 after seed 9."""
    return sorted(folders, key=lambda folder: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", folder.name)])


def _gathered(sides: Sequence[Side]) -> list[Side]:
    """Runs named one by one that `--seeds` made of one recipe become one side, unless that would leave only one."""
    groups: dict[Path | int, list[Side]] = {}
    for number, side in enumerate(sides):
        groups.setdefault(_stem(side) or number, []).append(side)
    if len(groups) < 2:
        return list(sides)
    gathered = []
    for stem, members in groups.items():
        together = tuple(member for side in members for member in side.members)
        gathered.append(Side(stem.name, together) if isinstance(stem, Path) and len(members) > 1 else members[0])
    return gathered


def _stem(side: Side) -> Path | None:
    """Where the seeds of a lone run lie; None when `--seeds` did not make it."""
    member = side.members[0]
    match = _SEEDED.fullmatch(member.path.resolve().name)
    if len(side.members) > 1 or match is None or member.step is not None or member.seed != int(match.group(2)):
        return None
    return member.path.resolve().with_name(match.group(1))


def _refuse_strangers(side: Side) -> None:
    paths = [member.path.resolve() for member in side.members]
    if twice := next((path for path in paths if paths.count(path) > 1), None):
        raise RecipeError(f"{side.name}: {twice} is named twice")
    known = [(member, leaves_of(member)) for member in side.members if member.kept]
    for member, recipe in known[1:]:
        first, one = known[0]
        if different := sorted(key for key in one.keys() | recipe.keys() if one.get(key) != recipe.get(key)):
            raise RecipeError(
                f"{side.name}: {first.name} and {member.name} are not seeds of one recipe, they differ in "
                f"{', '.join(different[:6])}{' …' if len(different) > 6 else ''}: name them apart"
            )


def leaves_of(member: Member) -> dict[str, Any]:
    """The identity of a run, dotted key → value, without the seed and without what follows from it: in paths
    `-seed1` becomes `-seed*`."""
    found = leaves((member.kept or {}).get("identity", {}))
    found.pop("seed", None)
    pattern = re.compile(rf"-seed{member.seed}(?=/|$)")
    paths = (*PARENT_KEYS.values(), "tokenizer.path")
    return {key: pattern.sub("-seed*", v) if key in paths and isinstance(v, str) else v for key, v in found.items()}


def _told_apart(sides: Sequence[Side]) -> list[Side]:
    """No two of a name: as many folders before it as it takes."""
    names = [side.name for side in sides]
    if len(set(names)) == len(names):
        return list(sides)
    whole = [_place(side) for side in sides]
    for depth in range(2, max(len(path.parts) for path in whole) + 1):
        names = ["/".join(path.parts[-depth:]).lstrip("/") for path in whole]
        if len(set(names)) == len(names):
            return [replace(side, name=name) for side, name in zip(sides, names, strict=True)]
    return [replace(side, name=f"{side.name} ({number})") for number, side in enumerate(sides, 1)]


def _place(side: Side) -> Path:
    """Where its run lies; of several seeds, where the run would be that they are seeds of."""
    path = side.members[0].path.resolve()
    match = _SEEDED.fullmatch(path.name)
    return path.with_name(match.group(1)) if match and len(side.members) > 1 else path
