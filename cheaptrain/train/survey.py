"""What a recipe amounts to on this machine, before anything is started: the facts and the numbers that follow.

Training starts from a survey, and the plan it opens with is printed from the very same one, so the plan cannot say one
thing and the run do another. What is known before everything is prepared: `outlook.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from cheaptrain.data.manifest import Manifest, load_manifest
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer
from cheaptrain.errors import RecipeError
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.resolve import ModelFacts, Resolved, SourceFacts, resolve
from cheaptrain.recipe.schema import Model, Recipe
from cheaptrain.recipe.shares import shares_of_run, weighted


@dataclass(frozen=True)
class Survey:
    """A recipe with everything known about it."""

    loaded: LoadedRecipe
    tokenizer: TextTokenizer
    manifests: dict[str, Manifest]
    facts: ModelFacts
    resolved: Resolved

    @property
    def sources(self) -> dict[str, SourceFacts]:
        """The facts of each source that is read."""
        return {name: manifest.facts() for name, manifest in self.manifests.items()}


def survey_all(recipes: Sequence[LoadedRecipe], world_size: int) -> list[Survey]:
    """Survey recipes that run one after the other; a stage may start from what an earlier one will write."""
    surveys: list[Survey] = []
    for loaded in recipes:
        surveys.append(survey(loaded, world_size, surveys))
    return surveys


def survey(loaded: LoadedRecipe, world_size: int, earlier: Sequence[Survey] = ()) -> Survey:
    """Read the facts of one recipe and resolve it.

    Raises PreflightError when data or tokenizer are not prepared, RecipeError when the numbers do not add up.
    """
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data)
    manifests = {source.name: load_manifest(recipe.data, source, tokenizer) for source in weighted(recipe)}
    model = origin(recipe.model, tokenizer, earlier)
    facts = model_facts(model, vocab_size=tokenizer.size, seq_len=recipe.data.seq_len)
    sources = {name: manifest.facts() for name, manifest in manifests.items()}
    return Survey(loaded, tokenizer, manifests, facts, resolve(recipe, world_size, sources, facts, loaded.provenance))


def mixture_order(recipe: Recipe, sources: Mapping[str, SourceFacts]) -> MixtureOrder:
    """The order in which the rows of the sources are read."""
    weights = {share.name: share.share for share in shares_of_run(recipe, 0) if share.share > 0}
    rows = {name: sources[name].rows(recipe.data.seq_len) for name in weights}
    return MixtureOrder(recipe.seed, weights, rows)


class Planned(Protocol):
    """A stage that comes earlier in the same command; None: its tokenizer is not here yet."""

    @property
    def loaded(self) -> LoadedRecipe: ...

    @property
    def tokenizer(self) -> TextTokenizer | None: ...


def origin(model: Model, tokenizer: TextTokenizer | None, earlier: Sequence[Planned]) -> Model:
    """The model to take the facts from: an earlier stage's own when its checkpoint does not exist yet.

    Raises RecipeError when that stage has another tokenizer.
    """
    before = written_by(model.init_from, earlier)
    if before is None:
        return model
    if tokenizer and before.tokenizer and before.tokenizer.fingerprint != tokenizer.fingerprint:
        raise RecipeError(
            f"model.init_from = {model.init_from!r} will be trained with another tokenizer ({before.loaded.path}) than "
            "this recipe uses; both must have the same [tokenizer]"
        )
    if model.init_from is not None and Path(model.init_from).exists():
        return model
    first = origin(before.loaded.recipe.model, before.tokenizer, earlier)
    return first.model_copy(update={"overrides": {**first.overrides, **model.overrides}})


_Stage = TypeVar("_Stage", bound=Planned)


def written_by(path: str | None, earlier: Sequence[_Stage]) -> _Stage | None:
    """The earlier stage in whose run directory `path` lies, if any."""
    return next((stage for stage in earlier if path and _inside(path, stage.loaded.recipe.run.dir)), None)


def _inside(path: str, directory: str) -> bool:
    return Path(path).absolute().is_relative_to(Path(directory).absolute())
