"""A teacher, as far as a plan has to know it: what it weighs, costs, and hands to the student's loss.

Its memory is measured by itself (`measure.py`), since it is another model, and added to each moment of the student's
step: weights and a gathered head are there all the time, the rest is gone when the student begins. In the student's own
measurement it is a stub that hands out tensors of the right shapes.
"""

from dataclasses import dataclass, replace

import torch
from cheaptrain_kernels import DistillationLoss, SpanWord, TeacherHead, TopK
from transformers import PreTrainedConfig

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.facts import model_facts
from cheaptrain.recipe.length import ModelFacts
from cheaptrain.recipe.schema import Distill
from cheaptrain.train.aligned import AlignedDistillation
from cheaptrain.train.distillation import Distillation, distillation_loss
from cheaptrain.train.objective import Objective
from cheaptrain.train.teacher import TeacherShape, teacher_config


@dataclass(frozen=True, eq=False)
class Lesson:
    """`config` and `facts` of the teacher; None: it is read from a cache. `quantised`: layers at one byte a number,
    whole on every process. `aligned`: its tokens are others, and it is asked about spans."""

    config: PreTrainedConfig | None
    facts: ModelFacts | None
    dtype: torch.dtype
    loss: DistillationLoss
    vocab: int
    top_k: int | None
    quantised: bool
    aligned: bool = False

    @property
    def flops_per_token(self) -> float:
        """Of its forward pass: a third of those of training."""
        return self.facts.flops_per_token / 3 if self.facts else 0.0

    def of_head_rows(self, rows: int) -> "Lesson":
        """The same with a head of `rows`: where heads are split, the teacher's is given as many as the student's."""
        if self.config is None:
            return self
        config = type(self.config).from_dict(self.config.to_dict() | {"vocab_size": rows})
        return replace(self, config=config)

    def stub(self, processes_of_head: int) -> Objective:
        """The objective, with a teacher that only has shapes. Call under the mode of fake tensors."""
        if self.aligned:
            return AlignedDistillation(_spans, self.loss, self.vocab)
        if self.config is None:
            return Distillation(self._read, self.loss, self.vocab)
        width = self.config.hidden_size
        weight = torch.empty(self.config.vocab_size // processes_of_head, width, dtype=self.dtype)

        def says(batch: RowBatch) -> TeacherHead:
            return TeacherHead(torch.empty(batch.labels.numel(), width, dtype=self.dtype), weight, self.top_k)

        return Distillation(says, self.loss, self.vocab)

    def _read(self, batch: RowBatch) -> TopK:
        tokens, k = batch.labels.numel(), self.top_k or 1
        return TopK(torch.zeros(tokens, k, dtype=torch.int32), torch.zeros(tokens, k), torch.zeros(tokens))


def _spans(batch: RowBatch) -> SpanWord:
    """As many as there can be: every token is one."""
    tokens = batch.labels.numel()
    return SpanWord(torch.arange(tokens), torch.ones(tokens, dtype=torch.int64), torch.zeros(tokens))


def lesson_of(
    distill: Distill, teacher: TeacherShape | None, *, vocab_size: int, seq_len: int, on_gpu: bool
) -> Lesson | None:
    """What a recipe's teacher amounts to; `teacher`: None where it is not known. Raises RecipeError where it cannot
    read the rows."""
    if distill.cache is not None:
        return Lesson(None, None, torch.float32, distillation_loss(distill), vocab_size, distill.top_k, False)
    if teacher is None:
        return None
    asked, row = teacher.vocab_size or vocab_size, teacher.row(seq_len)
    config = teacher_config(teacher.model, vocab_size=asked, seq_len=row)
    bf16 = distill.precision == "bf16" or (on_gpu and distill.precision != "fp32")
    return Lesson(
        config=config,
        facts=model_facts(teacher.model, vocab_size=asked, seq_len=row),
        dtype=torch.bfloat16 if bf16 else torch.float32,
        loss=distillation_loss(distill),
        vocab=vocab_size,
        top_k=distill.top_k,
        quantised=distill.precision in ("int8", "fp8"),
        aligned=distill.tokenizers == "align",
    )
