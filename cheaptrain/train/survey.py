"""What a recipe amounts to on this machine, before anything is started: the facts and the numbers that follow.

Training starts from a survey, and the plan it opens with is printed from the very same one, so the plan cannot say one
thing and the run do another. What is known before everything is prepared: `outlook.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from tokenizers import Tokenizer
from transformers import PreTrainedConfig

from cheaptrain.data.align import refuse_unalignable
from cheaptrain.data.manifest import Manifest, load_manifest
from cheaptrain.data.open import source_facts
from cheaptrain.data.order import MixtureOrder
from cheaptrain.data.same_tokenizer import is_same, refuse_other_tokenizer, vocabulary_in
from cheaptrain.data.tokenizer import TextTokenizer, extends, load_tokenizer, open_tokenizer
from cheaptrain.data.transform import idle_rules
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.config import checkpoint_config, model_config, vocabulary_growth
from cheaptrain.model.facts import model_facts
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.length import Done, ModelFacts
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.parents import parents, teacher_model, written_in
from cheaptrain.recipe.resolve import Resolved, resolve
from cheaptrain.recipe.schema import Distill, Model, Recipe
from cheaptrain.recipe.shares import SourceFacts, shares_of_run, weighted
from cheaptrain.train.teacher import TeacherShape, longest_row, speaking_of_the_teacher


@dataclass(frozen=True)
class Survey:
    """A recipe with everything known about it."""

    loaded: LoadedRecipe
    tokenizer: TextTokenizer
    manifests: dict[str, Manifest]
    sources: dict[str, SourceFacts]  # of each source that is read
    facts: ModelFacts
    resolved: Resolved
    config: PreTrainedConfig  # of the model as it starts
    teacher: TeacherShape | None = None  # if one is loaded

    @property
    def positions(self) -> int:
        """That the model can read."""
        return getattr(self.config, "max_position_embeddings", None) or self.loaded.recipe.data.seq_len


def survey_all(
    recipes: Sequence[LoadedRecipe], world_size: int, done: Callable[[LoadedRecipe], Done | None] = lambda loaded: None
) -> list[Survey]:
    """Survey recipes that run one after the other; a stage may start from what an earlier one will write. `done` says
    what each has behind it. Raises, as `survey` does, with what is wrong with any of them."""
    behind = [done(loaded) for loaded in recipes]  # all of them first: what is found here may differ on other machines
    surveys: list[Survey] = []
    failed: list[LoadedRecipe] = []
    problems: list[RecipeError | PreflightError] = []
    for loaded, what in zip(recipes, behind, strict=True):
        coming = [str(model.init_from) for model in parents(loaded.recipe).values()]
        if any(written_in(path, other) and not Path(path).exists() for path in coming for other in failed):
            failed.append(loaded)  # nothing can be said of it until the other is right
            continue
        try:
            surveys.append(survey(loaded, world_size, surveys, what))
        except (RecipeError, PreflightError) as error:
            said = str(error)
            kind = RecipeError if isinstance(error, RecipeError) else PreflightError
            problems.append(kind(said if str(loaded.path) in said else f"{loaded.path}: {said}"))
            failed.append(loaded)
    if problems:
        raise type(problems[0])("\n".join(map(str, problems)))
    return surveys


def survey(loaded: LoadedRecipe, world_size: int, earlier: Sequence[Survey] = (), done: Done | None = None) -> Survey:
    """Read the facts of one recipe and resolve it.

    Raises PreflightError when data or tokenizer are not prepared, or the batch is not the one the run had and may not
    change; RecipeError when the numbers do not add up.
    """
    recipe = loaded.recipe
    tokenizer = load_tokenizer(recipe.tokenizer, recipe.data, recipe.chat)
    _refuse_more_than_all(recipe.distill, tokenizer)
    manifests = {source.name: load_manifest(recipe.data, source, tokenizer) for source in weighted(recipe)}
    if idle := list(idle_rules(recipe.data, {name: manifest.transform for name, manifest in manifests.items()})):
        raise PreflightError("\n".join(idle))
    model = origin(recipe.model, tokenizer, earlier)
    facts = model_facts(model, vocab_size=tokenizer.size, seq_len=recipe.data.seq_len, lora=recipe.lora)
    sources = {name: source_facts(manifest, recipe.data.seq_len) for name, manifest in manifests.items()}
    resolved = resolve(recipe, world_size, sources, facts, loaded.provenance, done)
    config = model_config(model, vocab_size=tokenizer.size, seq_len=recipe.data.seq_len)
    from_cache = recipe.distill is not None and recipe.distill.cache is not None
    teacher = None if from_cache else teacher_origin(recipe.distill, tokenizer, earlier)
    return Survey(loaded, tokenizer, manifests, sources, facts, resolved, config, teacher)


def going_on(surveyed: Survey, done: Done | None) -> Survey:
    """The same survey, resolved from the checkpoint that the run really goes on from; None: it starts."""
    loaded, world_size = surveyed.loaded, surveyed.resolved.world_size
    resolved = resolve(loaded.recipe, world_size, surveyed.sources, surveyed.facts, loaded.provenance, done)
    return replace(surveyed, resolved=resolved)


def mixture_order(recipe: Recipe, sources: Mapping[str, SourceFacts]) -> MixtureOrder:
    """The order in which the rows of the sources are read."""
    weights = {share.name: share.share for share in shares_of_run(recipe, 0, sources) if share.share}
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

    Raises RecipeError when that stage, or the checkpoint that is there, has another tokenizer.
    """
    if tokenizer is not None:
        _refuse_other_tokenizer(model, tokenizer)
    before = written_by(model.init_from, earlier)
    if before is None:
        return model
    if tokenizer and before.tokenizer and not extends(tokenizer, before.tokenizer):
        raise RecipeError(
            f"model.init_from = {model.init_from!r} will be trained with another tokenizer ({before.loaded.path}) than "
            "this recipe uses; both must have the same [tokenizer], or this one tokens added to it"
        )
    if model.init_from is not None and Path(model.init_from).exists():
        return model
    first = origin(before.loaded.recipe.model, before.tokenizer, earlier)
    return first.model_copy(update={"overrides": {**first.overrides, **model.overrides}})


