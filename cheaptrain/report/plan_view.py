"""The plan as text: one block of at most 100 columns, the same on a terminal, in a pipe and in a log.

Colour only repeats what the words say. Lines are laid out here and never by the console, which would fold a table to 80
columns wherever it cannot see a terminal.
"""

import textwrap
from collections.abc import Iterable, Iterator
from typing import cast

from rich.console import Console
from rich.text import Text
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.resolve import ModelFacts, Resolved
from cheaptrain.report.advice import settings_of, warnings
from cheaptrain.report.reckon import PlanReport
from cheaptrain.report.search import RULE
from cheaptrain.report.sources import SourcePlan
from cheaptrain.train.optim import DEFAULT_MUON_LR
from cheaptrain.units import duration, human, size

WIDTH = 100
_LABEL = 10
_CHINCHILLA = 20  # tokens a parameter
_UNEVEN = 1.01  # times the mean, from which on the fullest process is worth a line
_TINY = 1e-6  # share of the peak that is not worth one


def print_report(report: PlanReport, console: Console) -> None:
    """Print the block of one recipe."""
    for line in report_lines(report):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def report_lines(report: PlanReport) -> Iterator[Text]:
    """The block, line by line."""
    loaded = report.outlook.loaded
    yield Text(f"Plan of {loaded.name} ({loaded.path})", "bold")
    for label, lines in (
        ("model", _model(report)),
        ("teacher", _teacher(report)),
        ("batch", _batch(report)),
        ("length", _length(report)),
        ("rate", _rate(report)),
        ("data", _data(report)),
        ("memory", _memory(report)),
        ("host", _host(report)),
        ("proposal", _proposal(report)),
        ("compute", _compute(report)),
        ("time", _time(report)),
        ("disk", _disk(report)),
    ):
        yield from _labelled(label, lines)
    questions = [f"plan.gpu: reckoned with the {report.device.name}"] if report.device.assumed else []
    for question in (*report.outlook.open_questions, *questions):
        yield from _labelled("missing", _wrapped(question), "cyan")
    for warning in warnings(report):
        yield from _labelled("warning", _wrapped(warning), "yellow")


def _labelled(label: str, lines: Iterable[str], style: str = "") -> Iterator[Text]:
    for number, line in enumerate(lines):
        text = Text(f"{label if number == 0 else '':<{_LABEL}}", style or "bold")
        yield text.append(line, style)


def _model(report: PlanReport) -> Iterator[str]:
    model, facts, config, resolved = report.recipe.model, report.outlook.facts, report.config, report.outlook.resolved
    name = model.preset or model.config or model.init_from
    start = "weights from" if model.init_from else "fresh weights,"
    if facts is None or config is None:
        yield f"{start} {name}: size unknown"
        return
    kind = cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]).__name__
    yield f"{start} {name} ({kind}): {facts.parameters:,} parameters"
    head = "" if "head" in facts.by_part else ", the head is the embedding (tied)"
    yield from _wrapped(
        ", ".join(f"{part} {human(count)} ({count / facts.parameters:.0%})" for part, count in _parts(facts)) + head
    )
    if (lora := report.recipe.lora) is not None:
        yield f"adapters of rank {lora.rank}: {facts.adapters:,} numbers train, and no weight of the model"
    vocab = report.outlook.vocab_size
    yield f"vocabulary {config.vocab_size:,}" + (f", of which the tokenizer uses {vocab:,}" if vocab else "")
    fresh = report.recipe.model.init_from is None  # later stages add to what was trained before
    if fresh and resolved is not None and resolved.tokens_per_parameter is not None:
        yield f"{human(resolved.tokens_per_parameter)} tokens a parameter (Chinchilla: {_CHINCHILLA})"


def _teacher(report: PlanReport) -> Iterator[str]:
    distill, lesson = report.recipe.distill, report.lesson
    if distill is None:
        return
    known = f", read from {distill.cache}" if distill.cache else ": size unknown"
    if lesson is not None and lesson.config is not None and lesson.facts is not None:
        kind = cast(type, MODEL_FOR_CAUSAL_LM_MAPPING[type(lesson.config)]).__name__
        known = f" ({kind}): {lesson.facts.parameters:,} parameters"
    yield f"{distill.teacher}{known}"
    learnt = "the whole vocabulary" if distill.top_k is None else f"its {distill.top_k:,} likeliest tokens and the rest"
    if distill.tokenizers == "align":
        learnt = "spans of text that both tokenizers cut alike"
    mixed = "" if distill.alpha == 1 else f", {distill.alpha:g} of the loss, the rest cross-entropy"
    yield from _wrapped(f"{distill.divergence} over {learnt} at temperature {distill.temperature:g}{mixed}")


def _parts(facts: ModelFacts) -> list[tuple[str, int]]:
    order = ("embedding", "attention", "mlp", "norms", "head", "other")
    return sorted(((part, count) for part, count in facts.by_part.items() if count), key=lambda p: order.index(p[0]))


