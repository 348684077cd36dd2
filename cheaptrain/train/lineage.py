"""What a stage is made from, each by its hash, and whether it still is that.

A stage that is finished is skipped, so the trap is a stage whose ancestor was trained anew: its weights are those of a
model that is no more, and skipping it would carry them into every later stage. The run folder keeps the hash of what
the stage started from and learned from; here it is held against what lies there now, for all stages before the first
step of the first one. Nothing is ever deleted: the remedy is another folder.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.rundir import another_run, changes, read_run
from cheaptrain.checkpoint.verify import stated_fingerprint, verify_init_from
from cheaptrain.data.topk_cache import open_cache
from cheaptrain.durable import sha256_of
from cheaptrain.errors import PreflightError
from cheaptrain.model.hub import model_folder
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.parents import PARENT_KEYS, parents
from cheaptrain.train.survey import Survey, written_by


def inputs_of(survey: Survey) -> dict[str, Any]:
    """What the run is made from, each by its hash. Raises PreflightError for a model that is missing or damaged."""
    inputs = _at_hand(survey)
    for name, model in parents(survey.loaded.recipe).items():
        inputs[name] = verify_init_from(model_folder(model), PARENT_KEYS[name]).fingerprint
    return inputs


def changed_since(surveys: Sequence[Survey]) -> Iterator[str]:
    """What is wrong with stages that were trained before: from something else than they would be now."""
    for number, survey in enumerate(surveys):
        loaded, run = survey.loaded, RunDirectory(Path(survey.loaded.recipe.run.dir))
        try:
            kept, now = read_run(run), _at_hand(survey)
        except FileNotFoundError:
            continue
        except PreflightError as error:
            yield f"{loaded.path}: {error}"
            continue
        stale = False
        for name, model in parents(loaded.recipe).items():
            before, path = kept["inputs"].get(name), str(model.init_from)
            now[name] = before  # of a folder that is nobody's run, it is seen when the stage is opened and hashes it
            writer = written_by(path, surveys[:number])
            if Path(path).exists():
                now[name] = stated_fingerprint(Path(path)) or before
                reason = "holds other weights now"
            elif writer is not None and before is not None:
                now[name] = None
                reason = f"is gone, and {writer.loaded.path} would train it anew"
            if before is not None and now[name] != before:
                stale = True
                yield (
                    f"{loaded.path}: {run.path} is stale: {PARENT_KEYS[name]} = {path!r}, which it was trained from, "
                    f"{reason}. Give it another run.dir or move {run.path} away, to train it anew; nothing is deleted"
                )
        recorded = {"identity": identity(loaded.recipe), "provenance": loaded.provenance, "inputs": now}
        if not stale and (lines := changes(kept, recorded)):
            yield f"{loaded.path}: {another_run(run, lines)}"


def _at_hand(survey: Survey) -> dict[str, Any]:
    """The inputs that are known without reading a weight."""
    inputs: dict[str, Any] = {
        "tokenizer": survey.tokenizer.fingerprint,
        "data": {name: manifest.fingerprint for name, manifest in survey.manifests.items()},
    }
    model = survey.loaded.recipe.model
    if model.config is not None:
        inputs["config"] = sha256_of(model_folder(model) / "config.json")
    distill = survey.loaded.recipe.distill
    if distill is not None and distill.cache is not None:  # the same teacher, at hand or not
        inputs["teacher"] = open_cache(Path(distill.cache)).spec.made_from["teacher"]
    return inputs