def teacher_origin(
    distill: Distill | None, tokenizer: TextTokenizer | None, earlier: Sequence[Planned]
) -> TeacherShape | None:
    """The teacher's model to take the facts from: an earlier stage's own when its checkpoint does not exist yet. None:
    no teacher.

    Raises PreflightError when it is not here, or does not mean the same by each id of the tokenizer; RecipeError when
    it does and was to be aligned.
    """
    if distill is None:
        return None
    model = teacher_model(distill)
    if distill.tokenizers == "align":
        return _aligned_teacher(distill, tokenizer, earlier)
    if before := written_by(distill.teacher, earlier):
        theirs = before.tokenizer.hf.get_vocab() if before.tokenizer else None
    else:
        with speaking_of_the_teacher():
            theirs = vocabulary_in(model_folder(model))
    if tokenizer is not None and theirs is not None:
        refuse_other_tokenizer(tokenizer.hf.get_vocab(), theirs, distill.teacher)
    return TeacherShape(origin(model, None, earlier), tokenizer.size if tokenizer else None)


def _aligned_teacher(distill: Distill, tokenizer: TextTokenizer | None, earlier: Sequence[Planned]) -> TeacherShape:
    """The same of a teacher with another tokenizer. That its tokens add up to the text is seen here already."""
    model = teacher_model(distill)
    if before := written_by(distill.teacher, earlier):
        theirs = before.tokenizer
    else:
        with speaking_of_the_teacher():
            theirs = teacher_tokenizer(distill)
            if growth := vocabulary_growth(model, theirs.size):
                raise PreflightError(
                    f"distill.teacher: its tokenizer has {theirs.size:,} tokens, its embedding {growth.rows_before:,} "
                    "rows: put the tokenizer there that it was trained with"
                )
    if tokenizer is not None and theirs is not None:
        if is_same(tokenizer.hf.get_vocab(), theirs.hf.get_vocab()):
            raise RecipeError(
                'distill.tokenizers = "align": the teacher has all tokens of this recipe, and token by token it '
                'teaches more than span by span: leave it out, or set "same"'
            )
        refuse_unalignable((tokenizer, "tokenizer"), (theirs, "distill.teacher"))
    shape = origin(model, None, earlier)
    with speaking_of_the_teacher():
        config = model_config(shape, vocab_size=theirs.size if theirs else 1, seq_len=1)
    return TeacherShape(shape, theirs.size if theirs else None, longest_row(config))


