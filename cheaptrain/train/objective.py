"""What a stage teaches: from a batch of rows to a sum of losses.

The loop knows nothing of objectives but this: each returns sums over supervised positions, never means. Dividing is
done once, by the count of the whole global batch, in `step.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from cheaptrain_kernels import linear_cross_entropy
from torch import Tensor
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.parts import decoder, head


@dataclass(frozen=True)
class Compute:
    """How a forward pass is run: where, in which dtype, how many tokens' logits at once."""

    device: torch.device
    dtype: torch.dtype
    document_mask: bool
    loss_chunk_tokens: int

    def autocast(self) -> torch.autocast:
        """bf16 compute over fp32 weights, or nothing at all in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


@dataclass(frozen=True)
class Sums:
    """Sums over the supervised positions of one micro-batch; device scalars."""

    loss: Tensor
    correct: Tensor


Objective = Callable[[PreTrainedModel, RowBatch, Compute], Sums]


def next_token(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Sums:
    """Cross-entropy of every supervised next token, in nats, summed."""
    with compute.autocast():
        hidden = hidden_states(model, batch, compute)
        loss, correct = linear_cross_entropy(
            hidden.flatten(0, 1), head(model).weight, batch.labels.flatten(), chunk_tokens=compute.loss_chunk_tokens
        )
    return Sums(loss, correct)


def hidden_states(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Tensor:
    """Final hidden states `[rows, seq, hidden]` in the compute dtype; documents of a row do not see each other."""
    output = decoder(model)(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        **attention_inputs(batch.document_ids, compute.document_mask, compute.device),
    )
    # Under autocast the last norm answers in fp32; the head must not run in it.
    return output.last_hidden_state.to(compute.dtype)


OBJECTIVES: dict[str, Objective] = {"next_token": next_token}
