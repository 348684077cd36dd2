"""What goes into a checkpoint of a stage, and what the loop does about saving.

`checkpoint/` knows how to write one safely; here is what. A save is started between two steps and written while
training goes on; what came of it is taken up where all processes come by together: before the next save, when stopping,
at the end. A save that fails for lack of space costs that checkpoint, is counted, and training goes on; the last one of
a run may not fail.
"""

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from cheaptrain.checkpoint.load import ADAPTER, saved_tensors
from cheaptrain.checkpoint.state import optimizer_tensors
from cheaptrain.checkpoint.verify import CARD
from cheaptrain.checkpoint.write import CheckpointParts
from cheaptrain.errors import CheaptrainError
from cheaptrain.model.lora import adapters
from cheaptrain.model.twin import plain_twin
from cheaptrain.report.model_card import CardFacts, model_card
from cheaptrain.say import say
from cheaptrain.train.saving import allowed_difference, live_logits, prove_saved
from cheaptrain.train.stage import Stage


def save(stage: Stage, *, final: bool) -> bool:
    """Save the stage as it stands after its last step, in the background if the recipe says so and it is not `final`.

    True when the checkpoint stands or is being written, False when the disk refused and training may go on. An earlier
    save still under way is waited for. Raises SaveFailed for the last checkpoint of a run, ProofFailed whenever what
    was written is not the live model. Collective.
    """
    began = time.perf_counter()
    collect_save(stage)
    _sync_records(stage)  # first: a run goes on from a checkpoint and never writes again what led up to it
    started = stage.saving.saver.start(stage.ledger.step, _parts(stage, final), final=final, began=began)
    if started and stage.saving.saver.asynchronous and not final:
        return True
    return collect_save(stage)


def poll_save(stage: Stage) -> None:
    """Take up what came of the save under way, if it is done on every process. Raises as `collect_save` does.
    Collective."""
    if stage.saving.saver.finished():
        collect_save(stage)


def collect_save(stage: Stage) -> bool:
    """Wait for the save under way and take up what came of it; False when the disk refused. True when there is none.

    Raises SaveFailed for the last checkpoint of a run, ProofFailed when what was written is not the live model.
    Collective.
    """
    ledger = stage.ledger
    # Once, not by the clock: a save that hangs on a dead disk must be found.
    patience = stage.recipe.parallel.start_timeout
    stage.watch.beat("waiting for a checkpoint", ledger.step, allow_seconds=patience)
    outcome = stage.saving.saver.wait()
    if outcome is None:
        return True
    stage.stop.note_save(outcome.seconds)
    values: dict[str, Any] = {
        "checkpoint/step": outcome.step,
        "checkpoint/stall_seconds": outcome.stall_seconds,
        "checkpoint/seconds": outcome.seconds,
        "checkpoint/bytes": outcome.nbytes,
    }
    if outcome.failure is not None:
        if outcome.final:
            raise outcome.failure
        ledger.failed_saves += 1
        values = {"checkpoint/step": outcome.step, "checkpoint/failed": ledger.failed_saves}
    for message in outcome.reports:
        say(stage.console, message)
    if outcome.failure is not None:
        say(stage.console, f"{outcome.failure}; training goes on", "yellow")
    # At the step where it is known, so that records stay in order; checkpoint/step says which save it was.
    stage.metrics.write(ledger.step, values)
    return outcome.failure is None


def _sync_records(stage: Stage) -> None:
    """Put metrics and samples on the disk. A disk that refuses is no reason to end the run: they are tried again."""
    for file in (stage.metrics.file, stage.samples):
        try:
            file.sync()
        except CheaptrainError as error:
            say(stage.console, f"{error} so far; training goes on", "yellow")


def _parts(stage: Stage, final: bool) -> CheckpointParts:
    form = stage.saving.form
    stage.watch.beat("starting a checkpoint", stage.ledger.step)
    logits = live_logits(stage.root, stage.proof_ids, stage.compute, stage.processes)
    trained = adapters(stage.model)
    # After the forward pass: it makes parameters their shards again.
    weights = saved_tensors(plain_twin(stage.model) if trained else stage.model)
    names = {parameter: name for name, parameter in stage.model.named_parameters()}
    tensors, scalars = optimizer_tensors(stage.optimizers, names)
    tensors |= {f"{ADAPTER}{name}": tensor for name, tensor in trained.items()}
    with_state = not final or stage.recipe.checkpoint.state_in_final
    return CheckpointParts(
        weights=weights,
        files={**form.files, CARD: _card(stage, weights).encode()} if form else {},
        prove=partial(
            prove_saved,
            form,
            logits,
            stage.proof_ids.cpu(),
            allowed_difference(stage.processes, stage.compute, merged=bool(trained)),
        ),
        recipe=stage.saved_recipe,
        tokens_seen=stage.ledger.tokens_seen,
        lineage=stage.lineage,
        state_tensors=tensors if with_state else None,
        state_scalars={
            "ledger": stage.ledger.to_json(),
            "run_id": stage.run_id,
            "optimizer": scalars,
        },
        estimated_bytes=stage.checkpoint_bytes,
    )


def _card(stage: Stage, weights: Mapping[str, Tensor]) -> str:
    config, ledger = stage.model.config, stage.ledger
    return model_card(
        CardFacts(
            name=stage.name,
            recipe=stage.recipe,
            run=stage.run,
            step=ledger.step,
            steps=stage.resolved.steps,
            tokens=ledger.tokens_seen,
            supervised_tokens=ledger.supervised_tokens,
            source_tokens=ledger.source_tokens,
            kind=type(stage.model).__name__,
            parameters=sum(tensor.numel() for tensor in weights.values()),
            positions=getattr(config, "max_position_embeddings", None) or stage.recipe.data.seq_len,
            vocabulary=config.vocab_size,
        )
    )
