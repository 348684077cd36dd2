"""How long a run is, in steps and tokens, and where it stands on its learning-rate curve.

What the recipe asks (tokens, epochs, FLOPs, tokens a parameter) is the goal, and stays the goal when the batch changes
in the middle of the run: the steps still to come are what is left of it over the new batch. Where it asks for steps,
the number of steps stays. The trap is the learning rate: a warm-up of 700 steps, or a run of 1,000, is another number
of tokens after the change, and a rate reckoned from that anew would jump. So the curve is laid down once, by the batch
the run started with; a change of batch only changes how far along it the tokens to come will move.
"""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from math import ceil
from typing import Literal

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.quantities import Span
from cheaptrain.recipe.schema import Recipe, Train
from cheaptrain.recipe.shares import SourceFacts, by_size, rows_until_read


@dataclass(frozen=True)
class ModelFacts:
    """What the model amounts to. `flops_per_token`: forward and backward of one trained token at the run's seq_len.
    `adapters`: numbers of the adapters, where they alone train; else 0."""

    parameters: int
    embedding_parameters: int
    by_part: dict[str, int]
    flops_per_token: float
    adapters: int = 0


class MissingFacts(PreflightError):
    """The length of the run depends on something that is not known before `cheaptrain prepare`."""


@dataclass(frozen=True)
class Stretch:
    """A part of a run with one batch: the steps and tokens before it, and the tokens of each of its steps."""

    step: int
    tokens: int
    global_batch_tokens: int


@dataclass(frozen=True)
class Done:
    """What a run has behind it, as its ledger says. The first of the `stretches` begins at step 0."""

    steps: int
    tokens: int
    rows: int
    stretches: tuple[Stretch, ...]

    def __post_init__(self) -> None:
        if not self.stretches or self.stretches[0].step:
            raise ValueError(f"the stretches of a run begin at step 0, not {self.stretches[:1]}")


@dataclass(frozen=True)
class Goal:
    """What ends a run: a number of steps, or of tokens. `last_step`: how near to the tokens it ends: at the nearest
    whole step, never past them, or not before all of them are read."""

    key: str
    steps: int | None = None
    tokens: Fraction = Fraction(0)
    last_step: Literal["nearest", "before", "after"] = "nearest"

    def steps_left(self, stretch: Stretch) -> int:
        """Steps of the stretch until the goal is reached: a whole number, 0 when the goal is behind."""
        if self.steps is not None:
            return max(0, self.steps - stretch.step)
        exact = (self.tokens - stretch.tokens) / stretch.global_batch_tokens
        if self.last_step == "after":
            return max(0, ceil(exact))
        return max(0, int(exact if self.last_step == "before" else exact + Fraction(1, 2)))


@dataclass(frozen=True)
class Leg:
    """A stretch, and where the run was to end while it lasted."""

    start: Stretch
    last_step: int
    last_tokens: int


@dataclass(frozen=True)
class Curve:
    """The learning-rate curve in tokens of the batch the run started with, and the way along it.

    `length`, `warmup`, `decay`: the whole of it, its first stretch and its last. `knots`: tokens seen → place on the
    curve, in straight lines from each to the next. A run whose batch never changed has two: (0, 0), (length, length).
    """

    length: int
    warmup: int
    decay: int
    knots: tuple[tuple[Fraction, Fraction], ...]

    def place(self, tokens_seen: int) -> Fraction:
        """Where on the curve the run is after so many tokens, in [0, length]."""
        return _along(self.knots, Fraction(tokens_seen))

    def tokens_at(self, place: int) -> int:
        """The other way round: tokens seen when the run comes to a place on the curve."""
        return round(_along([(at, tokens) for tokens, at in self.knots], Fraction(place)))


def goal_of(recipe: Recipe, sources: Mapping[str, SourceFacts] | None, model: ModelFacts | None) -> Goal:
    """What the recipe asks. Raises MissingFacts for a length that needs facts which are not given."""
    train = recipe.train
    if train.steps is not None:
        return Goal("train.steps", steps=train.steps)
    if train.tokens is not None:
        return Goal("train.tokens", tokens=Fraction(train.tokens))
    if train.epochs is not None:
        if sources is None:
            raise MissingFacts(_unknown("train.epochs", "the tokens of each source are"))
        rows = rows_until_read(recipe, train.epochs, sources)
        if by_size(recipe):
            return Goal("train.epochs", tokens=ceil(rows) * Fraction(recipe.data.seq_len), last_step="after")
        return Goal("train.epochs", tokens=int(rows) * Fraction(recipe.data.seq_len), last_step="before")
    if train.flops is not None:
        if model is None:
            raise MissingFacts(_unknown("train.flops", "the model's FLOPs a token are"))
        return Goal("train.flops", tokens=Fraction(train.flops) / Fraction(model.flops_per_token))
    if model is None:
        raise MissingFacts(_unknown("train.tokens_per_parameter", "the model's parameters are"))
    assert train.tokens_per_parameter is not None  # the schema admits exactly one length
    return Goal("train.tokens_per_parameter", tokens=Fraction(train.tokens_per_parameter) * model.parameters)


