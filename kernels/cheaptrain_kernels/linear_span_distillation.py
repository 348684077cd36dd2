"""Distillation between models with other tokens, through spans of text that both can say how likely they find.

For a span, P is the teacher's probability of it and Q the student's, each the product over its own tokens. Both are
brought to the power 1 / T, and what is compared are two distributions over two outcomes, "this" and "anything else":

    alpha x T^2 x weight x D((P, 1 - P), (Q, 1 - Q)) + (1 - alpha) x cross-entropy of the student's tokens

(after Minixhofer, Vulic, Ponti: Cross-Tokenizer Distillation via Approximate Likelihood Matching, arXiv 2503.20083).
A span weighs as much as the student's tokens in it, so that what a batch is divided by stays what it is without a
teacher. Q depends on the student's logits through the log-probabilities of its tokens alone. So the student's are made
once, without gradient; dD/dlog Q of each span is a number a token; and with these as weights, of either sign, the
cross-entropy that is fused already has the gradient wanted. Logits are made twice, and never for more than a chunk.

The trap is certainty. Where Q rounds to 1, log(1 - Q) is minus infinity and its slope as well: no span counts as
likelier than exp(-1e-6), and the slope is the one there, so a student that is sure and wrong is still pulled back.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from cheaptrain_kernels.backend import backend_for
from cheaptrain_kernels.divergence import DistillationLoss, compare
from cheaptrain_kernels.linear_cross_entropy import IGNORED, check_weights, linear_cross_entropy, token_losses
from cheaptrain_kernels.linear_distillation import distilled_at_once

SUREST = -1e-6  # log-probability that a span has at most


class SpanWord(NamedTuple):
    """What a teacher says of spans. `positions` int64 [tokens in spans]: the student's, span by span, each once;
    `lengths` int64 [spans]: how many each has; `log_p` fp32 [spans]: the teacher's log-probabilities."""

    positions: Tensor
    lengths: Tensor
    log_p: Tensor


class SpanSums(NamedTuple):
    """Sums over supervised positions, times their weights where they have one; only `loss` has a gradient."""

    loss: Tensor  # fp32
    divergence: Tensor  # fp32, T^2 included
    cross_entropy: Tensor  # fp32, in nats
    correct: Tensor  # int64: the student's likeliest token is the label
    aligned: Tensor  # fp32: what the positions in spans weigh


def linear_span_distillation(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    said: SpanWord,
    *,
    loss: DistillationLoss,
    vocab: int,
    weights: Tensor | None = None,
    chunk_tokens: int = 8192,
) -> SpanSums:
    """The loss of `hidden @ weight.T` against a teacher's word on spans and the labels, summed. Call it outside of
    autocast.

    Args:
        hidden: `[tokens, hidden]`, the student's final hidden states, in the compute dtype.
        weight: `[rows, hidden]`, its head; rows from `vocab` on are padding.
        labels: `[tokens]` int64, the target of each position; -100 counts nothing, and no position of a span is one.
        said: the spans, and what the teacher says of them. Gets no gradient.
        weights: `[tokens]` fp32, what each position weighs; None: 1.
        chunk_tokens: tokens whose logits exist at once, at most.

    Raises ValueError for weights that are not one for each label.
    """
    check_weights(weights, labels)
    head = weight if vocab == weight.shape[0] else weight[:vocab]
    chunk = distilled_at_once(vocab, chunk_tokens, backend_for(hidden.device))
    with torch.no_grad():
        losses = token_losses(hidden, head, labels, chunk_tokens=chunk)
        factor = _factor(labels, weights)
        log_q, weighs = (sum_of_spans(each, said.positions, said.lengths) for each in (-losses, factor))
        divergence, slope = _two_outcomes(said.log_p, log_q, loss)
        pulls = slope * weighs * (loss.alpha * loss.temperature)  # T^2, and 1 / T from the power
        of_tokens = factor * (1 - loss.alpha)
        each = torch.repeat_interleave(pulls, said.lengths, output_size=len(said.positions))
        of_tokens[said.positions] = of_tokens[said.positions] - each
        divergence = (divergence * weighs).sum() * loss.temperature**2
        cross_entropy = (losses * factor).sum()
    pulled, correct, _ = linear_cross_entropy(hidden, head, labels, weights=of_tokens, chunk_tokens=chunk)
    total = loss.alpha * divergence + (1 - loss.alpha) * cross_entropy
    # Its own value is of no use, its gradient is that of the total.
    return SpanSums(total + (pulled - pulled.detach()), divergence, cross_entropy, correct, weighs.sum())


