"""Writing checkpoints: all of one, or nothing, by however many processes.

A checkpoint is a transformers folder with `state/` beside the weights for resuming. It is written under a temporary
name, put on the disk, hashed, proven, described in manifest.json and only then renamed, which the file system does at
once or not at all. That is two phases. `prepare` happens between two steps, with all processes: is there space, and
what lies on each of them now. `write_checkpoint` may happen while training goes on: each process writes its part, reads
its own slices again and tells the main one, which proves the whole and commits it.

The trap is the error path: a full disk is met in the middle of a save, by one process of many, so every way out goes
through all of them, the temporary folder goes when nobody writes into it any more, and the older checkpoints are
touched only after the new one stands.

`SaveFailed` (no space, a disk error) costs one checkpoint and training may go on; `ProofFailed` means that what is
written is not the model, so every later save would be as wrong, and the run stops.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import cheaptrain
from cheaptrain.checkpoint.blocks import Block, deal, local_block, places_of
from cheaptrain.checkpoint.paths import WRITING, RunDirectory
from cheaptrain.checkpoint.retention import set_aside
from cheaptrain.checkpoint.snapshot import Buffers, live_blocks
from cheaptrain.checkpoint.state_files import TRAINER, write_state
from cheaptrain.checkpoint.together import ProofFailed, SaveFailed, all_do, gather, is_disk_trouble, on_first
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
)
from cheaptrain.checkpoint.weights import compare_weights, files_of_weights, owners_of, write_index, write_weights
from cheaptrain.durable import canonical_json, sha256_of, sync, sync_tree, write_json
from cheaptrain.errors import CheaptrainError
from cheaptrain.parallel.processes import Processes

_log = logging.getLogger(__name__)

# What may lie in a checkpoint: safetensors, JSON and tokenizer text; everything else could be pickled.
_SAFE_SUFFIXES = {".safetensors", ".json", ".jinja", ".txt", ".model", ".md"}
_SPARE_BYTES = 2**20  # for file system bookkeeping and small files


@dataclass(frozen=True)
class CheckpointParts:
    """What goes into a checkpoint. `weights` and `state_tensors` are the live ones, sharded or not, by name; of the
    rest only the main process's counts. Bytes and callables keep this module from knowing any model class."""

    weights: Mapping[str, Tensor]
    files: Mapping[str, bytes]  # config.json, generation_config.json, the tokenizer's: by path in the folder
    prove: Callable[[Path], Mapping[str, Any]]  # from the folder alone; raises ProofFailed; figures for the manifest
    recipe: Mapping[str, Any]  # resolved recipe and where each value came from
    tokens_seen: int
    lineage: Mapping[str, Any]  # identity and input hashes
    state_tensors: Mapping[str, Tensor] | None = field(default_factory=dict)  # None: save without state
    state_scalars: Mapping[str, Any] = field(default_factory=dict)
    estimated_bytes: int | None = None  # of the whole checkpoint; default: reckoned from the tensors


@dataclass(frozen=True)
class Attempt:
    """A save that all processes have agreed to make, and what this one holds for it."""

    step: int
    target: Path
    temporary: Path | None  # None: the checkpoint is there already
    parts: CheckpointParts
    weights: Mapping[str, Block] = field(default_factory=dict)
    state: Mapping[str, Block] = field(default_factory=dict)


@dataclass(frozen=True)
class Saved:
    """A checkpoint that stands."""

    path: Path
    nbytes: int  # written for it; 0 when it was there already


Files = dict[str, dict[str, Any]]  # size and SHA-256 by name, as the manifest has them


