"""Writing checkpoints: all of one, or nothing.

A checkpoint is a transformers folder with `state/` beside the weights for resuming. It is written under a temporary
name, put on the disk, hashed, proven (the weights just written give the logits of the live model), described in
manifest.json and only then renamed, which the file system does at once or not at all. The trap is the error path: a
full disk is met in the middle of a save, so every way out removes the temporary folder, and the older checkpoints
are touched only after the new one stands.

`SaveFailed` (no space, a disk error) costs one checkpoint and training may go on; `ProofFailed` means that what is
written is not the model, so every later save would be as wrong, and the run stops.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

import cheaptrain
from cheaptrain.checkpoint.paths import DELETING, WRITING, RunDirectory
from cheaptrain.checkpoint.state import restore_rng, rng_tensors
from cheaptrain.checkpoint.state_files import write_state
from cheaptrain.checkpoint.verify import (
    FORMAT,
    FORMAT_VERSION,
    MANIFEST,
    RECIPE,
    STATE,
    Report,
    examine,
    listed_files,
    seal,
    verify_checkpoint,
)
from cheaptrain.durable import canonical_json, sha256_of_all, sync, sync_tree, write_json
from cheaptrain.errors import CheaptrainError

_log = logging.getLogger(__name__)

# What may lie in a checkpoint: safetensors, JSON and tokenizer text; everything else could be pickled.
_SAFE_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
_SPARE_BYTES = 2**20  # for file system bookkeeping and small files


class SaveFailed(CheaptrainError):
    """A checkpoint could not be written. The older ones are intact, the temporary folder is gone, the run may go on."""


class ProofFailed(CheaptrainError):
    """What was written is not the live model. The run must stop: no later save can be trusted either."""


@dataclass(frozen=True)
class CheckpointParts:
    """What goes into a checkpoint. The callables keep this module from knowing any model class."""

    write_model: Callable[[Path], None]  # config.json, generation_config.json, model*.safetensors
    write_tokenizer: Callable[[Path], None]
    prove: Callable[[Path], Mapping[str, Any]]  # reload from the folder, compare logits; its figures go to the manifest
    recipe: Mapping[str, Any]  # resolved recipe and where each value came from
    tokens_seen: int
    lineage: Mapping[str, Any]  # identity and input hashes
    state_tensors: Mapping[str, Tensor] | None = field(default_factory=dict)  # None: save without state
    state_scalars: Mapping[str, Any] = field(default_factory=dict)
    estimated_bytes: int | None = None  # of the whole checkpoint; default: the last one's, or reckoned from the state


def save_checkpoint(run: RunDirectory, *, step: int, parts: CheckpointParts, report: Report = _log.warning) -> Path:
    """Write the checkpoint of `step` and return its folder.

    A good checkpoint of the same step, tokens and lineage that is already there is kept and nothing is written; a
    damaged one is set aside under another name; both go to `report`. Raises SaveFailed or ProofFailed; in both
    cases, as with any other way out, nothing of the attempt is left.
    """
    target = run.step(step)
    temporary = run.checkpoints / f"{WRITING}{target.name}-{os.getpid()}"
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if _already_there(target, parts, report):
            return target
        _check_space(run, parts)
        temporary.mkdir()
        _write(temporary, step, parts)
        os.rename(temporary, target)
        sync(run.checkpoints)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, SaveFailed | ProofFailed) or not _is_disk_trouble(error):
            raise
        left = f" ({temporary} could not be removed)" if temporary.exists() else ""
        raise SaveFailed(
            f"checkpoint of step {step} not saved in {run.checkpoints}: {error}{left}. "
            "The older checkpoints are intact. Free space there, or lower checkpoint.keep_last, or give another run.dir"
        ) from error
    return target


def prune(
    run: RunDirectory, *, keep_last: int, keep_every_steps: int | None, report: Report = _log.warning
) -> list[Path]:
    """Delete what the recipe does not keep, after a save that succeeded; returns what was deleted.

    Kept: the newest `keep_last`, every multiple of `keep_every_steps`, and the one that `final` points to. Nothing
    is deleted when the newest is not whole (by presence and size). A folder loses its name before its files, so no
    reader and no crash ever meets half of one.
    """
    folders = run.steps()
    if not folders:
        return []
    if problems := verify_checkpoint(folders[-1], hashes=False):
        report(f"no old checkpoint deleted, because the newest is damaged: {folders[-1]}: {problems[0]}")
        return []
    kept = set(folders[-max(1, keep_last) :])
    kept |= {folder for folder in folders if keep_every_steps and int(folder.name[5:]) % keep_every_steps == 0}
    if run.final.is_symlink():
        kept.add(run.checkpoints / run.final.readlink().name)
    deleted = [folder for folder in folders if folder not in kept]
    for folder in deleted:
        doomed = run.checkpoints / f"{DELETING}{folder.name}-{os.getpid()}"
        try:
            os.rename(folder, doomed)
            sync(run.checkpoints)
            shutil.rmtree(doomed)
        except OSError as error:
            report(f"old checkpoint {folder} not deleted: {error}")
    return deleted


def finish(run: RunDirectory, step: int) -> Path:
    """Point `final` at the checkpoint of `step`, at once; returns the link. Raises CheaptrainError when it cannot."""
    target = run.step(step)
    if problems := verify_checkpoint(target, hashes=False):
        raise CheaptrainError(f"{target} cannot become {run.final}: {problems[0]}")
    temporary = run.path / f".final-{os.getpid()}"
    try:
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target.relative_to(run.path), target_is_directory=True)
        os.replace(temporary, run.final)
        sync(run.path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheaptrainError(
            f"{run.final} cannot be pointed at {target}: {error}. "
            "The checkpoint itself is whole and can be used by its path"
        ) from error
    return run.final


def set_aside(folder: Path, report: Report) -> Path:
    """Rename a damaged checkpoint so that nothing takes it for one; nothing is deleted."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.bad-{number}")).exists():
        number += 1
    os.rename(folder, aside)
    sync(folder.parent)
    report(f"damaged checkpoint {folder.name} set aside as {aside}")
    return aside


