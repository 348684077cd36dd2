"""The models a stage is made from: the weights it starts from, and the teacher it learns from.

Each may be a folder that an earlier stage of the same command has yet to write, so whatever asks for one (fetching,
checking, hashing, showing) asks here for both, and none is forgotten.
"""

from collections.abc import Sequence
from pathlib import Path

from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.schema import Distill, Model, Recipe

PARENT_KEYS = {"init_from": "model.init_from", "teacher": "distill.teacher"}


def parents(recipe: Recipe) -> dict[str, Model]:
    """`init_from` and `teacher` as far as the recipe has them, the teacher as a model. One that is read from a cache is
    no folder that has to be there."""
    found = {"init_from": recipe.model} if recipe.model.init_from is not None else {}
    if recipe.distill is not None and recipe.distill.cache is None:
        found["teacher"] = teacher_model(recipe.distill)
    return found


def written_in(path: str | None, loaded: LoadedRecipe) -> bool:
    """Whether `path` lies in the run directory of this recipe."""
    return path is not None and Path(path).absolute().is_relative_to(Path(loaded.recipe.run.dir).absolute())


def in_order(recipes: Sequence[LoadedRecipe]) -> list[LoadedRecipe]:
    """Each after those that write what it starts or learns from; otherwise as given. A circle stays as it is: it is
    refused where it is run."""
    placed: list[LoadedRecipe] = []

    def place(loaded: LoadedRecipe, above: tuple[LoadedRecipe, ...]) -> None:
        needed = [model.init_from for model in parents(loaded.recipe).values()]
        for other in recipes:
            if other not in above and any(written_in(path, other) for path in needed):
                place(other, (*above, other))
        if loaded not in placed:
            placed.append(loaded)

    for loaded in recipes:
        place(loaded, (loaded,))
    return placed


def teacher_model(distill: Distill) -> Model:
    """The teacher as a `[model]`: what loads, measures and fetches models takes one."""
    return Model(init_from=distill.teacher, revision=distill.revision)
