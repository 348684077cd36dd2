"""What can be said of a recipe before everything it needs is there: a survey with gaps, and each gap named.

Training wants a whole survey (`survey.py`) and refuses less. `cheaptrain plan` is asked earlier, often on another
machine, to decide whether preparing and renting are worth it; so what is missing is left open and named. The trap: a
plan that reaches for the network hangs for a minute on a machine without one. Here nothing does.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from huggingface_hub import constants as hub_constants

from cheaptrain.data.domain import tokens_of
from cheaptrain.data.manifest import Manifest, load_manifest
from cheaptrain.data.open import source_facts
from cheaptrain.data.tokenizer import TextTokenizer, load_tokenizer, with_template
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.config import checkpoint_config
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.batch import Batch, namer, resolve_batch
from cheaptrain.recipe.length import MissingFacts, ModelFacts
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.resolve import Resolved, resolve
from cheaptrain.recipe.schema import Model, Recipe
from cheaptrain.recipe.shares import overread_sources, shares_of_run, weighted
from cheaptrain.train.survey import Survey, origin, teacher_origin, written_by
from cheaptrain.train.teacher import TeacherShape

# Vocabularies that presets were published with, by the beginning of their names: for a tokenizer that is not here yet.
_PUBLISHED_VOCABULARY = {
    "mobilellm": 128_256,
    "gpt2": 50_257,
    "smollm2": 49_152,
    "7b": 128_256,
    "70b": 128_256,
    "671b": 129_280,
}


@dataclass(frozen=True)
class Outlook:
    """A recipe and what is known about it; `open_questions` says of each gap what is missing and why.

    `model` is where the shape comes from: for a checkpoint that an earlier stage will write, that stage's own model.
    """

    loaded: LoadedRecipe
    model: Model
    tokenizer: TextTokenizer | None
    vocab_size: int | None
    manifests: Mapping[str, Manifest]
    facts: ModelFacts | None
    batch: Batch
    resolved: Resolved | None
    world_size: int
    open_questions: tuple[str, ...] = ()
    teacher: TeacherShape | None = None  # if there is one and it is known

    @property
    def recipe(self) -> Recipe:
        return self.loaded.recipe


def outlook_of(survey: Survey) -> Outlook:
    """The outlook of a survey: no gaps."""
    recipe, resolved = survey.loaded.recipe, survey.resolved
    return Outlook(
        loaded=survey.loaded,
        model=recipe.model,
        tokenizer=survey.tokenizer,
        vocab_size=survey.tokenizer.size,
        manifests=survey.manifests,
        facts=survey.facts,
        batch=resolve_batch(recipe, resolved.world_size),
        resolved=resolved,
        world_size=resolved.world_size,
        teacher=survey.teacher,
    )


def survey_leniently(loaded: LoadedRecipe, world_size: int, earlier: Sequence[Outlook] = ()) -> Outlook:
    """Find out what there is without network and without failing for what is not prepared.

    Raises RecipeError when the numbers do not add up or something named can never exist.
    """
    recipe, gaps = loaded.recipe, list[str]()
    with _no_network():
        tokenizer = _tokenizer(recipe, earlier, gaps)
        model = origin(recipe.model, tokenizer, earlier)
        vocab_size = tokenizer.size if tokenizer else _vocabulary(recipe, model, earlier, gaps)
        facts = _facts(recipe, model, vocab_size, gaps)
        manifests = _manifests(recipe, tokenizer)
        teacher = _teacher(recipe, tokenizer, earlier, gaps)
    batch = resolve_batch(recipe, world_size, loaded.provenance)
    resolved = _resolved(loaded, world_size, manifests, facts, gaps)
    return Outlook(
        loaded, model, tokenizer, vocab_size, manifests, facts, batch, resolved, world_size, tuple(gaps), teacher
    )  # fmt: skip


def unprepared(recipe: Recipe) -> list[str]:
    """What of a recipe is not prepared on this machine, a sentence each. Reads only, and without network."""
    missing = []
    with _no_network():
        try:
            tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
        except (PreflightError, RecipeError) as error:
            return [str(error)]
        for source in weighted(recipe):
            try:
                load_manifest(recipe.data, source, tokenizer)
            except (PreflightError, RecipeError) as error:
                missing.append(str(error))
    return missing


def _tokenizer(recipe: Recipe, earlier: Sequence[Outlook], gaps: list[str]) -> TextTokenizer | None:
    if (before := written_by(recipe.tokenizer.path, earlier)) and not Path(str(recipe.tokenizer.path)).exists():
        if before.tokenizer is None or recipe.chat is None:
            return before.tokenizer
        return with_template(before.tokenizer, recipe.chat)
    try:
        return load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    except PreflightError:
        if recipe.tokenizer.path is not None and Path(recipe.tokenizer.path).is_dir():
            raise  # it is here and broken: preparing will not mend it
    what = f"tokenizer {recipe.tokenizer.path}" if recipe.tokenizer.path else "the tokenizer of [tokenizer.train]"
    gaps.append(f"{what} is not on this machine yet")
    return None


def _teacher(
    recipe: Recipe, tokenizer: TextTokenizer | None, earlier: Sequence[Outlook], gaps: list[str]
) -> TeacherShape | None:
    try:
        return teacher_origin(recipe.distill, tokenizer, earlier)
    except (PreflightError, RecipeError):
        where = recipe.distill.teacher if recipe.distill else ""
        if Path(where).expanduser().exists():
            raise  # it is here and does not fit
        if recipe.distill and recipe.distill.cache:
            return None  # nor needs it be
    gaps.append(f"teacher {where} is not on this machine yet: its memory and time are left out")
    return None


def _vocabulary(recipe: Recipe, model: Model, earlier: Sequence[Outlook], gaps: list[str]) -> int | None:
    """The size a tokenizer that is not here will have, where something says it."""
    if before := written_by(recipe.tokenizer.path, earlier):
        return before.vocab_size
    added = len(tokens_of(recipe.tokenizer.add_tokens))
    if recipe.tokenizer.train is not None:
        return recipe.tokenizer.train.vocab_size + added
    if model.init_from is not None and Path(model.init_from).is_dir():
        return checkpoint_config(model).vocab_size
    for beginning, size in _PUBLISHED_VOCABULARY.items():
        if model.preset is not None and model.preset.startswith(beginning):
            more = f", and {added:,} added" if added else ""
            gaps.append(f"its vocabulary is taken to be that {model.preset} was published with, {size:,}{more}")
            return size + added
    return None


def _facts(recipe: Recipe, model: Model, vocab_size: int | None, gaps: list[str]) -> ModelFacts | None:
    if vocab_size is None:
        gaps.append("without a tokenizer the size of the model is not known")
        return None
    try:
        return model_facts(model, vocab_size=vocab_size, seq_len=recipe.data.seq_len, lora=recipe.lora)
    except RecipeError:
        where = model.config or model.init_from
        if where is None or Path(where).exists() or where.count("/") > 1 or where.startswith((".", "/", "~")):
            raise
    gaps.append(f"model {where} is not on this machine yet")
    return None


def _manifests(recipe: Recipe, tokenizer: TextTokenizer | None) -> dict[str, Manifest]:
    found = {}
    for source in weighted(recipe) if tokenizer else ():
        assert tokenizer is not None
        try:
            found[source.name] = load_manifest(recipe.data, source, tokenizer)
        except PreflightError:
            continue  # shown as not prepared
    return found


def _resolved(
    loaded: LoadedRecipe, world_size: int, manifests: Mapping[str, Manifest], facts: ModelFacts | None, gaps: list[str]
) -> Resolved | None:
    """Resolve with what is there. Epochs of what is prepared are checked even while another source is missing."""
    recipe = loaded.recipe
    sources = {name: source_facts(manifest, recipe.data.seq_len) for name, manifest in manifests.items()}
    complete = all(source.name in sources for source in weighted(recipe))
    try:
        resolved = resolve(recipe, world_size, sources if complete else None, facts, loaded.provenance)
    except MissingFacts as error:
        gaps.append(str(error))
        return None
    if complete:
        return resolved
    shares = shares_of_run(recipe, resolved.rows, sources)
    if complaints := overread_sources(recipe, shares, namer(loaded.provenance)):
        raise RecipeError("\n".join(complaints))
    return replace(resolved, shares=shares)


@contextmanager
def _no_network() -> Iterator[None]:
    """What is not in the hub's local cache is simply not there."""
    before = hub_constants.HF_HUB_OFFLINE
    hub_constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE = before
