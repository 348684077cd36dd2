"""What the recipes ask of the machine: processes, environment, attention shape, precision, disks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cheaptrain.doctor.findings import Finding, doubt, note
from cheaptrain.doctor.storage import Place
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.config import model_config
from cheaptrain.recipe.layout import resolve_layout
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.recipe.schema import Parallel
from cheaptrain.recipe.shares import shares_of_run
from cheaptrain.report.costs import Disk, checkpoint_disk, data_disk
from cheaptrain.report.sources import plan_sources
from cheaptrain.train.outlook import Outlook, survey_leniently
from cheaptrain.train.space import checkpoint_bytes

_MOST_ON_CPU = 8  # processes of a recipe for a cluster, tried on a laptop
_ROW = 256  # tokens of the rows that attention is tried with; plain arithmetic in fp64 stands beside it


@dataclass(frozen=True)
class Subject:
    """`world`: processes of the run; `here`: how many of them to start here. `shape` of one attention layer."""

    world: int
    here: int
    env: dict[str, str]
    precision: str
    compiled: bool
    shape: dict[str, int]
    places: list[Place]
    open_questions: tuple[str, ...]

    def findings(self) -> list[Finding]:
        """What of the recipes stays open here."""
        found = [note("recipe", question) for question in self.open_questions]
        if self.here < self.world:
            found.append(
                doubt(
                    "processes",
                    f"the recipe takes {self.world}, of which this machine can start {self.here}",
                    "run the doctor on every machine, and on all of them together:\n"
                    "accelerate launch (as for training) -m cheaptrain.doctor.probe",
                )
            )
        return found


def find_subject(recipes: Sequence[LoadedRecipe], processes: int | None, *, gpus: int) -> Subject:
    """Read the recipes as far as they can be read here. Raises RecipeError and PreflightError as `examine` does."""
    world, here = count_processes([loaded.recipe.parallel for loaded in recipes], processes, gpus)
    outlooks: list[Outlook] = []
    for loaded in recipes:
        resolve_layout(loaded.recipe.parallel, world, loaded.provenance)
        outlooks.append(survey_leniently(loaded, world, outlooks))
    settings = [loaded.recipe.train for loaded in recipes]
    precisions = [train.precision for train in settings]
    return Subject(
        world=world,
        here=here,
        env={name: value for loaded in recipes for name, value in loaded.recipe.env.items()},
        precision=next((precision for precision in precisions if precision != "fp32"), *precisions[:1] or ["auto"]),
        compiled=any(train.compile == "layers" or (train.compile == "auto" and gpus > 0) for train in settings),
        shape=next((shape for outlook in outlooks if (shape := _shape(outlook))), {}),
        places=_places(outlooks) or [Place("this folder", Path.cwd(), needed=0)],
        open_questions=tuple(
            dict.fromkeys(f"{o.loaded.path}: {question}" for o in outlooks for question in o.open_questions)
        ),
    )


def count_processes(layouts: Sequence[Parallel], processes: int | None, gpus: int) -> tuple[int, int]:
    """Processes of the run, and those to start here: as asked for, else what [parallel] says, else one a GPU."""
    if processes is not None:
        if processes < 1:
            raise RecipeError(f"--processes {processes}: give 1 or more")
        if 0 < gpus < processes:
            raise PreflightError(f"--processes {processes}: this machine has {gpus} GPUs, and each process takes one")
        return processes, processes
    fixed = {
        layout.dp_replicate * layout.dp_shard * layout.cp * layout.tp for layout in layouts if layout.dp_shard != "auto"
    }
    if not fixed:
        world = max(1, gpus)
        return world, world
    world = max(fixed)
    return world, min(world, gpus or _MOST_ON_CPU)


def _shape(outlook: Outlook) -> dict[str, int]:
    """The model's attention, as far as it is known."""
    if outlook.facts is None or outlook.vocab_size is None:
        return {}
    seq_len = outlook.recipe.data.seq_len
    config = model_config(outlook.model, vocab_size=outlook.vocab_size, seq_len=seq_len)
    heads = config.num_attention_heads
    return {
        "heads": heads,
        "kv_heads": getattr(config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "seq": min(seq_len, _ROW),
    }


def _places(outlooks: Sequence[Outlook]) -> list[Place]:
    """Folders of all stages, each once. Stages that share their data share its space; runs add up."""
    found: dict[tuple[str, Path], Place] = {}
    for outlook in outlooks:
        recipe, facts, resolved = outlook.recipe, outlook.facts, outlook.resolved
        shares = resolved.shares if resolved else shares_of_run(recipe, 0)
        sources = plan_sources(recipe.data, shares, dict(outlook.manifests), resolved is not None)
        data = data_disk(recipe, sources, outlook.vocab_size)
        disk = checkpoint_disk(recipe, facts, resolved) if facts is not None and resolved is not None else None
        run = Place(
            "run.dir",
            Path(recipe.run.dir),
            disk.needed if disk else None,
            checkpoint_bytes(facts, recipe.train) if facts is not None else None,
        )
        for place in (run, Place("data.dir", data.path, _known(data))):
            before = found.get((place.name, place.path))
            if before is None or (place.needed or 0) > (before.needed or 0):
                found[place.name, place.path] = place
    return list(found.values())


def _known(disk: Disk) -> int | None:
    """What is to come; None when a part of it is not known (the plan says of which)."""
    return None if disk.how else disk.needed
