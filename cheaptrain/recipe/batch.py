"""One optimizer step: how its rows fall on processes, micro-batches and accumulation.

`global_batch_tokens` says what a step is; everything else must divide it exactly. The trap: a trainer that rounds here
trains on another batch than the one it reports. What does not divide is refused, with each kind of change that would
make it divide.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.schema import Recipe


@dataclass(frozen=True)
class Batch:
    """One optimizer step: rows over processes, micro-batches and accumulation."""

    rows_per_step: int
    micro_batch_size: int
    accumulation: int
    tokens_per_step: int


def resolve_batch(recipe: Recipe, world_size: int, provenance: Mapping[str, str] | None = None) -> Batch:
    """The part that needs no facts: what one step is on `world_size` processes. Raises RecipeError."""
    named = namer(provenance)
    seq_len, batch_tokens, micro = recipe.data.seq_len, recipe.train.global_batch_tokens, recipe.train.micro_batch_size
    if world_size < 1:
        raise RecipeError(f"a run has at least 1 process, not {world_size}")
    rows, left = divmod(batch_tokens, seq_len)
    if left:
        nearest = " or ".join(f"{n * seq_len:,}" for n in (rows, rows + 1) if n)
        raise RecipeError(
            f"{named('train.global_batch_tokens')}: {batch_tokens:,} is not a whole number of rows of"
            f" {named('data.seq_len')} = {seq_len:,} tokens; the nearest are {nearest}"
        )
    if rows % (world_size * micro):
        raise RecipeError(_does_not_divide(rows, world_size, micro, seq_len, named))
    return Batch(rows, micro, rows // (world_size * micro), batch_tokens)


def _does_not_divide(rows: int, world: int, micro: int, seq_len: int, named: Callable[[str], str]) -> str:
    """Why `rows` rows a step do not fit, and every kind of change that would make them fit."""
    unit = world * micro
    micros = _divisors(rows // world) if rows % world == 0 else []
    worlds = _divisors(rows // micro) if rows % micro == 0 else []
    batches = [n * unit * seq_len for n in (rows // unit, rows // unit + 1) if n]
    lines = [
        f"{named('train.micro_batch_size')}: {rows:,} rows a step (global_batch_tokens {rows * seq_len:,} / seq_len"
        f" {seq_len:,}) do not divide over {_processes(world)} x micro_batch_size {micro} = {unit:,}. What would:",
        f"  with {_processes(world)}: "
        + (f"micro_batch_size {_listed(micros, micro)}" if micros else "no micro_batch_size"),
        f"  with micro_batch_size {micro}: "
        + (f"{_listed(worlds, world)} processes" if worlds else "no number at all"),
    ]
    if not micros:
        lines.append(f"  with another micro_batch_size: {_listed(_divisors(rows), world)} processes")
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


def _processes(world: int) -> str:
    return "1 process" if world == 1 else f"{world} processes"
