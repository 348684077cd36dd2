"""The objective of a student: what a teacher says of each next token, mixed with what the text says.

    alpha x T squared x divergence(teacher, student) + (1 - alpha) x cross-entropy

The teacher is asked first, so that nothing of its forward pass is alive when the student's begins but its last hidden
states. Logits of neither model ever exist for more than a chunk (`cheaptrain_kernels.linear_distillation`).
"""

from collections.abc import Callable
from dataclasses import dataclass

from cheaptrain_kernels import DistillationLoss, Spread, TeacherHead, TopK, linear_distillation
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.parts import head
from cheaptrain.recipe.schema import Distill
from cheaptrain.train.objective import Compute, Sums, Taught, flat_weights, hidden_states

DEFAULT_BETA = 0.5


@dataclass(frozen=True)
class Distillation:
    """An `Objective`. `says` is a teacher's word on a batch (`Teacher.says`, or read from a cache); `vocab` is how many
    tokens there are."""

    says: Callable[[RowBatch], TeacherHead | TopK]
    loss: DistillationLoss
    vocab: int

    def __call__(self, model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Sums:
        teacher = self.says(batch)
        with compute.autocast():
            hidden = hidden_states(model, batch, compute).flatten(0, 1)
        weight, spread = head(model).weight, None
        if isinstance(weight, DTensor):
            spread = Spread(weight.device_mesh.get_group(), weight.shape[0])
            weight = weight.to_local()
        if isinstance(teacher, TeacherHead) and isinstance(teacher.weight, DTensor):
            teacher = teacher._replace(weight=teacher.weight.to_local())
        sums = linear_distillation(
            hidden,
            weight,
            teacher,
            batch.labels.flatten(),
            loss=self.loss,
            vocab=self.vocab,
            weights=flat_weights(batch),
            chunk_tokens=compute.loss_chunk_tokens,
            spread=spread,
        )
        return Sums(sums.loss, sums.correct, Taught(sums.divergence, sums.cross_entropy, sums.agreed))


def distillation_loss(distill: Distill) -> DistillationLoss:
    """The loss that a recipe asks for."""
    beta = DEFAULT_BETA if distill.jsd_beta is None else distill.jsd_beta
    return DistillationLoss(distill.divergence, beta, distill.temperature, distill.alpha)
