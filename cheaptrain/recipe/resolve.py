"""`resolve`: the one place where numbers are derived from a recipe.

A recipe says what is meant (tokens, tokens a step); how many rows, micro-batches, steps and epochs that is depends on
the number of processes and on what is prepared. All of it is reckoned here, once, before anything starts, and what does
not divide or does not fit is refused with the values that would. The trap: numbers derived again later, a little
differently, are how accumulation got left out of a run's tokens. Nothing here reads a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.batch import Batch, namer, resolve_batch
from cheaptrain.recipe.quantities import Span
from cheaptrain.recipe.schema import Recipe
from cheaptrain.recipe.shares import (
    SourceFacts,
    SourceShare,
    empty_sources,
    overread_sources,
    rows_until_read,
    shares_of_run,
    weighted,
)


@dataclass(frozen=True)
class ModelFacts:
    """What the model amounts to. `flops_per_token`: forward and backward of one trained token at the run's seq_len."""

    parameters: int
    embedding_parameters: int
    by_part: dict[str, int]
    flops_per_token: float


@dataclass(frozen=True)
class Resolved:
    """Every number of a run. Lengths of the schedule in tokens, intervals in steps (None: never).

    `decay_tokens` is the stretch in which the rate falls: for wsd what `train.decay` says, for linear and cosine all
    after warm-up, for constant 0. `flops` is the whole run, forward and backward; None while the model is not known.
    """

    world_size: int
    seq_len: int
    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    tokens_per_step: int
    steps: int
    rows: int
    tokens: int
    warmup_tokens: int
    decay_tokens: int
    log_every: int
    validate_every: int
    sample_every: int
    save_every: int
    keep_every: int | None
    tokens_per_parameter: float | None
    flops: float | None
    shares: tuple[SourceShare, ...]


class MissingFacts(PreflightError):
    """The length of the run depends on something that is not known before `cheaptrain prepare`."""


def resolve(
    recipe: Recipe,
    world_size: int,
    sources: Mapping[str, SourceFacts] | None = None,
    model: ModelFacts | None = None,
    provenance: Mapping[str, str] | None = None,
) -> Resolved:
    """Derive every number of the run on `world_size` processes.

    `sources` holds what is prepared of each source with a weight; without it epochs are not checked. `provenance` (of
    the loaded recipe) only serves messages. Raises RecipeError for what does not divide or does not fit, and
    MissingFacts when `train.epochs` is given without `sources`, or `train.flops` or `train.tokens_per_parameter`
    without `model`; what needs no facts can then still be had from `resolve_batch`.
    """
    named = namer(provenance)
    batch = resolve_batch(recipe, world_size, provenance)
    if sources is not None:
        absent = [source.name for source in weighted(recipe) if source.name not in sources]
        if absent:
            raise MissingFacts(f"not prepared yet: {', '.join(absent)}. Run `cheaptrain prepare` on this recipe first.")
        _refuse(empty_sources(recipe, sources, named))
    steps = _steps(recipe, batch, sources, model, named)
    rows, tokens = steps * batch.rows_per_step, steps * batch.tokens_per_step
    shares = shares_of_run(recipe, rows, sources)
    warmup, decay = _schedule(recipe, batch, tokens)
    save_every = recipe.checkpoint.every.steps(batch.tokens_per_step, tokens)
    _refuse(
        [
            *overread_sources(recipe, shares, named),
            *_schedule_complaints(recipe, warmup, decay, tokens, named),
            *_retention_complaints(recipe, named),
        ]
    )
    return Resolved(
        world_size=world_size,
        seq_len=recipe.data.seq_len,
        rows_per_step=batch.rows_per_step,
        micro_batch_size=batch.micro_batch_size,
        accumulation=batch.accumulation,
        tokens_per_step=batch.tokens_per_step,
        steps=steps,
        rows=rows,
        tokens=tokens,
        warmup_tokens=warmup,
        decay_tokens=decay,
        log_every=recipe.log.every.steps(batch.tokens_per_step, tokens),
        validate_every=recipe.validation.every.steps(batch.tokens_per_step, tokens),
        sample_every=recipe.samples.every.steps(batch.tokens_per_step, tokens),
        save_every=save_every,
        keep_every=_keep_every(recipe, save_every, batch, tokens),
        tokens_per_parameter=tokens / model.parameters if model else None,
        flops=tokens * model.flops_per_token if model else None,
        shares=shares,
    )


