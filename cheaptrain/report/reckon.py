"""The figures of a plan, from an outlook and a device. Nothing is printed here.

Steps, tokens and epochs are those of `resolve`; nothing of that is derived a second time. The trap: figures that look
alike and are not. What is stated, measured, assumed and estimated is told apart, and what nobody knows is None. Each
figure with its formula: docs/plan.md.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from cheaptrain.model.config import model_config
from cheaptrain.recipe.schema import Recipe, Train
from cheaptrain.recipe.shares import shares_of_run
from cheaptrain.report.activations import Activations, count_activations
from cheaptrain.report.costs import Disk, Speed, checkpoint_disk, data_disk, expected_speed
from cheaptrain.report.device import Device
from cheaptrain.report.memory import MemoryPlan, plan_memory
from cheaptrain.report.sources import SourcePlan, plan_sources
from cheaptrain.train.outlook import Outlook


@dataclass(frozen=True)
class PlanReport:
    """Everything the block shows. None: not known. `fits` says which settings would fit the memory, if these do not."""

    outlook: Outlook
    device: Device
    config: PreTrainedConfig | None
    sources: tuple[SourcePlan, ...]
    bf16: bool
    memory: MemoryPlan | None
    fits: str | None
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


def plan_report(outlook: Outlook, device: Device) -> PlanReport:
    """Reckon a run on `device`, as far as the outlook goes."""
    recipe, resolved, facts = outlook.recipe, outlook.resolved, outlook.facts
    shares = resolved.shares if resolved else shares_of_run(recipe, 0)
    sources = plan_sources(recipe.data, shares, dict(outlook.manifests), resolved is not None)
    bf16 = recipe.train.precision == "bf16" or (recipe.train.precision == "auto" and device.is_gpu)
    config = memory = fits = None
    if facts is not None and outlook.vocab_size is not None:
        config = model_config(outlook.model, vocab_size=outlook.vocab_size, seq_len=recipe.data.seq_len)
        masked = recipe.data.document_mask and not (device.is_gpu and bf16)
        activations = count_activations(config, recipe.data.seq_len, bf16=bf16, mask=masked)
        memory, fits = _memory(outlook, device, config, activations, bf16)
    disks = [data_disk(recipe, sources, outlook.vocab_size)]
    if facts is not None and resolved is not None:
        disks.append(checkpoint_disk(recipe, facts, resolved))
    return PlanReport(
        outlook=outlook,
        device=device,
        config=config,
        sources=sources,
        bf16=bf16,
        memory=memory,
        fits=fits,
        speed=expected_speed(recipe, facts, device.gpu, on_gpu=device.is_gpu, here=device.here),
        disks=tuple(disks),
    )


def _memory(
    outlook: Outlook, device: Device, config: PreTrainedConfig, activations: Activations, bf16: bool
) -> tuple[MemoryPlan, str | None]:
    """The plan as it is and, when it does not fit, the mildest change that does: "" if there is none."""
    recipe, batch, facts = outlook.recipe, outlook.batch, outlook.facts
    assert facts is not None
    usable = device.usable_bytes(outlook.world_size)
    rows = batch.rows_per_step // outlook.world_size

    def plan(train: Train) -> MemoryPlan:
        return plan_memory(
            train,
            facts,
            config,
            activations,
            seq_len=recipe.data.seq_len,
            accumulation=rows // train.micro_batch_size,
            bf16=bf16,
        )

    as_it_is = plan(recipe.train)
    if as_it_is.peak <= usable:
        return as_it_is, None
    smaller = [micro for micro in range(recipe.train.micro_batch_size, 0, -1) if rows % micro == 0]
    for checkpointing in sorted({recipe.train.activation_checkpointing, True}):
        for micro in smaller:
            changed = {"micro_batch_size": micro, "activation_checkpointing": checkpointing}
            if plan(recipe.train.model_copy(update=changed)).peak <= usable:
                both = [f"train.micro_batch_size = {micro}"] if micro != recipe.train.micro_batch_size else []
                if checkpointing != recipe.train.activation_checkpointing:
                    both.append("train.activation_checkpointing = true")
                return as_it_is, " and ".join(both)
    return as_it_is, ""
