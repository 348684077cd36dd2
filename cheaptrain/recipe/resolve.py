"""`resolve`: the one place where numbers are derived from a recipe.

A recipe says what is meant (tokens, tokens a step); how many rows, micro-batches, steps and epochs that is depends on
the number of processes and on what is prepared. All of it is reckoned here, once, before anything starts, and what does
not divide or does not fit is refused with the values that would. The trap: numbers derived again later, a little
differently, are how accumulation got left out of a run's tokens. Nothing here reads a file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.batch import namer, resolve_batch
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.length import Curve, Done, Leg, ModelFacts, curve_of, goal_of, legs_of
from cheaptrain.recipe.length import MissingFacts as MissingFacts
from cheaptrain.recipe.schema import Recipe
from cheaptrain.recipe.shares import SourceFacts as SourceFacts
from cheaptrain.recipe.shares import (
    SourceShare,
    by_size,
    empty_sources,
    overread_sources,
    rows_until_read,
    shares_of_run,
    weighted,
)


@dataclass(frozen=True)
class Resolved:
    """Every number of a run. Lengths of the schedule in tokens, intervals in steps (None: never).

    `steps`, `rows` and `tokens` are the whole run from its first step to its last. What one step is (`rows_per_step`
    and those after it) and the intervals are those of the batch now; `kept` says of each batch the run has had after
    which step it came and how often a checkpoint was to be kept for good. `decay_tokens` is the stretch in which the
    rate falls: for wsd what `train.decay` says, for linear and cosine all after warm-up, for constant 0. `flops` is the
    whole run, forward and backward; None while the model is not known. `filled_up`: rows of the next epoch with which
    the last step is filled up, where sources are read by their size.
    """

    world_size: int
    layout: Layout
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
    curve: Curve
    log_every: int
    validate_every: int
    sample_every: int
    light_every: int | None
    save_every: int
    keep_every: int | None
    kept: tuple[tuple[int, int | None], ...]
    tokens_per_parameter: float | None
    flops: float | None
    shares: tuple[SourceShare, ...]
    filled_up: int

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of this step is one to keep for good, by the batch it was written under."""
        every = [every for after, every in self.kept if after < step]
        return bool(every) and every[-1] is not None and step % every[-1] == 0


def resolve(
    recipe: Recipe,
    world_size: int,
    sources: Mapping[str, SourceFacts] | None = None,
    model: ModelFacts | None = None,
    provenance: Mapping[str, str] | None = None,
    done: Done | None = None,
) -> Resolved:
    """Derive every number of the run on `world_size` processes.

    `sources` holds what is prepared of each source with a weight; without it epochs are not checked. `provenance` (of
    the loaded recipe) only serves messages. `done` is what the run has behind it, when it goes on: the length then
    counts what was really read, with whatever batch. Raises RecipeError for what does not divide or does not fit,
    PreflightError when the batch is not the one the run had and `run.allow_batch_change` is not set, and MissingFacts
    when `train.epochs` is given without `sources`, or `train.flops` or `train.tokens_per_parameter` without `model`;
    what needs no facts can then still be had from `resolve_batch`.
    """
    named = namer(provenance)
    batch = resolve_batch(recipe, world_size, provenance)
    if sources is not None:
        absent = [source.name for source in weighted(recipe) if source.name not in sources]
        if absent:
            raise MissingFacts(f"not prepared yet: {', '.join(absent)}. Run `cheaptrain prepare` on this recipe first.")
        _refuse(empty_sources(recipe, sources, named))
    legs = legs_of(recipe, goal_of(recipe, sources, model), done, named)
    steps, tokens = legs[-1].last_step, legs[-1].last_tokens
    rows = (done.rows if done else 0) + (tokens - (done.tokens if done else 0)) // recipe.data.seq_len
    shares = shares_of_run(recipe, rows, sources)
    curve = curve_of(recipe.train, legs)
    kept = tuple((leg.start.step, _keep_every(recipe, leg)) for leg in legs)
    _refuse(
        [
            *overread_sources(recipe, shares, named),
            *_schedule_complaints(recipe, curve, named),
            *_retention_complaints(recipe, named),
        ]
    )
    return Resolved(
        world_size=world_size,
        layout=batch.layout,
        seq_len=recipe.data.seq_len,
        rows_per_step=batch.rows_per_step,
        micro_batch_size=batch.micro_batch_size,
        accumulation=batch.accumulation,
        tokens_per_step=batch.tokens_per_step,
        steps=steps,
        rows=rows,
        tokens=tokens,
        warmup_tokens=curve.tokens_at(curve.warmup),
        decay_tokens=tokens - curve.tokens_at(curve.length - curve.decay),
        curve=curve,
        log_every=recipe.log.every.steps(batch.tokens_per_step, tokens),
        validate_every=recipe.validation.every.steps(batch.tokens_per_step, tokens),
        sample_every=recipe.samples.every.steps(batch.tokens_per_step, tokens),
        light_every=_light_every(recipe, legs[-1]),
        save_every=_save_every(recipe, legs[-1]),
        keep_every=kept[-1][1],
        kept=kept,
        tokens_per_parameter=tokens / model.parameters if model else None,
        flops=tokens * model.flops_per_token if model else None,
        shares=shares,
        filled_up=_filled_up(recipe, rows, sources),
    )


def _filled_up(recipe: Recipe, rows: int, sources: Mapping[str, SourceFacts] | None) -> int:
    if sources is None or recipe.train.epochs is None or not by_size(recipe):
        return 0
    return max(0, rows - ceil(rows_until_read(recipe, recipe.train.epochs, sources)))


def _schedule_complaints(recipe: Recipe, curve: Curve, named: Callable[[str], str]) -> list[str]:
    tokens, warmup = curve.length, curve.warmup
    if warmup > tokens:
        key, text, length = "train.warmup", f"a warm-up of {recipe.train.warmup}", warmup
    elif warmup + curve.decay > tokens:
        key, length = "train.decay", warmup + curve.decay
        text = f"warm-up ({warmup:,} tokens) and decay ({curve.decay:,})"
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


def _save_every(recipe: Recipe, leg: Leg) -> int:
    return recipe.checkpoint.every.steps(leg.start.global_batch_tokens, leg.last_tokens)


def _light_every(recipe: Recipe, leg: Leg) -> int | None:
    if not recipe.eval.light:
        return None
    if recipe.eval.every is None:
        return _save_every(recipe, leg)
    return recipe.eval.every.steps(leg.start.global_batch_tokens, leg.last_tokens)


def _keep_every(recipe: Recipe, leg: Leg) -> int | None:
    """In steps. Shares of a run rarely fall on a save exactly: the nearest multiple of `save_every` is meant."""
    if recipe.checkpoint.keep_every is None:
        return None
    keep, save = (
        recipe.checkpoint.keep_every.steps(leg.start.global_batch_tokens, leg.last_tokens),
        _save_every(recipe, leg),
    )
    return save * max(1, (2 * keep + save) // (2 * save))


def _refuse(complaints: list[str]) -> None:
    if complaints:
        raise RecipeError("\n".join(complaints))
