"""A teacher that is read from the disk: what `cheaptrain distill-cache` kept of its word on every row of a run.

The teacher itself is never loaded then, and need not be there. Row i of the run is entry i of the cache, whatever the
number of processes. Before step 0 a cache of other rows, of another tokenizer, temperature or teacher is refused:
numbers of the same shape about something else would be learnt without a complaint.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cheaptrain_kernels import TopK

from cheaptrain.checkpoint.verify import verify_init_from
from cheaptrain.data.rows import RowBatch
from cheaptrain.data.topk_cache import CacheSpec, TopKCache, differences, open_cache, rows_per_shard
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.model.context import Context
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.parents import teacher_model
from cheaptrain.recipe.schema import Distill
from cheaptrain.train.sending import send
from cheaptrain.train.survey import Survey, mixture_order
from cheaptrain.train.teacher import speaking_of_the_teacher


@dataclass(frozen=True)
class CachedTeacher:
    """Reads what the teacher said of each batch, for this process's stretch of its rows."""

    cache: TopKCache
    context: Context | None

    def says(self, batch: RowBatch) -> TopK:
        """As `Teacher.says`, of rows that a loader numbered."""
        assert batch.numbers is not None, "rows of a run are numbered by its loader"
        said = self.cache.read(batch.numbers)
        here = slice(None)
        if self.context is not None:
            stretch = self.cache.spec.seq_len // self.context.size
            here = slice(self.context.rank * stretch, (self.context.rank + 1) * stretch)
        k, device = self.cache.spec.top_k, batch.labels.device
        return TopK(
            send(torch.from_numpy(said.ids[:, here].astype(np.int32)), device).view(-1, k),
            send(torch.from_numpy(said.log_probabilities[:, here].copy()), device).view(-1, k),
            send(torch.from_numpy(said.log_rest[:, here].copy()), device).view(-1),
        )


def cache_of(surveyed: Survey) -> TopKCache:
    """The finished cache of a recipe that names one. Raises PreflightError when it is none, or of something else: other
    rows, another tokenizer, another teacher where that is here to be compared."""
    distill = surveyed.loaded.recipe.distill
    assert distill is not None and distill.cache is not None
    cache = open_cache(Path(distill.cache))
    said_by = str(cache.spec.made_from.get("teacher"))
    try:
        here = teacher_fingerprint(distill)
    except (PreflightError, RecipeError):
        here = said_by  # a teacher that is not here is taken at the recipe's word
    if differing := differences(cache.spec, cache_spec(surveyed, here)):
        raise PreflightError(
            f"distill.cache: {cache.folder} is the cache of something else ({'; '.join(differing)}): name another "
            "folder and run `cheaptrain distill-cache` on this recipe"
        )
    return cache


def cache_spec(surveyed: Survey, teacher: str) -> CacheSpec:
    """What the cache of a recipe has to be."""
    recipe, distill = surveyed.loaded.recipe, surveyed.loaded.recipe.distill
    assert distill is not None
    if distill.top_k is None:
        raise RecipeError("distill.top_k: say how many of the teacher's tokens a cache holds")
    order = mixture_order(recipe, surveyed.sources)
    made_from: dict[str, Any] = {
        "teacher": teacher,
        "precision": distill.precision,
        "temperature": distill.temperature,
        "tokenizer": surveyed.tokenizer.fingerprint,
        "data": {name: surveyed.manifests[name].fingerprint for name in order.names},
        "seed": recipe.seed,
        "weights": {source.name: source.weight for source in recipe.data.sources if source.name in order.names},
        "rows": dict(zip(order.names, order.rows, strict=True)),
        "document_mask": recipe.data.document_mask,
    }
    spec = CacheSpec(
        made_from=made_from,
        rows=surveyed.resolved.rows,
        seq_len=recipe.data.seq_len,
        top_k=distill.top_k,
        vocab=surveyed.tokenizer.size,
        rows_per_shard=1,
    )
    return replace(spec, rows_per_shard=rows_per_shard(spec.row_bytes, recipe.train.micro_batch_size))


def teacher_fingerprint(distill: Distill) -> str:
    """A hash over the files of the teacher. Raises PreflightError when it is not here, or damaged."""
    with speaking_of_the_teacher():
        return verify_init_from(model_folder(teacher_model(distill)), "distill.teacher").fingerprint