def prepare(
    run: RunDirectory,
    *,
    step: int,
    parts: CheckpointParts,
    processes: Processes,
    buffers: Buffers | None = None,
    report: Report = _log.warning,
) -> Attempt:
    """Agree on the save of `step` and take what this process holds: a copy in `buffers`, or without them the live
    tensors, which then may not change until it is written. Collective, on the training thread.

    A good checkpoint of the same step, tokens and lineage that is already there is kept and nothing will be written; a
    damaged one is set aside under another name; both go to `report`. Raises SaveFailed.
    """
    target = run.step(step)
    temporary = processes.on_main(lambda: _make_room(run, target, parts, report))
    if temporary is None:
        return Attempt(step, target, None, parts)
    take = buffers.copy if buffers is not None else live_blocks
    taken: Mapping[str, Block] = {}
    trouble = ""
    try:
        # One call: what a call of `copy` gave is overwritten by the next.
        taken = take({**_named("weights", parts.weights), **_named("state", parts.state_tensors or {})})
    except (RuntimeError, MemoryError) as error:  # memory that a GPU can copy to is scarce, and not on all alike
        trouble = f"process {processes.rank} has no memory for its copy: {' '.join(str(error).split())}"
    except BaseException:
        if processes.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if troubles := [found for found in processes.all_of(trouble) if found]:
        if processes.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
        raise SaveFailed(
            f"checkpoint of step {step} not saved: {troubles[0]}. Set checkpoint.asynchronous = false, which needs none"
        )
    weights, state = (_unnamed(kind, taken) for kind in ("weights", "state"))
    return Attempt(step, target, temporary, parts, weights, state)


def write_checkpoint(attempt: Attempt, processes: Processes, then: Callable[[Path], None] = lambda path: None) -> Saved:
    """Write what was prepared, prove it, give it its name, and call `then` on the main process. Collective, over the
    group of saving, on any thread.

    Raises SaveFailed or ProofFailed on all processes; in both cases, as with any other way out before the renaming,
    nothing of the attempt is left. Raises CheaptrainError when a process is gone: then the next start clears up.
    """
    nbytes = 0
    if attempt.temporary is not None:
        with _all_or_nothing(attempt, processes):
            files = _write_parts(attempt, processes)
            nbytes = on_first(processes, lambda: _commit(attempt, files, processes))
    on_first(processes, lambda: then(attempt.target))
    return Saved(attempt.target, nbytes)


def save_checkpoint(
    run: RunDirectory, *, step: int, parts: CheckpointParts, processes: Processes, report: Report = _log.warning
) -> Path:
    """`prepare` and `write_checkpoint` in one, while training waits; returns the folder."""
    return write_checkpoint(prepare(run, step=step, parts=parts, processes=processes, report=report), processes).path


def unsafe_files(folder: Path) -> list[str]:
    """Files below `folder` that have no place in a checkpoint."""
    return [name for name in listed_files(folder) if Path(name).suffix not in _SAFE_SUFFIXES]


def _make_room(run: RunDirectory, target: Path, parts: CheckpointParts, report: Report) -> Path | None:
    """The empty temporary folder; None when the checkpoint is there already."""
    try:
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        if _already_there(target, parts, report):
            return None
        _check_space(run, parts)
        temporary = run.checkpoints / f"{WRITING}{target.name}-{os.getpid()}"
        temporary.mkdir()
        if parts.state_tensors is not None:
            (temporary / STATE).mkdir()
    except OSError as error:
        raise _save_failed(target, error) from error
    return temporary


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
    tensors = [*parts.weights.values(), *(parts.state_tensors or {}).values()]
    reckoned = sum(local_block(tensor)[0].whole_nbytes for tensor in tensors)
    needed = _SPARE_BYTES + (parts.estimated_bytes or reckoned + sum(map(len, parts.files.values())))
    free = shutil.disk_usage(run.checkpoints).free
    if free < needed:
        raise SaveFailed(
            f"checkpoint not saved: {run.checkpoints} has {free / 1e9:,.3f} GB free, "
            f"and it takes about {needed / 1e9:,.3f} GB. "
            "The older checkpoints are intact. Free space there, or lower checkpoint.keep_last, or give another run.dir"
        )