def _batch(report: PlanReport) -> Iterator[str]:
    batch, world, seq_len = report.outlook.batch, report.outlook.world_size, report.recipe.data.seq_len
    yield f"{batch.tokens_per_step:,} tokens a step = {batch.rows_per_step:,} rows x {seq_len:,} tokens"
    yield (
        f"{batch.rows_per_step:,} rows = {_readers(batch.layout)} x micro-batch {batch.micro_batch_size}"
        f" x accumulation {batch.accumulation}"
    )
    if world > 1:
        yield f"{world:,} processes: {batch.layout}"


def _readers(layout: Layout) -> str:
    each = layout.cp * layout.tp
    if each == 1:
        return _plural(layout.data_parallel, "process", "es")
    return f"{_plural(layout.data_parallel, 'group')} of {each} processes"


def _length(report: PlanReport) -> Iterator[str]:
    resolved = report.outlook.resolved
    if resolved is None:
        yield "unknown"
        return
    yield f"{_plural(resolved.steps, 'step')}, {resolved.tokens:,} tokens ({human(resolved.tokens)})"
    if resolved.filled_up:
        yield f"the last step is filled up with {_plural(resolved.filled_up, 'row')} of the next epoch"
    sampling = f", samples every {resolved.sample_every:,}" if report.recipe.samples.prompts else ""
    yield (
        f"validation every {_plural(resolved.validate_every, 'step')}{sampling}, "
        f"a checkpoint every {resolved.save_every:,}"
    )


def _rate(report: PlanReport) -> Iterator[str]:
    train, resolved = report.recipe.train, report.outlook.resolved
    if train.optimizer == "muon":
        yield f"Muon at {train.muon_lr or DEFAULT_MUON_LR:g} (hidden matrices), AdamW at {train.lr:g} (the rest)"
    else:
        yield f"AdamW, peak {train.lr:g}"
    if resolved is None:
        yield f"{train.schedule}, warm-up {train.warmup}"
        return
    stretches = [("warm-up", resolved.warmup_tokens)]
    level = resolved.tokens - resolved.warmup_tokens - resolved.decay_tokens
    if level > 0:
        stretches.append(("level", level))
    name = {"wsd": "linear", "constant": ""}.get(train.schedule, train.schedule)
    if resolved.decay_tokens:
        stretches.append((f"{name} fall to {train.final_lr_ratio:.0%} of the peak", resolved.decay_tokens))
    yield from _wrapped(
        f"{train.schedule}: " + ", ".join(f"{what} {_span(tokens, resolved)}" for what, tokens in stretches)
    )


def _span(tokens: int, resolved: Resolved) -> str:
    """Tokens as steps and tokens; the steps are rounded where a span does not end with one."""
    about = "" if tokens % resolved.tokens_per_step == 0 else "about "
    return f"{about}{_plural(round(tokens / resolved.tokens_per_step), 'step')} ({human(tokens)} tokens)"


def _data(report: PlanReport) -> Iterator[str]:
    width = min(28, max(6, *(len(source.name) for source in report.sources)))
    heads = f"{'share':>7} {'tokens':>9} {'prepared':>13} {'epochs':>7} {'allowed':>8} {'held out':>9}"
    yield f"{'source':<{width}} {heads}"
    for source in report.sources:
        prepared = "not prepared" if source.prepared_tokens is None else human(source.prepared_tokens)
        share = "–" if source.share is None else f"{source.share:.2%}"
        yield (
            f"{source.name:<{width}} {share:>7} {_known(source.tokens):>9} {prepared:>13}"
            f" {'–' if source.epochs is None else f'{source.epochs:.2f}':>7} {source.max_epochs:>8g}"
            f" {_known(source.val_tokens):>9}"
        )
    packed = [f"{source.name} {source.useful:.2%}" for source in report.sources if source.useful is not None]
    if packed:
        yield from _wrapped(f"conversations fill of the positions of their rows: {', '.join(packed)}")
    yield from _not_prepared(report)


def _not_prepared(report: PlanReport) -> Iterator[str]:
    missing = [source for source in report.sources if source.prepared_tokens is None]
    if not missing:
        return
    yield f"not prepared: run  cheaptrain prepare {report.outlook.loaded.path}"
    guessed = [source for source in missing if source.tokens_estimated is not None]
    if guessed:
        listed = ", ".join(_estimate(source) for source in guessed)
        yield from _wrapped(f"expected of preparing: {listed}")


def _estimate(source: SourcePlan) -> str:
    """`web about 1.2M tokens`, with the epochs that would be."""
    assert source.tokens_estimated is not None
    times = ""
    if source.tokens and source.tokens_estimated:
        times = f" ({'at least ' if source.at_most else ''}{source.tokens / source.tokens_estimated:.2f} epochs)"
    about = "at most" if source.at_most else "about"
    return f"{source.name} {about} {human(source.tokens_estimated)} tokens{times}"


