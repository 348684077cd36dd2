"""`--seeds 1,2,3`: the same recipes once for each seed, each in run folders of its own.

Of every recipe a small one is written beside the folder of its run, `RUN-seed1.toml`: it extends the recipe and says
seed, run folder, and where the earlier stages of the same command lie for this seed. So a seed is a recipe like any
other: plan, status, launch and a launcher of somebody else take it. The trap is a chain in which the first stage has a
seed of its own and the second starts from somebody else's weights: whatever lies in a folder that one of the recipes
writes is renamed with it. Seeds are paired by being equal: two conditions with seed 1 draw the same weights, where the
shapes are the same, and read the rows of every source that is the same in both in the same order.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.load import LoadedRecipe, load_recipes
from cheaptrain.recipe.parents import written_in

_DEPTH = 2  # RUN/checkpoints/step-000100
_SET_HERE = ("seed", "run.dir", "model.init_from", "distill.teacher", "tokenizer.path")


def parse_seeds(text: str) -> list[int]:
    """`1,2,3`. Raises RecipeError for what is no list of different whole numbers."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdecimal() for part in parts) or len({int(part) for part in parts}) < len(
        parts
    ):
        raise RecipeError(f"--seeds {text}: write different whole numbers with commas between them, e.g. --seeds 1,2,3")
    return [int(part) for part in parts]


def seeded_recipes(paths: Sequence[str], overrides: Sequence[str], seed: int) -> list[str]:
    """Write the recipes of one seed; returns their paths. Raises RecipeError when an override would undo them."""
    for text in overrides:
        if (key := text.partition("=")[0].strip()) in _SET_HERE:
            raise RecipeError(f"--seeds says {key} for each seed: leave {text} out, or write it into the recipe")
    recipes = load_recipes(paths, overrides)
    return [_written(loaded, recipes, seed) for loaded in recipes]


def suffixed(folder: str, seed: int) -> str:
    """The run folder of one seed."""
    return f"{folder.rstrip('/')}-seed{seed}"


def _written(loaded: LoadedRecipe, recipes: Sequence[LoadedRecipe], seed: int) -> str:
    path = Path(suffixed(loaded.recipe.run.dir, seed) + ".toml")
    base = os.path.relpath(loaded.path, path.parent)
    lines = [f"# {loaded.path} with seed {seed}: written by --seeds, and again each time.", f"extends = {_toml(base)}"]
    lines += [f"seed = {seed}", "", "[run]", f"dir = {_toml(suffixed(loaded.recipe.run.dir, seed))}"]
    for table, key, value in _locations(loaded):
        if (run := _run_with_seeds(value, recipes, seed)) is not None:
            place = os.path.join(suffixed(run, seed), os.path.relpath(value, run))
            lines += ["", f"[{table}]", f"{key} = {_toml(place)}"]
    content = ("\n".join(lines) + "\n").encode()
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}-{os.getpid()}")
        temporary.write_bytes(content)
        os.replace(temporary, path)  # several machines of one run may write it at once
    return str(path)


def _run_with_seeds(place: str, recipes: Sequence[LoadedRecipe], seed: int) -> str | None:
    """The run folder in which `place` lies, without seed, when that run is made once for each seed: by this command, or
    by one before it that left its recipe or its folder for this seed."""
    owner = next((other.recipe.run.dir for other in recipes if written_in(place, other)), None)
    if owner is not None:
        return owner
    above = [place, *map(str, list(Path(place).parents)[:_DEPTH])]
    return next(
        (run for run in above if os.path.exists(suffixed(run, seed)) or os.path.exists(f"{suffixed(run, seed)}.toml")),
        None,
    )


def _locations(loaded: LoadedRecipe) -> Iterator[tuple[str, str, str]]:
    """(table, key, value) of what may lie in the run folder of another stage."""
    recipe = loaded.recipe
    for table, key, value in (
        ("model", "init_from", recipe.model.init_from),
        ("distill", "teacher", recipe.distill.teacher if recipe.distill else None),
        ("tokenizer", "path", recipe.tokenizer.path),
    ):
        if value is not None:
            yield table, key, value


def _toml(text: str) -> str:
    """A TOML string: JSON's escapes are TOML's."""
    return json.dumps(text, ensure_ascii=False)