def unsafe_files(folder: Path) -> list[str]:
    """Files below `folder` that have no place in a checkpoint."""
    return [name for name in listed_files(folder) if Path(name).suffix not in _SAFE_SUFFIXES]


def _already_there(target: Path, parts: CheckpointParts, report: Report) -> bool:
    if not target.exists():
        return False
    manifest, problems = examine(target)
    if manifest is None or problems:
        report(f"{target}: {'; '.join(map(str, problems[:5]))}")
        set_aside(target, report)
        return False
    there, here = (manifest["tokens_seen"], manifest["lineage"]), (parts.tokens_seen, dict(parts.lineage))
    if canonical_json(there) == canonical_json(here):
        report(f"{target} is already there and whole: kept, not written again")
        return True
    raise SaveFailed(f"{target} is a whole checkpoint of something else; move it away, or give another run.dir")


def _check_space(run: RunDirectory, parts: CheckpointParts) -> None:
    needed = _SPARE_BYTES + (parts.estimated_bytes or _estimate(run, parts))
    free = shutil.disk_usage(run.checkpoints).free
    if free < needed:
        raise SaveFailed(
            f"checkpoint not saved: {run.checkpoints} has {free / 1e9:,.3f} GB free, "
            f"and it takes about {needed / 1e9:,.3f} GB. "
            "The older checkpoints are intact. Free space there, or lower checkpoint.keep_last, or give another run.dir"
        )


def _estimate(run: RunDirectory, parts: CheckpointParts) -> int:
    state = sum(tensor.nbytes for tensor in (parts.state_tensors or {}).values())
    newest = run.steps()[-1:]
    names = [(folder, name) for folder in newest for name in listed_files(folder)]
    without_state = parts.state_tensors is None
    last = sum((f / n).stat().st_size for f, n in names if not (without_state and n.startswith(f"{STATE}/")))
    # AdamW keeps two moments a weight, so weights and state are at most three halves of the state.
    return max(last, state + state // 2)


def _write(folder: Path, step: int, parts: CheckpointParts) -> None:
    """Fill `folder` and put all of it on the disk, manifest last."""
    parts.write_model(folder)
    parts.write_tokenizer(folder)
    write_json(folder / RECIPE, dict(parts.recipe))
    if parts.state_tensors is not None:
        write_state(folder / STATE, parts.state_tensors, parts.state_scalars)
    names = listed_files(folder)
    if unsafe := unsafe_files(folder):
        raise ProofFailed(
            f"a checkpoint holds safetensors and JSON only, nothing that could be pickled: {', '.join(unsafe)}"
        )
    sync_tree(folder)
    hashes = sha256_of_all(folder / name for name in names)
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "tokens_seen": parts.tokens_seen,
        "files": {n: {"bytes": (folder / n).stat().st_size, "sha256": hashes[folder / n]} for n in names},
        "lineage": dict(parts.lineage),
        "proof": _proof(folder, parts),
        "versions": {
            "cheaptrain": cheaptrain.__version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
        },
    }
    write_json(folder / MANIFEST, seal(manifest))
    sync(folder)


def _proof(folder: Path, parts: CheckpointParts) -> dict[str, Any]:
    random_states = rng_tensors()
    try:
        proof = dict(parts.prove(folder))
    except CheaptrainError:
        raise
    except Exception as error:
        # transformers raises OSError without a number for a folder it cannot load; one with a number is the disk's.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ProofFailed(
            f"the weights just written cannot be loaded again: {type(error).__name__}: {error}"
        ) from error
    finally:
        # Building a model draws random numbers; training must not depend on how often it is saved.
        restore_rng(random_states)
    unfit = [key for key, value in proof.items() if isinstance(value, float) and not math.isfinite(value)]
    if unfit:
        raise ProofFailed(f"the proof of the weights just written is not finite: {', '.join(unfit)}")
    return proof


def _is_disk_trouble(error: BaseException) -> bool:
    """Whether the disk refused, however the library at hand says so (tokenizers raises a bare Exception)."""
    if isinstance(error, OSError | SafetensorError):
        return True
    return isinstance(error, Exception) and "os error" in str(error)
