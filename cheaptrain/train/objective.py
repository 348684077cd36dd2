"""What a stage teaches: from a batch of rows to a sum of losses.

The loop knows nothing of objectives but this: each returns sums over supervised positions, weighted as the batch says,
never means. Dividing is done once, by the weight of the whole global batch, in `step.py`. What an assistant says is
learnt as any next token: which labels there are is a matter of the rows. With a teacher: `distillation.py`.

With tensor parallelism the head is split by the vocabulary: the processes that share it compute one loss together, and
all of them return the same sums.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from cheaptrain_kernels import (
    linear_cross_entropy,
    token_losses,
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_losses,
)
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn import functional
from transformers import PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.model.attention import DEFAULT, AttentionChoice, attention_inputs
from cheaptrain.model.attention.packing import Padded
from cheaptrain.model.context import Context
from cheaptrain.model.parts import decoder, head
from cheaptrain.train.neftune import noisy

_ROW_MULTIPLE = 64  # of rows that are not a batch: few lengths, and so few shapes


@dataclass(frozen=True)
class Compute:
    """How a forward pass is run: where, in which dtype, how many tokens' logits at once, and who shares a row."""

    device: torch.device
    dtype: torch.dtype
    document_mask: bool
    loss_chunk_tokens: int
    context: Context | None = None  # None: every process has its rows whole
    neftune_alpha: float = 0.0  # noise on the embeddings of a model in training; 0: none
    z_loss: float = 0.0
    attention: AttentionChoice = DEFAULT
    padded: Padded = field(default_factory=Padded, compare=False)  # of the boundaries of packed rows, over the run

    def autocast(self) -> torch.autocast:
        """bf16 compute over fp32 weights, or nothing at all in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Taught(NamedTuple):
    """Sums over supervised positions when there is a teacher: the divergence from it, the student's cross-entropy
    (both as the loss has them weighted), and where the likeliest token of both is the same. A teacher with other tokens
    has no such token; of it there is what the positions weigh that it speaks of (`aligned.py`)."""

    divergence: Tensor
    cross_entropy: Tensor
    agreed: Tensor | None = None
    aligned: Tensor | None = None


class Sums(NamedTuple):
    """Sums over the supervised positions of one micro-batch; device scalars. A tuple, because FSDP looks for the
    tensors of what a forward pass returns."""

    loss: Tensor
    correct: Tensor
    taught: Taught | None = None
    cross_entropy: Tensor | None = None  # with a z-loss: the loss without it


Objective = Callable[[PreTrainedModel, RowBatch, Compute], Sums]


def next_token(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Sums:
    """Cross-entropy of every supervised next token, in nats, summed."""
    with compute.autocast():
        hidden = hidden_states(model, batch, compute).flatten(0, 1)
        weight, labels, weights = head(model).weight, batch.labels.flatten(), flat_weights(batch)
        if isinstance(weight, DTensor):
            loss, correct, cross_entropy = vocab_parallel_linear_cross_entropy(
                hidden,
                weight.to_local(),
                labels,
                weights=weights,
                chunk_tokens=compute.loss_chunk_tokens,
                z_loss=compute.z_loss,
                **_of_vocabulary(weight),
            )
        else:
            loss, correct, cross_entropy = linear_cross_entropy(
                hidden,
                weight,
                labels,
                weights=weights,
                chunk_tokens=compute.loss_chunk_tokens,
                z_loss=compute.z_loss,
            )
    return Sums(loss, correct, cross_entropy=cross_entropy if compute.z_loss else None)


def flat_weights(batch: RowBatch) -> Tensor | None:
    """The weights of a batch as the fused losses take them: `[rows * seq]`."""
    return None if batch.weights is None else batch.weights.flatten()


def losses_of_tokens(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Tensor:
    """Cross-entropy of each position, `[rows * seq]` fp32 nats, 0 where there is no label. Without gradients."""
    with compute.autocast():
        hidden = hidden_states(model, batch, compute).flatten(0, 1)
        weight, labels = head(model).weight, batch.labels.flatten()
        if isinstance(weight, DTensor):
            return vocab_parallel_token_losses(
                hidden, weight.to_local(), labels, chunk_tokens=compute.loss_chunk_tokens, **_of_vocabulary(weight)
            )
        return token_losses(hidden, weight, labels, chunk_tokens=compute.loss_chunk_tokens)


def hidden_states(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> Tensor:
    """Final hidden states `[rows, seq, hidden]` in the compute dtype; documents of a row do not see each other.

    With tensor parallelism every process of the `tp` axis gets all of them, and gives back its part of their gradient.
    """
    given = {"input_ids": batch.input_ids}
    if compute.neftune_alpha and model.training:
        embeddings = model.get_input_embeddings()(batch.input_ids)
        given = {"inputs_embeds": noisy(embeddings, batch, compute.neftune_alpha, compute.context)}
    output = decoder(model)(
        **given,
        position_ids=batch.position_ids,
        **attention_inputs(
            batch.document_ids,
            compute.document_mask,
            compute.device,
            context=compute.context,
            choice=compute.attention,
            padded=compute.padded,
        ),
    )
    # Under autocast the last norm answers in fp32; the head must not run in it.
    hidden = output.last_hidden_state.to(compute.dtype)
    if isinstance(hidden, DTensor):
        return hidden.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
    return hidden  # type: ignore[no-any-return]


def row_logits(model: PreTrainedModel, row: Tensor, compute: Compute, at: int | None = None) -> Tensor:
    """Logits `[1, seq, vocab]` of one row `[1, seq]` that is one document, or `[1, vocab]` after position `at` alone.

    Every process runs the whole row, padded to a length that the processes of the `tp` axis can share; nothing before
    the padding sees it.
    """
    weight, seq = head(model).weight, row.shape[1]
    shared = weight.device_mesh.size() if isinstance(weight, DTensor) else 1
    row = functional.pad(row, (0, -seq % math.lcm(_ROW_MULTIPLE, shared)))
    # A class that learns its positions knows no more of them: padding at the end may share the last one.
    last = (getattr(model.config, "max_position_embeddings", None) or row.shape[1]) - 1
    positions = torch.arange(row.shape[1], device=row.device).clamp_max(last)[None]
    inputs = attention_inputs(torch.zeros(row.shape, dtype=torch.int32), False, compute.device)
    with compute.autocast():
        hidden = decoder(model)(input_ids=row, position_ids=positions, **inputs).last_hidden_state
        if isinstance(hidden, DTensor):
            hidden = hidden.redistribute(placements=[Replicate()]).to_local()
        logits: Tensor = head(model)((hidden[:, :seq] if at is None else hidden[:, at]).to(compute.dtype))
    return logits


def _of_vocabulary(weight: DTensor) -> dict[str, Any]:
    """Who has the other rows of the head, and how many rows it has in all."""
    return {"vocab": weight.shape[0], "group": weight.device_mesh.get_group()}


OBJECTIVES: dict[str, Objective] = {"next_token": next_token, "assistant_only": next_token}
