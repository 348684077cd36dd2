"""Time, money and disk of a run. What nobody stated or measured is left unknown: a made-up hour is worse than none."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.topk_cache import CacheSpec
from cheaptrain.recipe.resolve import ModelFacts, Resolved
from cheaptrain.recipe.schema import Distill, Recipe
from cheaptrain.report.device import Device
from cheaptrain.report.sources import SourcePlan
from cheaptrain.report.speed import StepTime
from cheaptrain.train.space import checkpoint_bytes, checkpoints_at_once
from cheaptrain.units import size

_FEWEST_MEASURED = 3  # steps; fewer are warm-up of caches and compilers


@dataclass(frozen=True)
class Speed:
    """Tokens a second of one process, and where the figure comes from."""

    tokens_per_second: float
    source: str


@dataclass(frozen=True)
class Disk:
    """What lies in a folder already, and what the run will add. `estimated`: sizes guessed from raw text."""

    name: str
    path: Path
    there: int
    needed: int
    how: str
    estimated: bool = False

    @property
    def free(self) -> int:
        """Bytes free where the folder is or will be."""
        return shutil.disk_usage(_existing(self.path)).free

    @property
    def device(self) -> int:
        """Tells file systems apart."""
        return _existing(self.path).stat().st_dev


def expected_speed(
    recipe: Recipe, tokens_per_step: int, processes: int, device: Device, step: StepTime | None
) -> Speed | None:
    """As stated, else as measured in this run directory, else as assumed for the layout, else None."""
    if recipe.plan.tokens_per_second is not None:
        return Speed(recipe.plan.tokens_per_second, "plan.tokens_per_second")
    metrics = RunDirectory(Path(recipe.run.dir)).metrics
    # What was measured counts for the very machine it was measured on.
    if device.here and (measured := measured_speed(metrics, on_gpu=device.is_gpu)):
        return measured
    if device.gpu is not None and step is not None:
        share = recipe.plan.mfu
        waiting = f", and {step.waiting / step.total:.0%} of the step waiting for messages" if step.waiting else ""
        again = ", layers computed again" if recipe.train.activation_checkpointing else ""
        return Speed(
            tokens_per_step / step.total / processes,
            f"assumed: {share:.0%} (plan.mfu) of the {device.gpu.flops / 1e12:,.0f} TFLOP/s of one "
            f"{device.gpu.name}{again}{waiting}",
        )
    return None


def measured_speed(metrics: Path, *, on_gpu: bool) -> Speed | None:
    """The median of `train/tokens_per_second_per_gpu` in a run's metrics; None without enough steps of this kind."""
    if not metrics.is_file():
        return None
    speeds = []
    with open(metrics, encoding="utf-8") as lines:
        for line in lines:
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the torn last line of a run that died
            if ("system/gpu_memory" in record) == on_gpu and record.get("train/tokens_per_second_per_gpu"):
                speeds.append(record["train/tokens_per_second_per_gpu"])
    if len(speeds) < _FEWEST_MEASURED:
        return None
    return Speed(median(speeds), f"measured: median of {len(speeds):,} steps in {metrics}")


def data_disk(recipe: Recipe, sources: Sequence[SourcePlan], vocab_size: int | None) -> Disk:
    """Prepared tokens, and about what preparing the rest would add."""
    width = 4 if vocab_size is None or vocab_size > 65_536 else 2
    missing = [source for source in sources if source.prepared_tokens is None]
    folder = Path(recipe.data.dir)
    unknown = [source.name for source in missing if source.tokens_estimated is None]
    named = ", ".join(unknown) if len(unknown) <= 3 else f"{len(unknown)} sources"
    return Disk(
        "data",
        folder,
        sum(source.prepared_bytes for source in sources),
        width * sum(source.tokens_estimated or 0 for source in missing),
        f"and what {named} will take, which is not known" if unknown else "",
        estimated=bool(missing),
    )


def cache_disk(distill: Distill, resolved: Resolved, vocab_size: int) -> list[Disk]:
    """What a cached teacher takes, if the recipe names one."""
    if distill.cache is None or distill.top_k is None:
        return []
    folder = Path(distill.cache)
    spec = CacheSpec({}, resolved.rows, resolved.seq_len, distill.top_k, vocab_size, 1)
    there = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    how = f"{distill.top_k:,} tokens a position, {size(spec.row_bytes)} a row: cheaptrain distill-cache"
    return [Disk("teacher", folder, there, max(0, spec.rows * spec.row_bytes - there), how)]


def checkpoint_disk(recipe: Recipe, facts: ModelFacts, resolved: Resolved | None) -> Disk:
    """Checkpoints that lie there at once, less those of this run that are there already. Where the length of the run is
    not known, those of `checkpoint.keep_last` and the new one."""
    run = RunDirectory(Path(recipe.run.dir))
    if resolved is None:
        each, count = checkpoint_bytes(facts, recipe.train), recipe.checkpoint.keep_last + 1
        kept = "" if recipe.checkpoint.keep_every is None else ", and those of checkpoint.keep_every"
        return Disk("checkpoints", run.path, 0, each * count, f"{count} at once, {size(each)} each{kept}")
    each, count = checkpoint_bytes(facts, recipe.train), checkpoints_at_once(resolved, recipe.checkpoint)
    present = min(count, len(run.steps()))
    return Disk(
        "checkpoints",
        run.path,
        each * present,
        each * max(1, count - present),
        f"{count} at once, {size(each)} each",
    )


def _existing(path: Path) -> Path:
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