def _refuse_more_than_all(distill: Distill | None, tokenizer: TextTokenizer) -> None:
    if distill is not None and (distill.top_k or 0) > tokenizer.size:
        raise RecipeError(
            f"distill.top_k = {distill.top_k:,}: the tokenizer has {tokenizer.size:,} tokens; leave it out to learn "
            "from all of them"
        )


def teacher_tokenizer(distill: Distill) -> TextTokenizer:
    """The tokenizer that lies beside the teacher. Raises PreflightError where there is none, or no teacher yet."""
    return open_tokenizer(str(model_folder(teacher_model(distill))), origin="the tokenizer of distill.teacher")


_Stage = TypeVar("_Stage", bound=Planned)


def written_by(path: str | None, earlier: Sequence[_Stage]) -> _Stage | None:
    """The earlier stage in whose run directory `path` lies, if any."""
    return next((stage for stage in earlier if written_in(path, stage.loaded)), None)


def _refuse_other_tokenizer(model: Model, tokenizer: TextTokenizer) -> None:
    """Weights know their tokens by number. Read through another tokenizer they would be noise, and nothing would fail.

    A tokenizer that only adds or renames special tokens is no other one; one that lacks some is. Of weights that came
    without a tokenizer only the number of rows can be checked.
    """
    try:
        growth = vocabulary_growth(model, tokenizer.size)
        file = model_folder(model) / "tokenizer.json" if model.init_from is not None else None
    except (RecipeError, PreflightError):  # not there yet, or damaged: refused where it is loaded, with the reason
        return
    if growth is not None and tokenizer.own_size > growth.rows_before:
        raise RecipeError(
            f"model.init_from: {model.init_from} has a vocabulary of {growth.rows_before:,}, the tokenizer "
            f"{tokenizer.own_size:,} tokens besides those added to it: use the model's own tokenizer"
        )
    if file is None:
        return
    if not file.is_file():
        adding = [f"chat.template adds {', '.join(tokenizer.added)}"] if tokenizer.added else []
        adding += ["tokenizer.add_tokens adds its own"] if tokenizer.ordinary else []
        if adding and getattr(checkpoint_config(model), "unpadded_vocab_size", None) is None:
            raise RecipeError(
                f"model.init_from: {model.init_from} has no tokenizer.json, so nobody knows which of its rows mean "
                f"something, and {' and '.join(adding)}: put its tokenizer there"
            )
        return
    saved = Tokenizer.from_file(str(file))
    named = {*saved.get_added_tokens_decoder(), *tokenizer.hf.backend_tokenizer.get_added_tokens_decoder()}
    theirs = {number: token for token, number in saved.get_vocab().items()}
    ours = {number: token for token, number in tokenizer.hf.get_vocab().items()}
    other = sorted(number for number in (theirs.keys() & ours.keys()) - named if theirs[number] != ours[number])
    if other:
        first = other[0]
        raise RecipeError(
            f"model.init_from: {model.init_from} was trained with another tokenizer than this recipe has: "
            f"{len(other):,} ids mean something else, {first} for one is {theirs[first]!r} there and {ours[first]!r} "
            f'here. Set tokenizer.path = "{model.init_from}"'
        )
    if lost := sorted(theirs.keys() - ours.keys()):
        raise RecipeError(
            f"model.init_from: {model.init_from} knows {len(lost):,} tokens that this recipe's tokenizer lacks, "
            f'{theirs[lost[0]]!r} for one. Set tokenizer.path = "{model.init_from}"'
        )
