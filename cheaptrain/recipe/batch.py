"""One optimizer step: how its rows fall on processes, micro-batches and accumulation.

`global_batch_tokens` says what a step is; everything else must divide it exactly. The trap: a trainer that rounds here
trains on another batch than the one it reports. What does not divide is refused, with each kind of change that would
make it divide.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.layout import Layout, processes, resolve_layout
from cheaptrain.recipe.schema import Recipe

_SHORTEST_ROW = 8  # what data.seq_len takes at least


@dataclass(frozen=True)
class Batch:
    """One optimizer step: rows over the data-parallel groups of `layout`, micro-batches and accumulation."""

    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    tokens_per_step: int
    layout: Layout


def resolve_batch(recipe: Recipe, world_size: int, provenance: Mapping[str, str] | None = None) -> Batch:
    """The part that needs no facts: what one step is on `world_size` processes. Raises RecipeError."""
    named = namer(provenance)
    seq_len, batch_tokens, micro = recipe.data.seq_len, recipe.train.global_batch_tokens, recipe.train.micro_batch_size
    if world_size < 1:
        raise RecipeError(f"a run has at least 1 process, not {world_size}")
    layout = resolve_layout(recipe.parallel, world_size, provenance)
    if seq_len % (layout.cp * layout.tp):
        raise RecipeError(_row_does_not_divide(seq_len, layout, named))
    rows, left = divmod(batch_tokens, seq_len)
    if left:
        nearest = " or ".join(f"{n * seq_len:,}" for n in (rows, rows + 1) if n)
        raise RecipeError(
            f"{named('train.global_batch_tokens')}: {batch_tokens:,} is not a whole number of rows of"
            f" {named('data.seq_len')} = {seq_len:,} tokens; the nearest are {nearest}"
        )
    if rows % (layout.data_parallel * micro):
        fixed = recipe.parallel.dp_shard != "auto"
        raise RecipeError(_does_not_divide(rows, layout, micro, seq_len, fixed, named))
    return Batch(rows, micro, rows // (layout.data_parallel * micro), batch_tokens, layout)


def _row_does_not_divide(seq_len: int, layout: Layout, named: Callable[[str], str]) -> str:
    unit = layout.cp * layout.tp
    below = seq_len // unit * unit
    nearest = " or ".join(f"{n:,}" for n in (below, below + unit) if n >= _SHORTEST_ROW)
    return (
        f"{named('data.seq_len')}: rows of {seq_len:,} tokens do not divide over cp {layout.cp} x tp {layout.tp} ="
        f" {processes(unit)}, which share each row; the nearest lengths are {nearest}"
    )


def _does_not_divide(
    rows: int, layout: Layout, micro: int, seq_len: int, fixed: bool, named: Callable[[str], str]
) -> str:
    """Why `rows` rows a step do not fit, and every kind of change that would make them fit.

    `fixed`: parallel.dp_shard is a number, which another number of processes would have to change.
    """
    groups, each = layout.data_parallel, layout.cp * layout.tp
    unit = groups * micro
    micros = _divisors(rows // groups) if rows % groups == 0 else []
    batches = [n * unit * seq_len for n in (rows // unit, rows // unit + 1) if n]
    over = processes(groups) if each == 1 else f"{groups:,} groups of {processes(each)} ({layout})"

    def worlds(rows_of_all: int) -> str:
        fitting = [n for n in _divisors(rows_of_all) if n % layout.dp_replicate == 0]
        auto = ' with parallel.dp_shard = "auto"' if fixed else ""
        return f"{_listed([n * each for n in fitting], groups * each)} processes{auto}" if fitting else ""

    with_this_micro = worlds(rows // micro) if rows % micro == 0 else ""
    lines = [
        f"{named('train.micro_batch_size')}: {rows:,} rows a step (global_batch_tokens {rows * seq_len:,} / seq_len"
        f" {seq_len:,}) do not divide over {over} x micro_batch_size {micro} = {unit:,}. What would:",
        f"  with {processes(groups * each)}: "
        + (f"micro_batch_size {_listed(micros, micro)}" if micros else "no micro_batch_size"),
        f"  with micro_batch_size {micro}: {with_this_micro or 'no number of processes'}",
    ]
    if not micros and (with_another := worlds(rows)):
        lines.append(f"  with another micro_batch_size: {with_another}")
    lines.append(f"  with both as they are: global_batch_tokens {' or '.join(f'{n:,}' for n in batches)}")
    return "\n".join(lines)


def namer(provenance: Mapping[str, str] | None) -> Callable[[str], str]:
    """`key` → `key (file:line)` where it is known where the key was set."""

    def named(key: str) -> str:
        # A source is where its name is.
        origin = (provenance or {}).get(key) or (provenance or {}).get(f"{key}.name")
        return f"{key} ({origin})" if origin and origin != "default" else key

    return named


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*small, *(number // n for n in small)})


def _listed(numbers: list[int], near: int, most: int = 8) -> str:
    """Up to `most` of the numbers, those nearest to `near`: `1, 2, 3 or 4`."""
    shown = [f"{n:,}" for n in sorted(sorted(numbers, key=lambda n: abs(n - near))[:most])]
    return " or ".join(filter(None, [", ".join(shown[:-1]), shown[-1]]))