def linear_span_distillation_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    said: SpanWord,
    *,
    loss: DistillationLoss,
    vocab: int,
    weights: Tensor | None = None,
) -> SpanSums:
    """The plain way: all logits at once, a loop over spans, the definitions as they are written, autograd."""
    logits = functional.linear(hidden, weight[:vocab]).float()
    losses, factor = functional.cross_entropy(logits, labels, reduction="none"), _factor(labels, weights)
    divergence, aligned, first = logits.new_zeros(()), logits.new_zeros(()), 0
    for length, log_p in zip(said.lengths.tolist(), said.log_p, strict=True):
        mine = said.positions[first : first + length]
        first += length
        p = (log_p.double() / loss.temperature).clamp_max(SUREST).exp()
        log_q = -losses[mine].double().sum() / loss.temperature
        q = (log_q + (log_q.clamp_max(SUREST) - log_q).detach()).exp()
        two_p, two_q = torch.stack([p, 1 - p]), torch.stack([q, 1 - q])
        if loss.divergence == "forward_kl":
            far = (two_p * (two_p / two_q).log()).sum()
        elif loss.divergence == "reverse_kl":
            far = (two_q * (two_q / two_p).log()).sum()
        else:
            mixed = loss.beta * two_p + (1 - loss.beta) * two_q
            far = loss.beta * (two_p * (two_p / mixed).log()).sum()
            far = far + (1 - loss.beta) * (two_q * (two_q / mixed).log()).sum()
        divergence = divergence + far.float() * factor[mine].sum() * loss.temperature**2
        aligned = aligned + factor[mine].sum()
    cross_entropy = (losses * factor).sum()
    return SpanSums(
        loss.alpha * divergence + (1 - loss.alpha) * cross_entropy,
        divergence.detach(),
        cross_entropy.detach(),
        ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum(),
        aligned,
    )


def sum_of_spans(values: Tensor, positions: Tensor, lengths: Tensor) -> Tensor:
    """`values` `[tokens]` summed over the positions of each span (see `SpanWord`): `[spans]`."""
    if not len(lengths):
        return values.new_zeros(0)
    # Always in the same order. Not index_add: on a GPU that adds in whatever order it comes to.
    return torch.segment_reduce(values[positions], "sum", lengths=lengths, unsafe=True)


def _factor(labels: Tensor, weights: Tensor | None) -> Tensor:
    supervised = labels != IGNORED
    return supervised.float() if weights is None else supervised * weights


def _two_outcomes(log_p: Tensor, log_q: Tensor, loss: DistillationLoss) -> tuple[Tensor, Tensor]:
    """The divergence of each span `[spans]`, without T, and its slope over log Q / T."""
    p, q = ((each / loss.temperature).clamp_max(SUREST) for each in (log_p, log_q))
    other_q = _log_of_rest(q)
    divergence, h = compare(torch.stack([p, _log_of_rest(p)], -1), torch.stack([q, other_q], -1), loss)
    return divergence, h[:, 0] - (q - other_q).exp() * h[:, 1]


def _log_of_rest(log_p: Tensor) -> Tensor:
    """log(1 - exp(log_p)) for log_p < 0, exact at both ends."""
    return torch.where(log_p > -math.log(2), (-log_p.expm1()).log(), (-log_p.exp()).log1p())
