"""The loop: the same for every stage.

    read a global batch → one optimizer step → enter it in the ledger → log, validate, sample, save when due

Everything that differs between stages is in what the `Stage` was put together from (`setup.py`): an objective and a
kind of rows. Everything due at a step is done *after* it and before the next, in one order, so that a run resumed from
the checkpoint of step n has exactly the records up to n and repeats none.
"""

import gc
import math
import time
from contextlib import closing
from typing import Any

import torch

from cheaptrain.errors import DivergedError, StoppedError
from cheaptrain.say import say
from cheaptrain.train.display import Display
from cheaptrain.train.objective import OBJECTIVES
from cheaptrain.train.samples import write_samples
from cheaptrain.train.save import save
from cheaptrain.train.schedule import learning_rate
from cheaptrain.train.stage import Stage
from cheaptrain.train.step import StepResult, train_step
from cheaptrain.train.validate import validate, validation_metrics


def train(stage: Stage) -> None:
    """Train from the ledger's step to the last one.

    Raises DivergedError (exit 4) when a step is not finite and the recipe says stop, StoppedError (exit 75) after a
    signal, with every step done saved.
    """
    resolved, ledger = stage.resolved, stage.ledger
    factor = learning_rate(stage.recipe.train, resolved)
    display = Display(stage.console, stage.name, resolved.steps, ledger.step)
    if ledger.step == 0:
        _observe(stage, first=True)
    stage.model.train()
    started_at = ledger.step
    try:
        if stage.stop:
            _stop(stage, saved=True)
        with closing(stage.loader.prefetch(ledger.rows_seen, resolved.steps - ledger.step)) as steps:
            while ledger.step < resolved.steps:
                began = time.perf_counter()
                batches = next(steps)
                result = train_step(
                    stage.model,
                    stage.optimizers,
                    batches,
                    objective=OBJECTIVES[stage.recipe.train.objective],
                    compute=stage.compute,
                    learning_rate_factor=factor(ledger.tokens_seen),
                    grad_clip=stage.recipe.train.grad_clip,
                )
                ledger.add(batches, stage.loader.order.names, result, time.perf_counter() - began)
                if not result.applied:
                    _not_finite(stage, result, time.perf_counter() - began)
                saved = _after_step(stage, display, result, time.perf_counter() - began)
                if ledger.step == started_at + 1:
                    gc.collect()
                    gc.freeze()  # a full collection in the middle of training costs up to half a second
                if stage.stop and ledger.step < resolved.steps:
                    _stop(stage, saved)
    finally:
        display.close()
        gc.unfreeze()


def _after_step(stage: Stage, display: Display, result: StepResult, seconds: float) -> bool:
    """Whatever is due after a step, in this order; whether a checkpoint of it stands now."""
    step, resolved, ledger = stage.ledger.step, stage.resolved, stage.ledger
    last = step == resolved.steps
    values = _step_metrics(stage, result, seconds)
    if step % resolved.log_every == 0 or last or not result.applied:
        stage.metrics.write(step, values)
    seconds_a_step = ledger.train_seconds / max(1, step)
    display.step(step, values, (resolved.steps - step) * seconds_a_step)
    _observe(stage, first=False)
    return (step % resolved.save_every == 0 or last) and save(stage, final=last) is not None


def _step_metrics(stage: Stage, result: StepResult, seconds: float) -> dict[str, Any]:
    speed = result.tokens / seconds
    values: dict[str, Any] = {
        "train/loss": result.loss,
        "train/perplexity": math.exp(min(result.loss, 100.0)) if math.isfinite(result.loss) else result.loss,
        "train/accuracy": result.accuracy,
        "train/learning_rate": result.learning_rate,
        "train/grad_norm": result.grad_norm,
        "train/tokens": stage.ledger.tokens_seen,
        "train/supervised_tokens": stage.ledger.supervised_tokens,
        "train/tokens_per_second": speed,
        "train/tokens_per_second_per_gpu": speed / stage.resolved.world_size,
        "train/step_seconds": seconds,
        **{f"data/{name}/tokens": count for name, count in sorted(stage.ledger.source_tokens.items())},
    }
    if stage.ledger.skipped_steps:
        values["train/skipped_steps"] = stage.ledger.skipped_steps
    if stage.peak_flops:
        values["train/mfu"] = speed * stage.flops_per_token / (stage.peak_flops * stage.resolved.world_size)
    if stage.compute.device.type == "cuda":
        values["system/gpu_memory"] = torch.cuda.max_memory_allocated(stage.compute.device)
    return values


def _observe(stage: Stage, *, first: bool) -> None:
    """Validation and samples, where they are due."""
    step, resolved = stage.ledger.step, stage.resolved
    ends = first or step == resolved.steps
    if stage.validation and (ends or step % resolved.validate_every == 0):
        began = time.perf_counter()
        values = validation_metrics(validate(stage.model, stage.validation, stage.token_bytes, stage.compute))
        values |= {"val/seconds": time.perf_counter() - began, "train/tokens": stage.ledger.tokens_seen}
        stage.metrics.write(step, values)
        bits = f", {values['val/bpb']:.4f} bits per byte" if "val/bpb" in values else ""
        say(stage.console, f"step {step:,}: validation loss {values['val/loss']:.4f}{bits}", "dim")
    if stage.recipe.samples.prompts and (ends or step % resolved.sample_every == 0):
        for sample in write_samples(
            stage.model, stage.tokenizer.hf, stage.recipe.samples, seed=stage.recipe.seed + step
        ):
            stage.samples.append({"step": step, **sample})


def _not_finite(stage: Stage, result: StepResult, seconds: float) -> None:
    policy, ledger = stage.recipe.train, stage.ledger
    what = f"step {ledger.step}: loss {result.loss}, gradient norm {result.grad_norm}; the weights were not touched"
    if policy.on_nonfinite == "stop" or ledger.skipped_in_a_row >= policy.max_skipped_steps:
        stage.metrics.write(ledger.step, _step_metrics(stage, result, seconds))
        after = "" if policy.on_nonfinite == "stop" else f" ({ledger.skipped_in_a_row} skipped in a row)"
        raise DivergedError(
            f"{what}{after}. Lower train.lr or lengthen train.warmup; "
            'train.on_nonfinite = "skip" goes on past single bad batches. The last checkpoint is untouched.'
        )
    say(stage.console, f"{what}; skipped ({ledger.skipped_steps} so far)", "yellow")


def _stop(stage: Stage, saved: bool) -> None:
    """Raise StoppedError, saving first what is not `saved` yet."""
    step, missed = stage.ledger.step, ""
    if not saved and save(stage, final=False) is None:
        missed = "; saving now failed"
    newest = stage.run.steps()[-1:]
    where = f"checkpoint {newest[0]}" if newest else "nothing is saved yet, so the run starts over"
    raise StoppedError(f"{stage.stop.name}: stopped after step {step}{missed}; {where}. Run the same command to go on.")