def _memory(report: PlanReport) -> Iterator[str]:
    memory, device, world = report.memory, report.device, report.outlook.world_size
    if memory is None:
        yield from _wrapped(f"unknown: {report.memory_unknown}" if report.memory_unknown else "unknown")
        return
    precision = "bf16 over fp32 weights" if report.bf16 else "fp32"
    yield from _wrapped(f"each process, {precision}, not compiled; the fullest moment is {memory.when}:")
    for part in memory.parts:
        if part.bytes > _TINY * memory.peak:
            yield f"  {part.name:<18}{size(part.bytes):>8}  {part.how}"
    what = "the GPU's" if device.is_gpu else "the machine's"
    share = memory.peak * (1 if device.is_gpu else world) / device.memory_bytes
    yield f"  {'peak':<18}{size(memory.peak):>8}  {share:.0%} of {what} {size(device.memory_bytes)} ({device.name})"
    if memory.held.parameters > _UNEVEN * memory.held.mean:
        yield (
            f"  the fullest process: it holds {human(memory.held.parameters)} parameters, the mean is "
            f"{human(memory.held.mean)}"
        )


def _host(report: PlanReport) -> Iterator[str]:
    host = report.host
    if host is None or not report.device.is_gpu:
        return
    copies = f", {size(host.copies)} for copies that checkpoints are written from" if host.copies else ""
    yield from _wrapped(
        f"memory of a machine with {_plural(host.processes, 'process', 'es')}: {size(host.building)} while the model "
        f"is built{copies}"
    )


def _proposal(report: PlanReport) -> Iterator[str]:
    proposal = report.proposal
    if not report.looked or proposal is None:
        return
    took = f", about {_seconds(proposal.step.total)} a step" if proposal.step else ""
    yield f"{proposal.layout}: {size(proposal.memory.peak)} a process{took}"
    yield f"  {settings_of(proposal)}"
    yield from _wrapped(f"the first that fits, in this order: {RULE}", indent=2)
    for reason in report.apart:
        yield from _wrapped(f"tensor parallelism was left out: {reason}", indent=2)


def _compute(report: PlanReport) -> Iterator[str]:
    facts, resolved = report.outlook.facts, report.outlook.resolved
    if facts is None:
        yield "unknown"
        return
    total = (
        f"{_scientific(resolved.flops)} FLOPs in all, " if resolved is not None and resolved.flops is not None else ""
    )
    yield f"{total}{_scientific(facts.flops_per_token)} a token (forward and backward)"
    if report.lesson is not None and report.lesson.facts is not None:
        yield f"and {_scientific(report.lesson.flops_per_token)} a token for the teacher (forward)"
    if report.spared is not None:
        share = report.spared / (report.spared + facts.flops_per_token)
        yield f"the cache spares {_scientific(report.spared)} a token of the teacher, {share:.0%} of all computing"


def _scientific(number: float) -> str:
    """6450000000000 → `6.45e12`."""
    return f"{number:.2e}".replace("e+", "e")


def _time(report: PlanReport) -> Iterator[str]:
    speed, world, price = report.speed, report.outlook.world_size, report.recipe.plan.dollars_per_gpu_hour
    if speed is None:
        yield "unknown: give plan.tokens_per_second, or plan.gpu"
        return
    together = f" x {_plural(world, 'process', 'es')}" if world > 1 else ""
    took = duration(report.seconds) if report.seconds is not None else "unknown, as the length is;"
    yield f"{took} at {speed.tokens_per_second:,.0f} tokens/s{together}, validation and saving not counted"
    yield from _wrapped(speed.source)
    if (step := report.step) is not None and speed.source.startswith("assumed"):
        yield (
            f"a step: {_seconds(step.compute)} of computing, {_seconds(step.waiting)} waiting for messages"
            if world > 1
            else f"a step: {_seconds(step.compute)}"
        )
    if report.dollars is not None and price is not None:
        yield f"${report.dollars:,.2f} at ${price:g} a GPU-hour"


def _disk(report: PlanReport) -> Iterator[str]:
    for disk in report.disks:
        about = "about " if disk.estimated else ""
        more = f", {about}{size(disk.needed)} to come" if disk.needed else ""
        yield f"{disk.name:<12} {size(disk.there)} there{more}, {size(disk.free)} free: {disk.path}"
        if disk.how:
            yield f"{'':<12} {disk.how}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.3g} s"


def _wrapped(text: str, indent: int = 0) -> list[str]:
    lines = textwrap.wrap(text, WIDTH - _LABEL - indent, break_long_words=False, break_on_hyphens=False)
    return [" " * indent + line for line in lines]


def _known(count: int | None) -> str:
    return "–" if count is None else human(count)


def _plural(count: int, noun: str, ending: str = "s") -> str:
    return f"{count:,} {noun}{ending if count != 1 else ''}"