def legs_of(recipe: Recipe, goal: Goal, done: Done | None, named: Callable[[str], str]) -> tuple[Leg, ...]:
    """The stretches of the run, the one to come last, each with the end it was heading for.

    Raises PreflightError when the batch is another than the run had and the recipe does not allow that, RecipeError
    when there would be less than one step. A run that has reached its end stays there whatever the batch.
    """
    batch, before = recipe.train.global_batch_tokens, done.stretches if done else ()
    stretches = list(before)
    if not before or before[-1].global_batch_tokens != batch:
        stretches.append(Stretch(done.steps if done else 0, done.tokens if done else 0, batch))
    if before and stretches[-1] is not before[-1] and not recipe.run.allow_batch_change:
        raise PreflightError(_batch_changed(stretches[-1], before[-1], named))
    legs: list[Leg] = []
    for stretch in stretches:
        ended = bool(legs) and legs[-1].last_step <= stretch.step
        left = 0 if ended else goal.steps_left(stretch)
        if left == 0 and not ended:
            raise RecipeError(_less_than_a_step(goal, stretch, named))
        legs.append(Leg(stretch, stretch.step + left, stretch.tokens + left * stretch.global_batch_tokens))
    return tuple(legs)


def curve_of(train: Train, legs: Sequence[Leg]) -> Curve:
    """The curve of a run, laid down by its first leg and walked along by all of them."""
    first = legs[0]
    step, length = first.start.global_batch_tokens, first.last_tokens
    warmup, decay = train.warmup.tokens(step, length), 0
    if train.schedule == "wsd":
        decay = (train.decay or Span(20, "%")).tokens(step, length)
    elif train.schedule != "constant":
        decay = max(0, length - warmup)
    knots = [(Fraction(0), Fraction(0))]
    for leg, following in pairwise(legs):
        change = Fraction(following.start.tokens)
        knots.append((change, _along([*knots, (Fraction(leg.last_tokens), Fraction(length))], change)))
    knots.append((Fraction(legs[-1].last_tokens), Fraction(length)))
    return Curve(length, warmup, decay, tuple(knots))


def _along(knots: Sequence[tuple[Fraction, Fraction]], at: Fraction) -> Fraction:
    """The straight lines through `knots`, read at `at`; flat before the first knot and after the last."""
    if at >= knots[-1][0]:
        return knots[-1][1]
    number = bisect_right(knots, at, key=lambda knot: knot[0])
    if number == 0:
        return knots[0][1]
    (left, low), (right, high) = knots[number - 1], knots[number]
    return low + (at - left) * (high - low) / (right - left)


def _unknown(key: str, what: str) -> str:
    return f"{key} says how long to train, and {what} not known yet. Run `cheaptrain prepare` on this recipe first."


def _less_than_a_step(goal: Goal, stretch: Stretch, named: Callable[[str], str]) -> str:
    batch = f"{stretch.global_batch_tokens:,} ({named('train.global_batch_tokens')})"
    tokens = round(goal.tokens)
    if stretch.step:
        left = f"after step {stretch.step:,} {max(0, tokens - stretch.tokens):,} tokens are left"
        return f"{named(goal.key)}: {left}, which is no step of {batch}: go on with a smaller batch"
    return f"{named(goal.key)}: {tokens:,} tokens are less than one step of {batch}: train longer, or lower the batch"


def _batch_changed(now: Stretch, before: Stretch, named: Callable[[str], str]) -> str:
    return (
        f"{named('train.global_batch_tokens')}: {now.global_batch_tokens:,} tokens a step, and the run did its"
        f" {now.step:,} steps so far with {before.global_batch_tokens:,} in the end. To go on from here with another"
        " batch, add run.allow_batch_change=true to the command line; to go on as before, add"
        f" train.global_batch_tokens={before.global_batch_tokens}"
    )
