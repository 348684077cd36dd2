"""What a plan warns of, and what makes a run impossible. Each sentence says what, how much, and what to do."""

from collections.abc import Iterator

from cheaptrain.report.costs import Disk
from cheaptrain.report.reckon import PlanReport
from cheaptrain.units import duration, human, size

_LOSS_SECONDS = 2 * 3600  # of work that a crash may cost without a warning
_LONG_WARMUP = 0.1
_MUCH_PADDING = 0.1


def impossibilities(report: PlanReport) -> list[str]:
    """Why this run cannot end well; empty when nothing is known against it, or when it is planned for elsewhere."""
    return list(_space(report)) if report.device.here else []


def warnings(report: PlanReport) -> list[str]:
    """What is probably not meant, or will hurt later."""
    return [*_space(report), *_memory(report), *_data(report), *_training(report), *_crash(report)]


def _space(report: PlanReport) -> Iterator[str]:
    """File systems that what is to come does not fit on."""
    where = "" if report.device.here else " on this machine"
    by_place: dict[int, list[Disk]] = {}
    for disk in report.disks:
        by_place.setdefault(disk.device, []).append(disk)
    for disks in by_place.values():
        needed, free = sum(disk.needed for disk in disks), disks[0].free
        if needed > free:
            what = " and ".join(f"{disk.name} in {disk.path} ({size(disk.needed)})" for disk in disks if disk.needed)
            about = "about " if any(disk.estimated and disk.needed for disk in disks) else ""
            yield (
                f"{size(free)} free{where}, and {what} need {about}{size(needed)}: free space, set run.dir or "
                "data.dir to another disk, or keep fewer checkpoints (checkpoint.keep_last, checkpoint.keep_every)"
            )


def _memory(report: PlanReport) -> Iterator[str]:
    if report.fits is None or report.memory is None:
        return
    remedy = f"{report.fits} would fit" if report.fits else "even one row with activation checkpointing does not fit"
    device = f"{report.device.name} ({size(report.device.memory_bytes)})"
    yield f"memory: {size(report.memory.peak)} a process do not fit {device}: {remedy}"


def _data(report: PlanReport) -> Iterator[str]:
    for source in report.sources:
        if source.epochs is not None and source.epochs > 1:
            yield f"{source.name} is read {source.epochs:.2f} times (allowed: {source.max_epochs:g})"
        if source.val_tokens is not None and source.val_tokens < 2 and report.recipe.data.validation > 0:
            yield f"{source.name} has no held-out document: no validation loss; raise data.validation or add documents"
    if report.recipe.data.validation == 0:
        yield "data.validation = 0: nothing is held out, there will be no validation loss"


def _training(report: PlanReport) -> Iterator[str]:
    resolved, config = report.outlook.resolved, report.config
    if resolved is not None and resolved.tokens_per_parameter is not None and resolved.tokens_per_parameter < 1:
        yield f"{resolved.tokens_per_parameter:.2g} tokens a parameter: less than 1, against 20 of Chinchilla"
    if resolved is not None and resolved.warmup_tokens > _LONG_WARMUP * resolved.tokens:
        yield f"warm-up takes {resolved.warmup_tokens / resolved.tokens:.0%} of the run"
    if config is not None and report.outlook.vocab_size is not None:
        padded = 1 - report.outlook.vocab_size / config.vocab_size
        if padded > _MUCH_PADDING:
            yield (
                f"{padded:.0%} of the vocabulary of {config.vocab_size:,} is never used (the tokenizer has "
                f"{report.outlook.vocab_size:,}): lower model.vocab_multiple"
            )


def _crash(report: PlanReport) -> Iterator[str]:
    resolved, speed = report.outlook.resolved, report.speed
    if resolved is None or speed is None:
        return
    steps = min(resolved.save_every, resolved.steps)
    seconds = steps * resolved.tokens_per_step / (speed.tokens_per_second * resolved.world_size)
    if seconds > _LOSS_SECONDS:
        lost = f"{duration(seconds)} ({human(steps * resolved.tokens_per_step)} tokens)"
        yield f"a crash can cost {lost}: checkpoint.every is {report.recipe.checkpoint.every}"