def _write_parts(attempt: Attempt, processes: Processes) -> Files:
    """Every process's part, on the disk, hashed and read again; sizes and hashes of all files with tensors."""
    folder = attempt.temporary
    assert folder is not None
    held = gather(processes, (places_of(attempt.weights), places_of(attempt.state)))
    shapes = {name: place for places, _ in held for name, place in places.items()}
    weight_files = files_of_weights({name: shapes[name] for name in sorted(shapes)})
    owners = owners_of(weight_files, processes.size)
    owner_of = {name: owners[file] for file, names in weight_files.items() for name in names}
    weights = deal([places for places, _ in held], owner_of.__getitem__)
    state = deal([places for _, places in held])

    def write() -> Files:
        written = write_weights(folder, weight_files, weights, attempt.weights, processes)
        if processes.is_main:
            write_index(folder, weight_files, shapes)
        if attempt.parts.state_tensors is not None:
            written += write_state(folder / STATE, state, attempt.state, processes.rank)
        return _facts(folder, written)

    files = {name: facts for part in all_do(processes, write) for name, facts in part.items()}
    all_do(processes, lambda: compare_weights(folder, weight_files, attempt.weights))
    return files


def _commit(attempt: Attempt, files: Files, processes: Processes) -> int:
    """What the main process does alone: small files, proof, manifest, and the name. Returns the bytes of all files."""
    folder, parts = attempt.temporary, attempt.parts
    assert folder is not None
    for name, content in parts.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_json(folder / RECIPE, dict(parts.recipe))
    if parts.state_tensors is not None:
        write_json(folder / STATE / TRAINER, dict(parts.state_scalars))
    names = listed_files(folder)
    if unsafe := unsafe_files(folder):
        raise ProofFailed(
            f"a checkpoint holds safetensors and JSON only, nothing that could be pickled: {', '.join(unsafe)}"
        )
    sync_tree(folder)
    files = files | _facts(folder, [folder / name for name in names if name not in files])
    for name, content in parts.files.items():
        if (folder / name).read_bytes() != content:
            raise ProofFailed(f"{folder / name} is not what was written")
    manifest = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": attempt.step,
        "tokens_seen": parts.tokens_seen,
        "processes": processes.size,
        "files": files,
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
    nbytes = (folder / MANIFEST).stat().st_size + sum(facts["bytes"] for facts in files.values())
    os.rename(folder, attempt.target)
    sync(attempt.target.parent)
    return nbytes


def _facts(folder: Path, paths: Iterable[Path]) -> Files:
    """One after the other, unlike where a reader waits for it: training has better use for the processors."""
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }


def _proof(folder: Path, parts: CheckpointParts) -> dict[str, Any]:
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
    unfit = [key for key, value in proof.items() if isinstance(value, float) and not math.isfinite(value)]
    if unfit:
        raise ProofFailed(f"the proof of the weights just written is not finite: {', '.join(unfit)}")
    return proof


@contextmanager
def _all_or_nothing(attempt: Attempt, processes: Processes) -> Iterator[None]:
    """Whatever happens, no temporary folder stays; what the disk did becomes SaveFailed."""
    assert attempt.temporary is not None
    try:
        yield
    except BaseException as error:
        # By now all have stopped writing: an error gets here only once each has reported, or when one of them is gone.
        if processes.is_main:
            shutil.rmtree(attempt.temporary, ignore_errors=True)
        if isinstance(error, SaveFailed | ProofFailed) or not is_disk_trouble(error):
            raise
        left = f" ({attempt.temporary} could not be removed)" if attempt.temporary.exists() else ""
        raise _save_failed(attempt.target, error, left if processes.is_main else "") from error


def _save_failed(target: Path, error: BaseException, left: str = "") -> SaveFailed:
    return SaveFailed(
        f"checkpoint {target.name} (step {int(target.name[5:])}) not saved in {target.parent}: {error}{left}. "
        "The older checkpoints are intact. Free space there, or lower checkpoint.keep_last, or give another run.dir"
    )


def _named(kind: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{kind}:{name}": tensor for name, tensor in tensors.items()}


def _unnamed(kind: str, blocks: Mapping[str, Block]) -> dict[str, Block]:
    prefix = f"{kind}:"
    return {name.removeprefix(prefix): block for name, block in blocks.items() if name.startswith(prefix)}
