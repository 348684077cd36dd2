"""What somebody asks the status of: recipes, run folders, a folder with runs in it, or all there are."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.errors import RecipeError
from cheaptrain.recipe.load import LoadedRecipe, load_recipes
from cheaptrain.recipe.overrides import split_arguments

OUTPUTS = Path("outputs")


@dataclass(frozen=True)
class Subject:
    """A run, started or not, and the recipe it was asked by, if it was asked by one."""

    name: str
    run: RunDirectory
    loaded: LoadedRecipe | None = None


def subjects_of(what: Sequence[str]) -> list[Subject]:
    """The runs meant by `what`, each once: recipes (and keys to override), run folders, folders with runs below them;
    without any, all runs below outputs/. Raises RecipeError for a path that is not there, or a recipe that is wrong."""
    paths, overrides = split_arguments(what)
    recipes = [path for path in paths if not Path(path).is_dir()]
    if missing := [path for path in recipes if not Path(path).exists()]:
        raise RecipeError(f"{', '.join(missing)}: no such recipe or folder")
    loaded = dict(zip(recipes, load_recipes(recipes, overrides), strict=True))
    found: dict[Path, Subject] = {}
    for path in paths:
        if path in loaded:
            run = Path(loaded[path].recipe.run.dir)
            found[run.absolute()] = Subject(loaded[path].name, RunDirectory(run), loaded[path])
            continue
        for run in runs_below(Path(path)) or [Path(path)]:
            found.setdefault(run.absolute(), Subject(run.name, RunDirectory(run)))
    if not paths:
        found = {run.absolute(): Subject(run.name, RunDirectory(run)) for run in runs_below(OUTPUTS)}
    return list(found.values())


def run_of(checkpoint: Path) -> Path | None:
    """The run folder in which a checkpoint lies, by its path; None when it is nobody's run."""
    for folder in (checkpoint.parent, checkpoint.parent.parent):
        if (folder / "recipe.json").is_file() and (folder / "checkpoints").is_dir():
            return folder
    return None


def runs_below(folder: Path) -> list[Path]:
    """Folders of runs below `folder`, or itself, in the order in which they were started."""
    return sorted(_runs(folder), key=lambda run: (_began(run), str(run)))


def _runs(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if "recipe.json" in files or "checkpoints" in folders or ("lock" in files and "launch.json" in files):
            folders.clear()  # a run holds no runs, and checkpoints hold a recipe.json of their own
            yield Path(place)
        folders.sort()


def _began(run: Path) -> float:
    try:
        return (run / "recipe.json").stat().st_mtime
    except OSError:
        return float("inf")