def _steps(
    recipe: Recipe,
    batch: Batch,
    sources: Mapping[str, SourceFacts] | None,
    model: ModelFacts | None,
    named: Callable[[str], str],
) -> int:
    """The length of the run in whole steps: the nearest, but never past the epochs asked."""
    train = recipe.train
    if train.steps is not None:
        return train.steps
    if train.epochs is not None:
        if sources is None:
            raise MissingFacts(_unknown("train.epochs", "the tokens of each source are"))
        key, tokens = "train.epochs", rows_until_read(recipe, train.epochs, sources) * recipe.data.seq_len
        steps = tokens // batch.tokens_per_step
    else:
        key, exact = _tokens_asked(recipe, model)
        tokens, steps = round(exact), int(exact / batch.tokens_per_step + Fraction(1, 2))
    if steps < 1:
        raise RecipeError(
            f"{named(key)}: {tokens:,} tokens are less than one step of {batch.tokens_per_step:,}"
            " (train.global_batch_tokens): train longer, or lower the batch"
        )
    return steps


def _tokens_asked(recipe: Recipe, model: ModelFacts | None) -> tuple[str, Fraction]:
    train = recipe.train
    if train.tokens is not None:
        return "train.tokens", Fraction(train.tokens)
    if train.flops is not None:
        if model is None:
            raise MissingFacts(_unknown("train.flops", "the model's FLOPs a token are"))
        return "train.flops", Fraction(train.flops) / Fraction(model.flops_per_token)
    if model is None:
        raise MissingFacts(_unknown("train.tokens_per_parameter", "the model's parameters are"))
    assert train.tokens_per_parameter is not None  # the schema admits exactly one length
    return "train.tokens_per_parameter", Fraction(train.tokens_per_parameter) * model.parameters


def _unknown(key: str, what: str) -> str:
    return f"{key} says how long to train, and {what} not known yet. Run `cheaptrain prepare` on this recipe first."


def _schedule(recipe: Recipe, batch: Batch, tokens: int) -> tuple[int, int]:
    """Tokens of warm-up and of the falling rate."""
    train = recipe.train
    warmup = train.warmup.tokens(batch.tokens_per_step, tokens)
    if train.schedule == "wsd":
        return warmup, (train.decay or Span(20, "%")).tokens(batch.tokens_per_step, tokens)
    return warmup, 0 if train.schedule == "constant" else max(0, tokens - warmup)


def _schedule_complaints(
    recipe: Recipe, warmup: int, decay: int, tokens: int, named: Callable[[str], str]
) -> list[str]:
    if warmup > tokens:
        key, text, length = "train.warmup", f"a warm-up of {recipe.train.warmup}", warmup
    elif warmup + decay > tokens:
        key, text, length = "train.decay", f"warm-up ({warmup:,} tokens) and decay ({decay:,})", warmup + decay
    else:
        return []
    return [f"{named(key)}: {text} takes {length:,} tokens, and the run has {tokens:,}: shorten it, or train longer"]


def _retention_complaints(recipe: Recipe, named: Callable[[str], str]) -> list[str]:
    every, keep = recipe.checkpoint.every, recipe.checkpoint.keep_every
    if keep is None or keep.unit != "steps" or every.unit != "steps" or keep.amount % every.amount == 0:
        return []
    return [
        f"{named('checkpoint.keep_every')}: {keep} is not a multiple of checkpoint.every = {every},"
        " so most of the checkpoints to keep would never be written"
    ]


def _keep_every(recipe: Recipe, save_every: int, batch: Batch, tokens: int) -> int | None:
    """In steps. Shares of a run rarely fall on a save exactly: the nearest multiple of `save_every` is meant."""
    if recipe.checkpoint.keep_every is None:
        return None
    keep = recipe.checkpoint.keep_every.steps(batch.tokens_per_step, tokens)
    return save_every * max(1, (2 * keep + save_every) // (2 * save_every))


def _refuse(complaints: list[str]) -> None:
    if complaints:
        raise RecipeError("\n".join(complaints))
