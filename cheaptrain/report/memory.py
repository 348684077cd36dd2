"""Memory of one process, part by part, and its peak.

Two moments compete for the peak. At the loss all activations are alive, and the logits of a chunk with them; when the
backward pass ends the activations are gone and all gradients are there. With accumulation the gradients of the earlier
micro-batches are there at the loss as well. The trap: adding up every part counts what never exists together.
"""

from dataclasses import dataclass

from transformers import PreTrainedConfig

from cheaptrain.recipe.resolve import ModelFacts
from cheaptrain.recipe.schema import Train
from cheaptrain.report.activations import Activations
from cheaptrain.train.space import moment_bytes

_LOGIT_BYTES = 8  # fp32, and a temporary of the same size


@dataclass(frozen=True)
class MemoryPart:
    """A line of the table: what, how many bytes, reckoned how."""

    name: str
    bytes: int
    how: str


@dataclass(frozen=True)
class MemoryPlan:
    """`peak`: the most that is alive at one moment, less than all parts together. Bytes of one process."""

    parts: tuple[MemoryPart, ...]
    peak: int


def plan_memory(
    train: Train,
    facts: ModelFacts,
    config: PreTrainedConfig,
    activations: Activations,
    *,
    seq_len: int,
    accumulation: int,
    bf16: bool,
) -> MemoryPlan:
    """Reckon one process. `activations` must be counted with the same precision."""
    parameters, rows = facts.parameters, train.micro_batch_size
    tokens = rows * seq_len
    head = config.vocab_size * config.hidden_size
    chunk = min(train.loss_chunk_tokens, tokens)

    weights = MemoryPart("weights", 4 * parameters, "fp32, 4 bytes a parameter")
    moments = MemoryPart("optimizer", moment_bytes(facts, train), _moments(train))
    gradients = MemoryPart("gradients", 4 * parameters, "fp32, 4 bytes a parameter")
    copies = MemoryPart(
        "bf16 copies", activations.weight_copies + 2 * head, "of matrices, as autocast casts them, and of the head"
    )
    kept = MemoryPart(
        "activations",
        rows * activations.kept_of_row(train.activation_checkpointing),
        f"{rows} x {seq_len:,} tokens, " + ("inputs of the layers" if train.activation_checkpointing else "all layers"),
    )
    recomputed = MemoryPart("one layer again", rows * max(activations.layers), "recomputed in the backward pass")
    loss = MemoryPart(
        "loss",
        _LOGIT_BYTES * chunk * config.vocab_size
        + 2 * (2 if bf16 else 4) * tokens * config.hidden_size  # the last hidden states and their gradient
        + (6 if bf16 else 4) * head,  # the head's gradient, in bf16 a second time before it is summed
        f"logits of {chunk:,} tokens x {config.vocab_size:,}, and the head's gradient",
    )
    parts = [weights, moments, gradients, kept, loss]
    if bf16:
        parts.insert(3, copies)
    if train.activation_checkpointing:
        parts.insert(-1, recomputed)

    held = weights.bytes + moments.bytes
    during = (copies.bytes if bf16 else 0) + kept.bytes + (gradients.bytes if accumulation > 1 else 0)
    at_loss = during + loss.bytes
    at_last_layer = during + 4 * head + (recomputed.bytes if train.activation_checkpointing else 0)
    # The embedding's gradient comes as a whole, beside the one that it is added to.
    after_backward = gradients.bytes + 4 * config.vocab_size * config.hidden_size
    return MemoryPlan(tuple(parts), held + max(at_loss, at_last_layer, after_backward))


def _moments(train: Train) -> str:
    if train.optimizer == "adamw":
        return "AdamW, 8 bytes a parameter"
    return "Muon 4 bytes a hidden-matrix parameter, AdamW 8 the others"
