"""The loop: the same for every stage.

    read a global batch → one optimizer step → enter it in the ledger → log, validate, sample, save when due

Everything that differs between stages is in what the `Stage` was put together from (`setup.py`): an objective and a
kind of rows. Everything due at a step is done *after* it and before the next, in one order, so that a run resumed from
the checkpoint of step n has exactly the records up to n and repeats none; what a stop came before is made up for first.
"""

import gc
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from cheaptrain.checkpoint.jsonl import read_records
from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import DivergedError, StoppedError
from cheaptrain.model.compiled import CompileCounts, compile_counts
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
from cheaptrain.train.step import StartedStep, StepResult, train_step
from cheaptrain.train.validate import validate, validation_metrics
from cheaptrain.units import duration


def train(stage: Stage) -> None:
    """Train from the ledger's step to the last one, all processes together.

    Raises DivergedError (exit 4) when a step is not finite and the recipe says stop, StoppedError (exit 75) when any
    process was asked to stop, with every step done saved.
    """
    resolved, ledger, watch = stage.resolved, stage.ledger, stage.watch
    factor = learning_rate(stage.recipe.train, resolved)
    display = Display(stage.console, stage.name, resolved.steps, ledger.step)
    started_at, compiled = ledger.step, compile_counts()
    stage.stop.steps_ahead = stage.steps_ahead
    try:
        # Also what was due after the step that the run goes on from, where a stop came before it.
        _observe(stage, first=ledger.step == 0, done=stage.processes.on_main(lambda: _observed(stage)))
        stage.root.train()
        if agreed_stop(stage.stop, stage.processes):
            _stop(stage, saved=True)
        with closing(stage.loader.prefetch(ledger.rows_seen, resolved.steps - started_at, _ready(stage))) as steps:
            ahead: deque[_Handed] = deque()
            done = time.perf_counter()  # when the device had done the last step, as far as anybody here knows
            for step in range(started_at + 1, resolved.steps + 1):
                ahead.append(_hand_over(stage, steps, step, factor))
                allowed = 0 if step == started_at + 1 or _due(stage, step) else stage.steps_ahead
                asked = saved = False
                while len(ahead) > (0 if asked else allowed):
                    now_asked, saved, done = _finish(stage, display, ahead.popleft(), done)
                    asked = asked or now_asked
                if step == started_at + 1:
                    _note_start(stage, compiled)
                    watch.tighten()
                    gc.collect()
                    gc.freeze()  # a full collection in the middle of training costs up to half a second
                if asked and ledger.step < resolved.steps:
                    _stop(stage, saved)
        collect_save(stage)
    finally:
        display.close()
        gc.unfreeze()


@dataclass(frozen=True)
class _Handed:
    """A step that was handed over, and when its turn began."""

    number: int
    step: StartedStep
    began: float


def _hand_over(stage: Stage, steps: Iterator[list[RowBatch]], number: int, factor: Callable[[int], float]) -> _Handed:
    began = time.perf_counter()
    stage.watch.beat("waiting for data", number)
    batches = next(steps)
    stage.watch.beat("forward and backward", number)
    # What the steps still under way will add is known: a step that reads anything else ends the run.
    tokens = stage.ledger.tokens_seen + (number - 1 - stage.ledger.step) * stage.resolved.tokens_per_step
    return _Handed(number, _step(stage, batches, number, factor(tokens)), began)


def _finish(stage: Stage, display: Display, handed: _Handed, done_before: float) -> tuple[bool, bool, float]:
    """Enter a step in the ledger once it is done, and do what is due after it; answers as `_after_step` does, and when
    the step was done. `done_before`: when the one before was."""
    stage.watch.beat("waiting for the device", handed.number)
    result = handed.step.result()
    done = time.perf_counter()
    # Handed over early, it had the device to itself once the step before was done, whatever the host did meanwhile.
    since = max(handed.began, done_before)
    seconds = done - since
    stage.ledger.add(result.counts, stage.loader.order.names, result, seconds)
    if not result.applied:
        _not_finite(stage, result, seconds)
    asked, saved = _after_step(stage, display, result, seconds)
    stage.stop.note_step(time.perf_counter() - since)
    return asked, saved, done


def _note_start(stage: Stage, before: CompileCounts) -> None:
    """Enter in the record of the launch, and say if layers were compiled, how long the first step was in coming."""
    seconds = time.perf_counter() - stage.began
    now = compile_counts()
    graphs, found = now.graphs - before.graphs, now.from_cache - before.from_cache
    took = now.seconds - before.seconds
    stage.note({"first_step": {"seconds": seconds, "graphs": graphs, "graphs_found": found, "compiling_seconds": took}})
    if graphs:
        where = f", {found} of {graphs} graphs were there from an earlier start" if found else ""
        say(stage.console, f"first step after {duration(seconds)}, {duration(took)} of it compiling{where}", "dim")


def _due(stage: Stage, step: int) -> bool:
    """Whether something needs the weights of exactly this step."""
    resolved = stage.resolved
    every = [
        resolved.save_every,
        resolved.validate_every if stage.validation else 0,
        resolved.sample_every if stage.recipe.samples.prompts else 0,
        resolved.light_every if stage.light else 0,
    ]
    return step == resolved.steps or any(step % each == 0 for each in every if each)


def _ready(stage: Stage) -> Callable[[list[RowBatch]], list[RowBatch]]:
    """What is left to do for a batch that needs no device; runs in the reader's thread."""
    context, pin = stage.compute.context, stage.compute.device.type == "cuda"

    def ready(batches: list[RowBatch]) -> list[RowBatch]:
        if context:
            batches = [batch.share(context.rank, context.size) for batch in batches]
        return [batch.pinned() for batch in batches] if pin else batches

    return ready


def _step(stage: Stage, batches: Sequence[RowBatch], number: int, factor: float) -> StartedStep:
    context = stage.compute.context
    share = data_rank(stage.mesh) * stage.mesh["cp"].size() + (context.rank if context else 0)
    seed_step(stage.recipe.seed, number - 1, share)
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
        beat=lambda phase: stage.watch.beat(phase, number),
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
    if result.cross_entropy is not None:
        cross_entropy = result.cross_entropy
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
    if result.cross_entropy is not None:
        values |= {"train/cross_entropy": cross_entropy, "train/z_loss": result.loss - cross_entropy}
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
