"""The objective of a student whose teacher has another tokenizer: what both say of the spans of text they share.

The loader has cut the rows into spans and laid out the same text for the teacher (`data/align.py`). The teacher is
asked first, so that nothing of its pass is alive when the student's begins but one number a span. Processes that share
rows or a head are refused: a span may lie across what each of them has.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from cheaptrain_kernels import (
    DistillationLoss,
    SpanWord,
    backend_for,
    distilled_at_once,
    linear_span_distillation,
    sum_of_spans,
    token_losses,
)
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model.parts import head
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Distill
from cheaptrain.train.objective import Compute, Sums, Taught, flat_weights, hidden_states
from cheaptrain.train.teacher import Teacher


@dataclass(frozen=True)
class AlignedDistillation:
    """An `Objective`. `says` is a teacher's word on the spans of a batch on the device; `vocab` is how many tokens the
    student has."""

    says: Callable[[RowBatch], SpanWord]
    loss: DistillationLoss
    vocab: int

    def __call__(self, model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Sums:
        said = self.says(batch)
        with compute.autocast():
            hidden = hidden_states(model, batch, compute).flatten(0, 1)
        sums = linear_span_distillation(
            hidden,
            head(model).weight,
            batch.labels.flatten(),
            said,
            loss=self.loss,
            vocab=self.vocab,
            weights=flat_weights(batch),
            chunk_tokens=compute.loss_chunk_tokens,
        )
        return Sums(sums.loss, sums.correct, Taught(sums.divergence, sums.cross_entropy, aligned=sums.aligned))


@dataclass(frozen=True)
class TeacherOfSpans:
    """A teacher that is asked about spans; `vocab`: how many tokens its own tokenizer has."""

    teacher: Teacher
    vocab: int

    def says(self, batch: RowBatch) -> SpanWord:
        """Its log-probabilities of the spans of a batch on the device. Call outside of autocast. Collective."""
        aligned = batch.aligned
        if aligned is None:
            raise CheaptrainError('a batch without spans: the loader of distill.tokenizers = "align" has an aligner')
        rows = RowBatch(
            input_ids=aligned.ids,
            labels=aligned.targets,
            position_ids=aligned.position_ids,
            document_ids=aligned.document_ids,
            sources=np.zeros(len(aligned.ids), np.int64),
            supervised=len(aligned.teacher_positions),
        )
        read = self.teacher.says(rows)
        backend = backend_for(read.hidden.device)
        chunk = distilled_at_once(self.vocab, self.teacher.compute.loss_chunk_tokens, backend)
        losses = token_losses(read.hidden, read.weight[: self.vocab], aligned.targets.flatten(), chunk_tokens=chunk)
        log_p = sum_of_spans(-losses, aligned.teacher_positions, aligned.teacher_lengths)
        return SpanWord(aligned.student_positions, aligned.student_lengths, log_p)


def refuse_layout(distill: Distill, layout: Layout) -> None:
    """Raise PreflightError for processes that share rows or a head."""
    if distill.tokenizers != "align":
        return
    for name, size in (("tp", layout.tp), ("cp", layout.cp)):
        if size > 1:
            raise PreflightError(
                f'distill.tokenizers = "align" does not go with parallel.{name} = {size}: every process needs its rows '
                f"and both heads whole; set parallel.{name} = 1 and use dp_shard"
            )
