"""What goes into a checkpoint of a stage, and the proof that it is the live model.

`checkpoint/write.py` knows how to write one safely; here is what. A save that fails for lack of space costs that
checkpoint, is counted, and training goes on; the last one of a run may not fail.
"""

import time
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from cheaptrain.checkpoint.state import optimizer_tensors, rng_tensors
from cheaptrain.checkpoint.write import CheckpointParts, ProofFailed, SaveFailed, finish, prune, save_checkpoint
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.errors import CheaptrainError
from cheaptrain.model.proof import plain_twin
from cheaptrain.model.saving import load_saved, save_model
from cheaptrain.recipe.schema import Tokenizer
from cheaptrain.say import say
from cheaptrain.train.stage import Stage


def save(stage: Stage, *, final: bool) -> Path | None:
    """Save the stage as it stands after its last step; None when the disk refused and training may go on.

    Raises SaveFailed for the last checkpoint of a run, ProofFailed whenever what was written is not the live model.
    """
    began, ledger = time.perf_counter(), stage.ledger
    report = partial(say, stage.console)
    _sync_records(stage)  # first: a run goes on from a checkpoint and never writes again what led up to it
    try:
        path = save_checkpoint(stage.run, step=ledger.step, parts=_parts(stage, final), report=report)
    except SaveFailed as error:
        if final:
            raise
        ledger.failed_saves += 1
        stage.metrics.write(ledger.step, {"checkpoint/failed": ledger.failed_saves})
        say(stage.console, f"{error}; training goes on", "yellow")
        return None
    if final:
        finish(stage.run, ledger.step)
    prune(
        stage.run,
        keep_last=stage.recipe.checkpoint.keep_last,
        keep_every_steps=stage.resolved.keep_every,
        report=report,
    )
    stage.metrics.write(ledger.step, {"checkpoint/seconds": time.perf_counter() - began})
    return path


def _sync_records(stage: Stage) -> None:
    """Put metrics and samples on the disk. A disk that refuses is no reason to end the run: they are tried again."""
    for file in (stage.metrics.file, stage.samples):
        try:
            file.sync()
        except CheaptrainError as error:
            say(stage.console, f"{error} so far; training goes on", "yellow")


def _save_tokenizer(stage: Stage, folder: Path) -> None:
    stage.tokenizer.hf.save_pretrained(folder)


def _parts(stage: Stage, final: bool) -> CheckpointParts:
    with_state = not final or stage.recipe.checkpoint.state_in_final
    names = {parameter: name for name, parameter in stage.model.named_parameters()}
    tensors, scalars = optimizer_tensors(stage.optimizers, names)
    return CheckpointParts(
        write_model=lambda folder: save_model(stage.model, folder),
        write_tokenizer=lambda folder: _save_tokenizer(stage, folder),
        prove=lambda folder: _prove(stage, folder),
        recipe=stage.saved_recipe,
        tokens_seen=stage.ledger.tokens_seen,
        lineage=stage.lineage,
        state_tensors={**tensors, **rng_tensors()} if with_state else None,
        state_scalars={
            "ledger": stage.ledger.to_json(),
            "run_id": stage.run_id,
            "optimizer": scalars,
        },
        estimated_bytes=stage.checkpoint_bytes,
    )


@torch.no_grad()
def _prove(stage: Stage, folder: Path) -> dict[str, Any]:
    """Reload from `folder` as anyone would, and compare every weight, the logits of fixed tokens, where generating
    ends, and the tokenizer."""
    saved: Any = load_saved(folder)
    saved = saved.to(stage.compute.device).eval()
    live = plain_twin(stage.model).eval()
    written = dict(saved.named_parameters())
    for name, parameter in live.named_parameters():
        if name not in written or not torch.equal(written[name], parameter):
            raise ProofFailed(f"{folder}: {name} was not written as it is in the live model")
    difference = (saved(stage.proof_ids).logits - live(stage.proof_ids).logits).abs().max().item()
    if difference != 0.0:
        raise ProofFailed(f"{folder}: reloaded logits differ from the live model's by {difference:g}")
    for part, key in product(("config", "generation_config"), ("bos_token_id", "eos_token_id", "pad_token_id")):
        if getattr(getattr(saved, part), key) != getattr(getattr(live, part), key):
            raise ProofFailed(f"{folder}: {key} of {part} is not what it is in the live model")
    again = load_tokenizer(Tokenizer(path=str(folder)), stage.recipe.data)
    if again.fingerprint != stage.tokenizer.fingerprint:
        raise ProofFailed(f"{folder}: the tokenizer written is not the one trained with")
    return {"max_abs_difference": difference, "tokens": stage.proof_ids.numel()}
