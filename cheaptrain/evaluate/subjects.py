"""What is to be scored: checkpoints, by folder, run, recipe or hub id, each with the hash of its bytes.

A score is worth nothing without knowing of what. Weights, configuration and tokenizer are hashed here, and a checkpoint
of ours is checked against its manifest on the way: a damaged one is refused and not scored.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from pydantic import ValidationError

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.state_files import stored_tensors
from cheaptrain.checkpoint.verify import verify_init_from
from cheaptrain.errors import RecipeError
from cheaptrain.evaluate.results import Scored, evaluation_folder
from cheaptrain.model.hub import fetch_model
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.overrides import split_arguments
from cheaptrain.recipe.schema import Eval, Model

OUTPUTS = Path("outputs/eval")


@dataclass(frozen=True)
class Subject:
    """A checkpoint, by the name it was asked for, and where its results go."""

    name: str
    checkpoint: Path
    folder: Path
    scored: Scored


@dataclass(frozen=True)
class Asked:
    """What one argument means: checkpoints oldest first, the run they are of, and the [eval] that is theirs."""

    name: str
    checkpoints: tuple[Path, ...]
    run: RunDirectory | None
    settings: Eval


def asked_for(arguments: Sequence[str], *, every: bool) -> list[Asked]:
    """The checkpoints meant by `arguments`: folders, runs, recipes (and keys to override), hub ids. Of a run its last
    one, or with `every` all that are there. Raises RecipeError or PreflightError for what is not there."""
    paths, overrides = split_arguments(arguments)
    if not paths:
        raise RecipeError("name at least one checkpoint, run or recipe, e.g. outputs/quickstart/phase2")
    recipes = [path for path in paths if Path(path).is_file()]
    if overrides and not recipes:
        raise RecipeError(f"{overrides[0]}: a key goes with a recipe, and none is named")
    found = []
    for path in paths:
        if path in recipes:
            recipe = load_recipe(path, overrides).recipe
            run = RunDirectory(Path(recipe.run.dir))
            found.append(Asked(path, _of_run(run, every), run, recipe.eval))
        elif (Path(path) / "config.json").is_file():
            if every:
                raise RecipeError(f"--all-checkpoints: {path} is one checkpoint; name its run")
            found.append(Asked(path, (Path(path),), None, settings_of(Path(path))))
        elif Path(path).is_dir():
            run = RunDirectory(Path(path))
            found.append(Asked(path, _of_run(run, every), run, settings_of(run.path)))
        elif path.count("/") > 1 or path.startswith((".", "/", "~")) or path.endswith(".toml"):
            raise RecipeError(f"{path}: there is no such recipe, run or checkpoint")
        else:
            fetched = fetch_model(Model(init_from=path))
            assert fetched is not None
            found.append(Asked(path, (fetched,), None, Eval()))
    return found


def subject_of(checkpoint: Path, name: str, output: Path | None = None) -> Subject:
    """The checkpoint in a folder, hashed. Raises PreflightError when it is damaged or holds no safetensors weights."""
    origin = verify_init_from(checkpoint, key="eval")
    parameters = sum(prod(entry.shape) for entry in stored_tensors(origin.path).values())
    scored = Scored(str(origin.path), origin.fingerprint, origin.step, origin.tokens_seen, parameters)
    last = origin.path.name if checkpoint.name != "final" else checkpoint.absolute().parent.name
    outside = OUTPUTS / f"{name.strip('/').replace('/', '-') if not checkpoint.is_dir() else last}-{scored.hash[:12]}"
    return Subject(name, origin.path, output or evaluation_folder(origin.path) or outside, scored)


def settings_of(folder: Path) -> Eval:
    """[eval] of the run that `folder` is, or is a checkpoint of; all defaults for one that is nobody's, or whose recipe
    another version wrote."""
    for place in (folder, folder.resolve()):
        try:
            kept = json.loads((place / "recipe.json").read_text(encoding="utf-8"))
            return Eval.model_validate(kept["recipe"].get("eval", {}))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ValidationError):
            continue
    return Eval()


def _of_run(run: RunDirectory, every: bool) -> tuple[Path, ...]:
    steps = tuple(run.steps())
    if every and steps:
        return steps
    if not run.path.is_dir() or not (steps or run.recipe.exists()):
        raise RecipeError(f"{run.path}: no run and no checkpoint: there is neither config.json nor recipe.json in it")
    if not steps:
        raise RecipeError(f"{run.path}: the run has no checkpoint yet")
    if not (run.final / "config.json").is_file():
        raise RecipeError(
            f"{run.path}: the run is not finished; name one of its checkpoints, e.g. {steps[-1]}, or --all-checkpoints"
        )
    return (run.final,)
