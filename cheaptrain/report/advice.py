"""What a plan warns of, and what makes a run impossible. Each sentence says what, how much, and what to do."""

from collections.abc import Iterator

from cheaptrain.report.costs import Disk
from cheaptrain.report.reckon import PlanReport, Proposal
from cheaptrain.report.tracker import GATHERED
from cheaptrain.units import duration, human, size

_LOSS_SECONDS = 2 * 3600  # of work that a crash may cost without a warning
_LONG_WARMUP = 0.1
_MUCH_PADDING = 0.1


def impossibilities(report: PlanReport) -> list[str]:
    """Why this run cannot end well; empty when nothing is known against it, or when it is planned for elsewhere."""
    refused = [report.refused] if report.refused else []
    return [*refused, *(_space(report) if report.device.here else ())]


def warnings(report: PlanReport) -> list[str]:
    """What is probably not meant, or will hurt later."""
    return [
        *_space(report),
        *_memory(report),
        *_layout(report),
        *_experts(report),
        *_data(report),
        *_training(report),
        *_crash(report),
    ]


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
    if report.refused:
        yield report.refused
    if report.fits is None or report.memory is None:
        return
    if report.fits:
        remedy = f"{report.fits} would fit"
    elif report.outlook.world_size == 1:
        remedy = "even one row with activation checkpointing does not fit"
    else:
        remedy = f"in this layout ({report.outlook.batch.layout}) no smaller train.micro_batch_size fits"
    device = f"{report.device.name} ({size(report.device.memory_bytes)})"
    yield f"memory: {size(report.memory.peak)} a process do not fit {device}: {remedy}"


def _layout(report: PlanReport) -> Iterator[str]:
    """Ways of sharing the work that cost messages, and that the run would fit without."""
    layout, proposal = report.outlook.batch.layout, report.proposal
    if proposal is None:
        if report.looked:
            tried = f"no layout of {report.outlook.world_size:,} processes that was tried fits"
            yield f"{tried}: take more GPUs, or larger ones"
        return
    instead = f"{proposal.layout}, {settings_of(proposal)} fits in {size(proposal.memory.peak)} a process"
    if layout.tp > 1 and proposal.layout.tp == 1:
        yield f"parallel.tp = {layout.tp} is not needed: {instead}, and FSDP alone sends less that is waited for"
    if layout.cp > 1:
        rows = f"rows of {report.recipe.data.seq_len:,} tokens fit without it"
        yield f"parallel.cp = {layout.cp} is not needed: {rows}: {instead}"


def settings_of(proposal: Proposal) -> str:
    """`train.micro_batch_size=4 train.activation_checkpointing=false`: as on a command line."""
    again = str(proposal.recompute).lower()
    return f"train.micro_batch_size={proposal.micro_batch_size} train.activation_checkpointing={again}"


_EXPERTS = ("n_routed_experts", "num_local_experts", "num_experts")  # fields of configs that say how many


def _experts(report: PlanReport) -> Iterator[str]:
    experts = max((getattr(report.config, name, None) or 0 for name in _EXPERTS), default=0) if report.config else 0
    if experts < 2:
        return
    gathered = ""
    if report.outlook.world_size > 1 and report.memory is not None:
        gathered = f", {size(report.memory.of(GATHERED))} at the fullest moment,"
    yield (
        f"a mixture of {experts} experts needs expert parallelism, which cheaptrain does not have: with FSDP every "
        f"process gathers all experts of a layer{gathered} to use a few. What its layers keep has not been compared "
        "with a real run"
    )


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
    fresh = report.recipe.model.init_from is None  # weights that are there have been trained before
    if fresh and resolved and resolved.tokens_per_parameter is not None and resolved.tokens_per_parameter < 1:
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
