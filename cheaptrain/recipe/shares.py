"""What each source of the mixture gives to a run: its share, its rows, and how often it is read.

Weights are shares of tokens and are normalised, so published mixtures that add up to 100.01 % work. The trap this
module is for: a run that asks for more tokens than a source holds repeats them unnoticed. Here every source's epochs
are reckoned before anything starts, and more than the recipe allows is refused, for all such sources at once. Shares
are fractions, not floats: 1 epoch of a lone source is exactly its rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from cheaptrain.recipe.schema import Recipe, Source


@dataclass(frozen=True)
class SourceFacts:
    """What is prepared of one source. `packed_rows`: rows of the recipe's length that its conversations fill, packed;
    None for text."""

    train_tokens: int
    train_documents: int
    train_bytes: int
    val_tokens: int
    val_documents: int
    packed_rows: int | None = None

    def rows(self, seq_len: int) -> int:
        """Rows for training. Of text whole ones: each needs `seq_len` inputs and one token more, the last target."""
        if self.packed_rows is not None:
            return self.packed_rows
        return max(0, (self.train_tokens - 1) // seq_len)


@dataclass(frozen=True)
class SourceShare:
    """One source's part in a run. `available_rows` and `epochs` are None while the source is not prepared; `share` is
    None, and `rows` 0, while it depends on the size of one that is not."""

    name: str
    share: float | None
    rows: int
    tokens: int
    available_rows: int | None
    epochs: float | None
    max_epochs: float


def shares_of_run(recipe: Recipe, rows: int, facts: Mapping[str, SourceFacts] | None = None) -> tuple[SourceShare, ...]:
    """How `rows` rows fall on the sources, in the recipe's order. The rows of all sources add up to `rows`."""
    seq_len, sources = recipe.data.seq_len, recipe.data.sources
    fractions = _fractions(recipe, facts or {})
    parts = _apportion(fractions, rows) if fractions else [0] * len(sources)
    shares = []
    for number, source in enumerate(sources):
        available = facts[source.name].rows(seq_len) if facts and source.name in facts else None
        shares.append(
            SourceShare(
                name=source.name,
                share=float(fractions[number]) if fractions else (None if source.weight else 0.0),
                rows=parts[number],
                tokens=parts[number] * seq_len,
                available_rows=available,
                epochs=parts[number] / available if available and fractions else None,
                max_epochs=max_epochs(recipe, source),
            )
        )
    return tuple(shares)


def rows_until_read(recipe: Recipe, epochs: float, facts: Mapping[str, SourceFacts]) -> Fraction:
    """Rows until the first source has been read `epochs` times; read by their sizes, all of them have been then."""
    available = {source.name: facts[source.name].rows(recipe.data.seq_len) for source in weighted(recipe)}
    fractions = dict(zip((source.name for source in recipe.data.sources), _fractions(recipe, facts), strict=True))
    return min(Fraction(epochs) * rows / fractions[name] for name, rows in available.items())


def by_size(recipe: Recipe) -> bool:
    """Whether every source is read in proportion to what it has, so that epochs of all of them end together."""
    return any(source.weight == "size" for source in recipe.data.sources)


def weighted(recipe: Recipe) -> list[Source]:
    """The sources that take part: those with a weight above 0."""
    return [source for source in recipe.data.sources if source.weight != 0]


def max_epochs(recipe: Recipe, source: Source) -> float:
    """How often the source may be read: what it says, else `train.epochs`, else once."""
    return source.max_epochs or recipe.train.epochs or 1.0


def empty_sources(recipe: Recipe, facts: Mapping[str, SourceFacts], named: Callable[[str], str]) -> list[str]:
    """A complaint for each source that takes part and does not fill one row."""
    return [
        f"{named(f'data.sources.{source.name}')}: {facts[source.name].train_tokens:,} tokens for training do not fill"
        f" one row of data.seq_len {recipe.data.seq_len:,} (and one token more): add text, or give it weight = 0"
        for source in weighted(recipe)
        if facts[source.name].rows(recipe.data.seq_len) == 0
    ]


def overread_sources(recipe: Recipe, shares: Sequence[SourceShare], named: Callable[[str], str]) -> list[str]:
    """A complaint for each source that is read more often than the recipe allows.

    The order of the data follows the weights to within K rows for K sources, so K rows more are let through, and where
    epochs of all sources end together, what fills up the last step.
    """
    slack, seq_len = len(weighted(recipe)), recipe.data.seq_len
    if by_size(recipe) and recipe.train.epochs is not None:
        slack += recipe.train.global_batch_tokens // seq_len
    complaints = []
    for share in shares:
        if (
            share.available_rows is None
            or share.share is None
            or share.rows <= share.max_epochs * share.available_rows + slack
        ):
            continue
        least = share.rows / share.available_rows
        complaints.append(
            f"{named(f'data.sources.{share.name}')}: {share.tokens:,} tokens asked ({share.share:.2%} of the run),"
            f" {share.available_rows * seq_len:,} present: {least:.2f} epochs, and max_epochs allows"
            f" {share.max_epochs:g}. Prepare more of it, lower its weight, train on fewer tokens, or allow the"
            f" repeats: max_epochs = {_rounded_up(least)}"
        )
    return complaints


def _fractions(recipe: Recipe, facts: Mapping[str, SourceFacts]) -> list[Fraction]:
    """The share of each source; empty while a size that decides it is not known, or all are empty."""
    weights: list[Fraction] = []
    for source in recipe.data.sources:
        if source.weight != "size":
            weights.append(Fraction(source.weight))
        elif source.name in facts:
            weights.append(Fraction(facts[source.name].rows(recipe.data.seq_len)))
        else:
            return []
    total = sum(weights)
    return [weight / total for weight in weights] if total else []


def _apportion(fractions: Sequence[Fraction], rows: int) -> list[int]:
    """Whole rows nearest to the shares, adding up to `rows`: the largest remainders are rounded up."""
    ideal = [fraction * rows for fraction in fractions]
    parts = [int(value) for value in ideal]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - ideal[index])
    for index in by_remainder[: rows - sum(parts)]:
        parts[index] += 1
    return parts


def _rounded_up(epochs: float) -> str:
    tenths = -int(-epochs * 10 // 1)
    return f"{tenths / 10:g}"
