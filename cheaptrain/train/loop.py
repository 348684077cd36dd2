"""The loop: the same for every stage.

    read a global batch → one optimizer step → enter it in the ledger → log, validate, sample, save when due

Everything that differs between stages is in what the `Stage` was put together from (`setup.py`): an objective and a
kind of rows. Everything due at a step is done *after* it and before the next, in one order, so that a run resumed from
the checkpoint of step n has exactly the records up to n and repeats none; what a stop came before is made up for first.
"""

import gc
import math
import time
from collections.abc import Collection, Sequence
from contextlib import closing
from typing import Any

import psutil
import torch

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import DivergedError, StoppedError
from cheaptrain.parallel.mesh import data_rank
from cheaptrain.say import say
from cheaptrain.train.display import Display
from cheaptrain.train.evaluating import SIGN, LightSet, score_light
from cheaptrain.train.randomness import seed_step
from cheaptrain.train.samples import write_samples
from cheaptrain.train.save import collect_save, poll_save, save
from cheaptrain.train.schedule import learning_rate
from cheaptrain.train.signals import agreed_stop
from cheaptrain.train.stage import Stage
from cheaptrain.train.step import StepResult, train_step
from cheaptrain.train.validate import validate, validation_metrics


def train(stage: Stage) -> None:
    """Train from the ledger's step to the last one, all processes together.

    Raises DivergedError (exit 4) when a step is not finite and the recipe says stop, StoppedError (exit 75) when any
    process was asked to stop, with every step done saved.
    """
    resolved, ledger, watch = stage.resolved, stage.ledger, stage.watch
    factor = learning_rate(stage.recipe.train, resolved)
    display = Display(stage.console, stage.name, resolved.steps, ledger.step)
    started_at = ledger.step
    try:
        # Also what was due after the step that the run goes on from, where a stop came before it.
        _observe(stage, first=ledger.step == 0, done=stage.processes.on_main(lambda: _observed(stage)))
        stage.root.train()
        if agreed_stop(stage.stop, stage.processes):
            _stop(stage, saved=True)
        with closing(stage.loader.prefetch(ledger.rows_seen, resolved.steps - ledger.step)) as steps:
            while ledger.step < resolved.steps:
                began = time.perf_counter()
                watch.beat("waiting for data", ledger.step + 1)
                batches = next(steps)
                watch.beat("forward and backward", ledger.step + 1)
                result = _step(stage, batches, factor(ledger.tokens_seen))
                ledger.add(result.counts, stage.loader.order.names, result, time.perf_counter() - began)
                if not result.applied:
                    _not_finite(stage, result, time.perf_counter() - began)
                asked, saved = _after_step(stage, display, result, time.perf_counter() - began)
                stage.stop.note_step(time.perf_counter() - began)
                if ledger.step == started_at + 1:
                    watch.tighten()
                    gc.collect()
                    gc.freeze()  # a full collection in the middle of training costs up to half a second
                if asked and ledger.step < resolved.steps:
                    _stop(stage, saved)
        collect_save(stage)
    finally:
        display.close()
        gc.unfreeze()


def _step(stage: Stage, batches: Sequence[RowBatch], factor: float) -> StepResult:
    context, step = stage.compute.context, stage.ledger.step
    stretch = context.rank if context else 0
    if context:
        batches = [batch.share(stretch, context.size) for batch in batches]
    share = data_rank(stage.mesh) * stage.mesh["cp"].size() + stretch
    seed_step(stage.recipe.seed, step, share)
    return train_step(
        stage.root,
        stage.optimizers,
        batches,
        mesh=stage.mesh,
        objective=stage.objective,
        compute=stage.compute,
        sources=len(stage.loader.order.names),
        learning_rate_factor=factor,
        grad_clip=stage.recipe.train.grad_clip,
        stop=bool(stage.stop),
        beat=lambda phase: stage.watch.beat(phase, step + 1),
    )


def _after_step(stage: Stage, display: Display, result: StepResult, seconds: float) -> tuple[bool, bool]:
    """Whatever is due after a step, in this order. Returns whether a process was asked to stop, and whether a save of
    this step was started."""
    step, resolved, ledger = stage.ledger.step, stage.resolved, stage.ledger
    last = step == resolved.steps
    values = _step_metrics(stage, result, seconds)
    if step % resolved.log_every == 0 or last or not result.applied:
        stage.metrics.write(step, values)
    seconds_a_token = ledger.train_seconds / max(1, ledger.tokens_seen)
    display.step(step, values, (resolved.tokens - ledger.tokens_seen) * seconds_a_token)
    poll_save(stage)
    # Asked to stop in the last step, the run is done all the same, with all its records.
    asked = (result.stop and not last) or _observe(stage, first=False)
    if step % resolved.save_every and not last:
        return asked, False
    saved = save(stage, final=last)
    return asked or agreed_stop(stage.stop, stage.processes), saved


