"""How the processes of a run are laid out: four numbers whose product is the number of processes.

    dp_replicate   groups that each hold the whole model (HSDP)
    dp_shard       processes that one copy of the model is spread over (FSDP2)
    cp             processes that share the tokens of each row
    tp             processes that share each matrix

Only the first two read different rows. The trap: a launcher that starts fewer processes than were asked for trains on,
silently, as something else; so what was started is always held against what the recipe says.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.schema import Parallel, Recipe

AXES = ("dp_replicate", "dp_shard", "cp", "tp")


@dataclass(frozen=True)
class Layout:
    """Processes along each axis, all of them always there; 1 means that the axis is not used."""

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """In the order of `AXES`: neighbours along the last axis are neighbouring processes."""
        return self.dp_replicate, self.dp_shard, self.cp, self.tp

    @property
    def world_size(self) -> int:
        return self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data_parallel(self) -> int:
        """Groups of processes that read different rows."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        used = [f"{axis}={size}" for axis, size in zip(AXES, self.sizes, strict=True) if size > 1]
        return ", ".join(used) or "1 process"


def resolve_layout(parallel: Parallel, world_size: int, provenance: Mapping[str, str] | None = None) -> Layout:
    """The layout of `world_size` processes. Raises RecipeError when they are not those of the recipe."""
    fixed = parallel.dp_replicate * parallel.cp * parallel.tp
    shard = world_size // fixed if parallel.dp_shard == "auto" else parallel.dp_shard
    if shard * fixed != world_size or shard < 1:
        raise RecipeError(_other_processes(parallel, fixed, world_size, provenance or {}))
    return Layout(parallel.dp_replicate, shard, parallel.cp, parallel.tp)


def planned_processes(recipe: Recipe) -> int:
    """Processes that the recipe is planned and inspected for: what it says, else the fewest its layout takes."""
    parallel = recipe.parallel
    shard = 1 if parallel.dp_shard == "auto" else parallel.dp_shard
    return recipe.plan.gpus or parallel.dp_replicate * shard * parallel.cp * parallel.tp


def processes(count: int) -> str:
    """`1 process`, `8 processes`."""
    return "1 process" if count == 1 else f"{count:,} processes"


def _other_processes(parallel: Parallel, fixed: int, world_size: int, provenance: Mapping[str, str]) -> str:
    given = [f"{axis} = {value}" for axis in AXES if (value := getattr(parallel, axis)) not in (1, "auto")]
    where = sorted({place for key, place in provenance.items() if key.startswith("parallel.") and place != "default"})
    origin = f" ({', '.join(where)})" if where else ""
    if parallel.dp_shard == "auto":
        takes, below = f"a multiple of {processes(fixed)}", world_size // fixed * fixed
        start = " or ".join(f"{count:,}" for count in (below, below + fixed) if count)
    else:
        takes, start = processes(fixed * parallel.dp_shard), f"{fixed * parallel.dp_shard:,}"
    auto = ', or set parallel.dp_shard = "auto"' if parallel.dp_shard != "auto" and world_size % fixed == 0 else ""
    return (
        f"[parallel] {', '.join(given) or 'dp_shard = 1'}{origin} takes {takes}, not {world_size:,}: start {start}"
        f" (`cheaptrain launch --processes`; `cheaptrain plan` goes by plan.gpus){auto}"
    )
