"""Memory of one process, part by part, at its fullest moment; and what its machine needs beside.

The trap: parts that are each right and never exist together. So the table is one moment, the fullest of those that were
measured (`measure.py`), with what the optimizer keeps added to each, and its parts add up to the peak.
"""

from dataclasses import dataclass

import torch
from cheaptrain_kernels import distilled_at_once
from transformers import PreTrainedConfig

from cheaptrain.parallel.matrices import STACK_BYTES
from cheaptrain.recipe.resolve import ModelFacts
from cheaptrain.recipe.schema import Checkpoint, Train
from cheaptrain.report.lesson import Lesson
from cheaptrain.report.measure import Held, Measured, Moment
from cheaptrain.report.tracker import (
    ACTIVATIONS,
    BATCH,
    COPIES,
    GATHERED,
    GRADIENTS,
    LOSS,
    MESSAGES,
    TEACHER,
    WEIGHTS,
)
from cheaptrain.units import human

OPTIMIZER = "optimizer"
_ORDER = (WEIGHTS, OPTIMIZER, GRADIENTS, TEACHER, GATHERED, COPIES, ACTIVATIONS, LOSS, MESSAGES)
_ORTHOGONALISING = 12  # bytes for each number of the matrices that Muon has at hand at once: see train/muon.py


@dataclass(frozen=True)
class MemoryPart:
    """A line of the table: what, how many bytes, of what."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """The fullest moment of the fullest process. `peak` is the sum of the parts; `when` says in words when that is."""

    parts: tuple[MemoryPart, ...]
    when: str
    held: Held

    @property
    def peak(self) -> int:
        return sum(part.bytes for part in self.parts)

    def of(self, name: str) -> int:
        """Bytes of one part."""
        return sum(part.bytes for part in self.parts if part.name == name)


@dataclass(frozen=True)
class HostMemory:
    """Bytes of one machine with `processes` of the run: while they build the model, and for copies that checkpoints
    are written from."""

    processes: int
    building: int
    copies: int


def plan_memory(measured: Measured, train: Train, facts: ModelFacts, config: PreTrainedConfig) -> MemoryPlan:
    """The fullest moment of what was measured, with the optimizer."""
    optimizer = moments_held(measured.held, train)
    moments = [*measured.moments, _stepping(measured, train)]
    fullest = max(moments, key=lambda moment: moment.total)
    parts = dict(fullest.parts)
    parts[ACTIVATIONS] = parts.get(ACTIVATIONS, 0) + parts.pop(BATCH, 0)
    parts[OPTIMIZER] = parts.get(OPTIMIZER, 0) + optimizer
    how = _explained(measured, train, facts, config, whole=parts.get(GRADIENTS, 0) > 4 * measured.held.trained)
    table = tuple(MemoryPart(name, parts[name], how[name]) for name in _ORDER if parts.get(name))
    return MemoryPlan(table, _when(fullest.place), measured.held)


def peak_bytes(measured: Measured, train: Train) -> int:
    """The peak of `plan_memory` alone."""
    moments = [*measured.moments, _stepping(measured, train)]
    return max(moment.total for moment in moments) + moments_held(measured.held, train)


def moments_held(held: Held, train: Train) -> int:
    """What the optimizer keeps of what a process holds: AdamW two fp32 numbers, Muon one for the hidden matrices."""
    return 8 * held.trained - (4 * held.hidden if train.optimizer == "muon" else 0)


def host_memory(
    measured: Measured, train: Train, facts: ModelFacts, checkpoint: Checkpoint, processes: int
) -> HostMemory:
    """Of the machine of the fullest process, with `processes` of the run on it."""
    held, lesson = measured.held, measured.setting.lesson
    building = 4 * facts.parameters
    if lesson is not None and lesson.facts is not None:  # read once the student is laid out
        building = max(building, lesson.dtype.itemsize * lesson.facts.parameters)
    copies = (4 * held.parameters + moments_held(held, train)) if checkpoint.asynchronous else 0
    # Every process draws or reads the whole model on the CPU and keeps its share; one alone goes on with it as it is.
    return HostMemory(processes, building * processes, copies * processes)


def _stepping(measured: Measured, train: Train) -> Moment:
    """The optimizer's step: all gradients are there, and Muon has a stack of matrices at hand."""
    held = measured.held
    stacked = max(held.largest_matrix, min(STACK_BYTES // 2, held.hidden))  # numbers; a stack is in bf16
    at_hand = _ORTHOGONALISING * stacked if train.optimizer == "muon" else 0
    weights = max(moment.parts.get(WEIGHTS, 0) for moment in measured.moments)
    taught = {TEACHER: measured.teacher} if measured.teacher else {}
    return Moment("step", {WEIGHTS: weights, GRADIENTS: 4 * measured.held.trained, OPTIMIZER: at_hand, **taught})


def _of_teacher(lesson: Lesson, facts: ModelFacts, sharded: bool) -> str:
    if lesson.quantised:
        return f"{human(facts.parameters)} parameters, layers at one byte each"
    precision = "bf16" if lesson.dtype == torch.bfloat16 else "fp32"
    return f"{precision}, {human(facts.parameters)} parameters{', only its layers sharded' if sharded else ''}"


def _when(place: str) -> str:
    if place == "start":
        return "when embedding and head are gathered"
    if place == "loss":
        return "the loss"
    if place == "step":
        return "the optimizer's step"
    if place == "teacher":
        return "the teacher's forward pass"
    direction, _, layer = place.partition(" ")
    which = {"first": "the first layer", "last": "the last layer", "middle": "the layers between"}.get(
        layer, "the first layers"
    )
    return f"the {direction} pass through {which}"


def _explained(
    measured: Measured, train: Train, facts: ModelFacts, config: PreTrainedConfig, *, whole: bool
) -> dict[str, str]:
    setting, held = measured.setting, measured.held
    sharded = held.parameters < facts.parameters
    share = f"{held.parameters:,} of {facts.parameters:,} parameters" if sharded else f"{held.parameters:,} parameters"
    tokens = setting.micro_batch_size * setting.seq_len // setting.layout.cp
    chunk = min(setting.loss_chunk_tokens, tokens)
    layers = "inputs of the layers, one layer again" if setting.recompute else "all layers"
    lesson = setting.lesson
    if lesson is not None:
        chunk = distilled_at_once(lesson.vocab // setting.layout.tp, chunk, setting.backend)
    both = "both " if lesson is not None and lesson.facts is not None and not lesson.aligned else ""
    return {
        WEIGHTS: f"fp32, {share}",
        OPTIMIZER: "AdamW, 8 bytes a parameter"
        if train.optimizer == "adamw"
        else "Muon 4 bytes a hidden-matrix parameter, AdamW 8 the others",
        GRADIENTS: "fp32" + (", not sharded until the last micro-batch of a step" if whole else ""),
        GATHERED: f"of the layers at hand in {'bf16' if setting.bf16 else 'fp32'}, embedding and head in fp32",
        COPIES: "of matrices, as autocast casts them",
        ACTIVATIONS: f"{setting.micro_batch_size} x {setting.seq_len // setting.layout.cp:,} tokens, {layers}",
        LOSS: f"{both}logits of {chunk:,} tokens x {config.vocab_size:,}, and the head's gradient",
        TEACHER: "" if lesson is None or lesson.facts is None else _of_teacher(lesson, lesson.facts, sharded),
        MESSAGES: "buffers of what is being sent",
    }