def _step_metrics(stage: Stage, result: StepResult, seconds: float) -> dict[str, Any]:
    speed = result.counts.tokens / seconds
    taught = result.taught
    cross_entropy = taught.cross_entropy if taught else result.loss
    values: dict[str, Any] = {
        "train/loss": result.loss,
        "train/perplexity": math.exp(min(cross_entropy, 100.0)) if math.isfinite(cross_entropy) else cross_entropy,
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
    if taught:
        values |= {"train/cross_entropy": taught.cross_entropy, "kd/loss": taught.divergence}
        others = {"kd/agreement": taught.agreement, "kd/aligned": taught.aligned}
        values |= {name: value for name, value in others.items() if value is not None}
    if stage.ledger.skipped_steps:
        values["train/skipped_steps"] = stage.ledger.skipped_steps
    if stage.peak_flops:
        values["train/mfu"] = speed * stage.flops_per_token / (stage.peak_flops * stage.resolved.world_size)
    values["system/memory"] = psutil.Process().memory_info().rss  # of this process, in the machine's memory
    if stage.compute.device.type == "cuda":
        values["system/gpu_memory"] = torch.cuda.max_memory_allocated(stage.compute.device)
    return values


def _observed(stage: Stage) -> set[str]:
    """What of "validation", "samples" and "light" the records have already for the step that the run begins or goes on
    from."""
    metrics, samples = stage.run.metrics, stage.run.samples
    signs = {"validation": (metrics, "val/seconds"), "samples": (samples, "text"), "light": (metrics, SIGN)}
    return {
        what
        for what, (path, key) in signs.items()
        if any(record["step"] == stage.ledger.step and key in record for record in read_records(path))
    }


def _observe(stage: Stage, *, first: bool, done: Collection[str] = ()) -> bool:
    """Validation, samples and the light set of tasks, where they are due and not `done`. Breaks off and returns True
    when a process is asked to stop; what is broken off leaves no record."""
    step, resolved = stage.ledger.step, stage.resolved
    ends = first or step == resolved.steps

    def interrupted() -> bool:
        stage.watch.beat("validation and samples", step)
        # The last step's are not broken off: the run is done, and its records should be whole.
        return step < resolved.steps and agreed_stop(stage.stop, stage.processes)

    if stage.validation and "validation" not in done and (ends or step % resolved.validate_every == 0):
        began = time.perf_counter()
        scores = validate(stage.root, stage.validation, stage.token_bytes, stage.compute, stage.mesh, interrupted)
        if scores is None:
            return True
        values = validation_metrics(scores)
        values |= {"val/seconds": time.perf_counter() - began, "train/tokens": stage.ledger.tokens_seen}
        stage.metrics.write(step, values)
        bits = f", {values['val/bpb']:.4f} bits per byte" if "val/bpb" in values else ""
        say(stage.console, f"step {step:,}: validation loss {values['val/loss']:.4f}{bits}", "dim")
    if stage.recipe.samples.prompts and "samples" not in done and (ends or step % resolved.sample_every == 0):
        written = write_samples(
            stage.root,
            stage.tokenizer.hf,
            stage.recipe.samples,
            stage.compute,
            stage.processes,
            seed=stage.recipe.seed + step,
            interrupted=interrupted,
        )
        if len(written) < len(stage.recipe.samples.prompts):
            return True
        for sample in written:
            stage.samples.append({"step": step, **sample})
    every = resolved.light_every
    if stage.light and every and "light" not in done and (ends or step % every == 0):
        return not _score_light(stage, stage.light)
    return False


def _score_light(stage: Stage, light: LightSet) -> bool:
    """Score the tasks of the light set; False when a process was asked to stop, and nothing is recorded."""
    step, last = stage.ledger.step, stage.ledger.step == stage.resolved.steps
    scores = score_light(
        light,
        stage.model,
        stage.processes,
        stop=lambda: bool(stage.stop) and not last,
        beat=lambda allow: stage.watch.beat("scoring tasks", step, allow),
    )
    if scores is None:
        agreed_stop(stage.stop, stage.processes)
        return False
    stage.metrics.write(step, scores.metrics | {"train/tokens": stage.ledger.tokens_seen})
    say(stage.console, f"step {step:,}: {scores.line or 'no task could be scored'}", "dim")
    for failure in scores.failures:
        say(stage.console, f"step {step:,}: not scored: {failure}", "yellow")
    return True


def _not_finite(stage: Stage, result: StepResult, seconds: float) -> None:
    policy, ledger = stage.recipe.train, stage.ledger
    what = f"step {ledger.step}: loss {result.loss}, gradient norm {result.grad_norm}; the weights were not touched"
    if policy.on_nonfinite == "stop" or ledger.skipped_in_a_row >= policy.max_skipped_steps:
        stage.metrics.write(ledger.step, _step_metrics(stage, result, seconds))
        collect_save(stage)  # the last good one may be under way
        after = "" if policy.on_nonfinite == "stop" else f" ({ledger.skipped_in_a_row} skipped in a row)"
        raise DivergedError(
            f"{what}{after}. Lower train.lr or lengthen train.warmup; "
            'train.on_nonfinite = "skip" goes on past single bad batches. The last checkpoint is untouched.'
        )
    say(stage.console, f"{what}; skipped ({ledger.skipped_steps} so far)", "yellow")


def _stop(stage: Stage, saved: bool) -> None:
    """Raise StoppedError on every process, saving first what is not `saved` yet."""
    agreed_stop(stage.stop, stage.processes)  # so that all of them know by what
    step, missed = stage.ledger.step, ""
    if not saved:
        save(stage, final=False)
    if not collect_save(stage):
        missed = "; saving now failed"
    newest = stage.run.steps()[-1:]
    where = f"checkpoint {newest[0]}" if newest else "nothing is saved yet, so the run starts over"
    stage.stop.finished()
    raise StoppedError(f"{stage.stop.name}: stopped after step {step}{missed}; {where}. Run the same command to go on.")
