"""The figures of a plan, from an outlook and a device. Nothing is printed here.

Steps, tokens and epochs are those of `resolve`; nothing of that is derived a second time. The trap: figures that look
alike and are not. What is stated, measured, assumed and estimated is told apart, and what nobody knows is None. Each
figure with its formula: docs/plan.md.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.hardware import GPUS_PER_NODE
from cheaptrain.model import attention
from cheaptrain.model.config import model_config
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Recipe
from cheaptrain.recipe.shares import shares_of_run
from cheaptrain.report.costs import Disk, Speed, cache_disk, checkpoint_disk, data_disk, expected_speed
from cheaptrain.report.device import Device
from cheaptrain.report.lesson import Lesson, lesson_of
from cheaptrain.report.measure import Measured, Setting
from cheaptrain.report.memory import HostMemory, MemoryPlan, host_memory, plan_memory
from cheaptrain.report.pretend import as_one_of
from cheaptrain.report.search import Found, Wanted, find
from cheaptrain.report.sources import SourcePlan, plan_sources
from cheaptrain.report.speed import StepTime, predicted_step_seconds
from cheaptrain.train.outlook import Outlook


@dataclass(frozen=True)
class Proposal:
    """The cheapest layout that fits, by the rule of `search.py`."""

    layout: Layout
    micro_batch_size: int
    recompute: bool
    memory: MemoryPlan
    step: StepTime | None


@dataclass(frozen=True)
class PlanReport:
    """Everything the block shows. None: not known. `spared`: FLOPs a token of a teacher that a cache stands for.

    `memory_unknown`: why it is. `refused`: why the model cannot be laid out like this. `fits` says which settings would
    fit the memory, if these do not ("": none). `step`: the assumed time of one step. `looked`: whether a proposal was
    looked for; `apart`: why tensor parallelism was left out of it.
    """

    outlook: Outlook
    device: Device
    config: PreTrainedConfig | None
    lesson: Lesson | None
    spared: float | None
    sources: tuple[SourcePlan, ...]
    bf16: bool
    memory: MemoryPlan | None
    memory_unknown: str | None
    refused: str | None
    fits: str | None
    host: HostMemory | None
    step: StepTime | None
    looked: bool
    proposal: Proposal | None
    apart: tuple[str, ...]
    speed: Speed | None
    disks: tuple[Disk, ...]

    @property
    def recipe(self) -> Recipe:
        return self.outlook.recipe

    @property
    def seconds(self) -> float | None:
        """Time of the training steps of the whole run."""
        resolved = self.outlook.resolved
        if resolved is None or self.speed is None:
            return None
        return resolved.tokens / (self.speed.tokens_per_second * self.outlook.world_size)

    @property
    def dollars(self) -> float | None:
        price = self.recipe.plan.dollars_per_gpu_hour
        return None if price is None or self.seconds is None else self.seconds / 3600 * price * self.outlook.world_size


def plan_report(outlook: Outlook, device: Device, *, propose: bool = False) -> PlanReport:
    """Reckon a run on `device`, as far as the outlook goes. `propose`: also look for the cheapest layout that fits."""
    recipe, resolved, facts = outlook.recipe, outlook.resolved, outlook.facts
    shares = resolved.shares if resolved else shares_of_run(recipe, 0)
    sources = plan_sources(recipe.data, shares, dict(outlook.manifests), resolved is not None)
    bf16 = recipe.train.precision == "bf16" or (recipe.train.precision == "auto" and device.is_gpu)
    config = found = unknown = refused = None
    lesson = _lesson(outlook, device)
    if facts is not None and outlook.vocab_size is not None:
        config = model_config(outlook.model, vocab_size=outlook.vocab_size, seq_len=recipe.data.seq_len)
        try:
            found = _find(outlook, device, config, lesson, bf16, propose)
        except PreflightError as error:
            refused = str(error)
        except CheaptrainError as error:  # a class that does not run on tensors without memory may still train
            unknown = str(error)
    disks = [data_disk(recipe, sources, outlook.vocab_size)]
    if resolved is not None and recipe.distill is not None and outlook.vocab_size is not None:
        disks += cache_disk(recipe.distill, resolved, outlook.vocab_size)
    if facts is not None:
        disks.append(checkpoint_disk(recipe, facts, resolved))
    step = memory = host = proposal = None
    if found is not None and config is not None and facts is not None:
        memory = plan_memory(found.as_it_is, recipe.train, facts, config)
        host = host_memory(
            found.as_it_is, recipe.train, facts, recipe.checkpoint, min(outlook.world_size, GPUS_PER_NODE)
        )
        step = _step(outlook, device, found.as_it_is)
        if found.cheapest is not None:
            chosen = found.cheapest
            proposal = Proposal(
                chosen.setting.layout,
                chosen.setting.micro_batch_size,
                chosen.setting.recompute,
                plan_memory(chosen.measured, recipe.train, facts, config),
                _step(outlook, device, chosen.measured),
            )
    return PlanReport(
        outlook=outlook,
        device=device,
        config=config,
        lesson=lesson,
        spared=_spared(outlook),
        sources=sources,
        bf16=bf16,
        memory=memory,
        memory_unknown=unknown,
        refused=refused,
        fits=_mildest(found, recipe) if found else None,
        host=host,
        step=step,
        looked=found.looked if found else False,
        proposal=proposal,
        apart=found.apart if found else (),
        speed=expected_speed(recipe, outlook.batch.tokens_per_step, outlook.world_size, device, step),
        disks=tuple(disks),
    )


def _lesson(outlook: Outlook, device: Device) -> Lesson | None:
    if outlook.recipe.distill is None or outlook.vocab_size is None:
        return None
    return lesson_of(
        outlook.recipe.distill,
        outlook.teacher,
        vocab_size=outlook.vocab_size,
        seq_len=outlook.recipe.data.seq_len,
        on_gpu=device.is_gpu,
    )


def _spared(outlook: Outlook) -> float | None:
    distill, teacher = outlook.recipe.distill, outlook.teacher
    if distill is None or distill.cache is None or teacher is None or outlook.vocab_size is None:
        return None
    facts = model_facts(teacher.model, vocab_size=outlook.vocab_size, seq_len=outlook.recipe.data.seq_len)
    return facts.flops_per_token / 3


def _find(
    outlook: Outlook, device: Device, config: PreTrainedConfig, lesson: Lesson | None, bf16: bool, propose: bool
) -> Found:
    recipe, batch, facts = outlook.recipe, outlook.batch, outlook.facts
    assert facts is not None
    setting = Setting(
        layout=batch.layout,
        seq_len=recipe.data.seq_len,
        micro_batch_size=batch.micro_batch_size,
        accumulates=batch.accumulation > 1,
        recompute=recipe.train.activation_checkpointing,
        bf16=bf16,
        masked=recipe.data.document_mask
        and not (device.is_gpu and bf16)
        and recipe.data.seq_len <= attention.LONGEST_MASK,
        loss_chunk_tokens=recipe.train.loss_chunk_tokens,
        lesson=lesson,
        lora=recipe.lora,
        backend="triton" if device.is_gpu else "torch",
    )
    wanted = Wanted(
        usable=device.usable_bytes(outlook.world_size),
        rows=batch.rows_per_step,
        nodes=device.is_gpu,
        parameters=facts.parameters,
        propose=propose,
    )
    if outlook.world_size > 1:
        return as_one_of(outlook.world_size, find, config, setting, recipe.train, wanted)
    try:
        return find(config, setting, recipe.train, wanted)
    except CheaptrainError:
        raise
    except Exception as error:
        raise CheaptrainError(f"{type(error).__name__}: {error}") from error


def _mildest(found: Found, recipe: Recipe) -> str | None:
    """The smallest change of settings that fits; "" if there is none, None when none is needed."""
    if found.fits:
        return None
    if found.mildest is None:
        return ""
    setting, changes = found.mildest.setting, []
    if setting.micro_batch_size != recipe.train.micro_batch_size:
        changes.append(f"train.micro_batch_size = {setting.micro_batch_size}")
    if setting.recompute != recipe.train.activation_checkpointing:
        changes.append("train.activation_checkpointing = true")
    return " and ".join(changes)


def _step(outlook: Outlook, device: Device, measured: Measured) -> StepTime | None:
    facts, setting, batch = outlook.facts, measured.setting, outlook.batch
    lesson = setting.lesson
    if device.gpu is None or facts is None:
        return None
    return predicted_step_seconds(
        setting.layout,
        device.gpu,
        flops=(facts.flops_per_token + (lesson.flops_per_token if lesson else 0)) * batch.tokens_per_step,
        mfu=outlook.recipe.plan.mfu,
        recompute=setting.recompute,
        accumulation=batch.rows_per_step // (setting.micro_batch_size * setting.layout.data_parallel),
        sent=measured.sent,
        sent_before=measured.sent_before,
    )
