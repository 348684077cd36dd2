"""`cheaptrain distill-cache`: a teacher is asked once about exactly the rows a run will read, and its word is kept.

It is asked in the portions and with the kernel that a teacher at hand is asked with under `distill.top_k`, so the
numbers are the same. Shards that are there are left as they are: killed at any moment, the command goes on, and several
machines may share the work. What is read back: `cached_teacher.py`.
"""

import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from cheaptrain_kernels import teacher_top_k
from rich.console import Console

from cheaptrain.data.open import open_rows
from cheaptrain.data.rows import RowSource, build_rows
from cheaptrain.data.stream import Int64
from cheaptrain.data.topk_cache import CacheSpec, Said, begin_cache, finish_cache, has_shard, write_shard
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.processes import join, leave
from cheaptrain.recipe.layout import Layout, planned_processes
from cheaptrain.recipe.load import LoadedRecipe
from cheaptrain.say import say
from cheaptrain.train.cached_teacher import cache_spec, teacher_fingerprint
from cheaptrain.train.setup import compute_of
from cheaptrain.train.survey import Survey, mixture_order, survey
from cheaptrain.train.teacher import Teacher, load_teacher
from cheaptrain.units import size


def fill_cache(loaded: LoadedRecipe, part: tuple[int, int] | None, console: Console) -> None:
    """Ask the teacher about every row of the run that is not in `distill.cache` yet; `part` (k, n): of every nth shard,
    from the kth on.

    Raises RecipeError for a recipe without a cache, PreflightError for what is not prepared or does not fit.
    """
    distill = loaded.recipe.distill
    if distill is None or distill.cache is None:
        raise RecipeError(f"{loaded.path}: name the folder to fill in distill.cache (and distill.top_k)")
    folder = Path(distill.cache)
    asking = loaded.recipe.model_copy(update={"distill": distill.model_copy(update={"cache": None})})
    surveyed = survey(replace(loaded, recipe=asking), planned_processes(asking))
    spec = begin_cache(folder, cache_spec(surveyed, teacher_fingerprint(distill)))
    k, n = part or (1, 1)
    mine = [number for number in range(k - 1, spec.shards, n) if not has_shard(folder, spec, number)]
    say(
        console,
        f"{folder}: {spec.rows:,} rows in {spec.shards:,} shards, {size(spec.rows * spec.row_bytes)}; "
        f"{len(mine):,} to fill here",
    )
    to_come = sum(len(spec.shard_rows(number)) for number in mine) * spec.row_bytes
    if to_come > (free := shutil.disk_usage(folder).free):
        raise PreflightError(
            f"{folder}: {size(to_come)} to come, {size(free)} free: free space, or give another distill.cache"
        )
    if mine:
        _ask(surveyed, spec, folder, mine, console)
    if missing := finish_cache(folder, spec):
        say(console, f"{len(missing):,} shards are left to other parts; the last one to end finishes the cache")
    else:
        say(console, f"{folder} is complete")


def _ask(surveyed: Survey, spec: CacheSpec, folder: Path, shards: list[int], console: Console) -> None:
    recipe, distill = surveyed.loaded.recipe, surveyed.loaded.recipe.distill
    assert distill is not None and distill.top_k is not None
    processes = join(recipe.parallel.start_timeout)
    try:
        mesh = make_mesh(Layout(), processes.device.type)
        compute = compute_of(surveyed, processes, mesh)
        teacher = load_teacher(
            distill,
            vocab_size=surveyed.tokenizer.size,
            head_rows=surveyed.config.vocab_size,
            seq_len=spec.seq_len,
            mesh=mesh,
            processes=processes,
            compute=compute,
            compile_layers=recipe.train.compile == "layers"
            or (recipe.train.compile == "auto" and processes.device.type == "cuda"),
        )
        order = mixture_order(recipe, surveyed.sources)
        sources = [
            open_rows(surveyed.manifests[name], recipe.data, recipe.seed, recipe.train.assistant_only)
            for name in order.names
        ]
        for number in shards:
            rows, began, parts = spec.shard_rows(number), time.perf_counter(), list[Said]()
            for first in range(rows.start, rows.stop, recipe.train.micro_batch_size):
                numbers = np.arange(first, min(first + recipe.train.micro_batch_size, rows.stop))
                of, row, _ = order.locate(numbers)
                parts.append(_said(teacher, sources, of, row, spec, distill.temperature))
            together = (
                np.concatenate([getattr(each, name) for each in parts])
                for name in ("ids", "log_probabilities", "log_rest")
            )
            write_shard(folder, spec, number, Said(*together))
            speed = len(rows) * spec.seq_len / (time.perf_counter() - began)
            say(console, f"shard {number + 1:,} of {spec.shards:,}: {speed:,.0f} tokens/s")
    finally:
        leave()


def _said(
    teacher: Teacher, sources: Sequence[RowSource], of: Int64, rows: Int64, spec: CacheSpec, temperature: float
) -> Said:
    batch = build_rows(sources, of, rows).to(teacher.compute.device)
    head = teacher.says(batch)
    top = teacher_top_k(
        head.hidden,
        head.weight,
        spec.top_k,
        temperature=temperature,
        vocab=spec.vocab,
        chunk_tokens=teacher.compute.loss_chunk_tokens,
    )
    shape = (len(rows), spec.seq_len)
    return Said(
        top.ids.view(*shape, spec.top_k).cpu().numpy(),
        top.log_probabilities.view(*shape, spec.top_k).cpu().numpy(),
        top.log_rest.view(shape).cpu().numpy(),
    )
