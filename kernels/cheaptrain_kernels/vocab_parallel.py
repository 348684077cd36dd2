"""Cross-entropy through a head whose rows are spread over the processes of a group: the vocabulary-parallel twin of
`linear_cross_entropy`.

Every process holds the same hidden states and its own rows of the head, so it can make its own columns of the logits
and no others. What a row of logits needs from all of them is three numbers, so no logits ever travel: two messages a
chunk, `[chunk]` (the largest logit) and `[3, chunk]` (the sum of exponentials, the target's logit, and whether the
target is the likeliest). From then on each process has its columns of the gradient, hence its rows of the head's
gradient, whole, and its *share* of the gradient of the hidden states.

The trap is that share. It is returned as it is, not summed over the group: the caller knows whether every process
needs the whole sum (all-reduce) or its own tokens only (reduce-scatter, half the traffic). A caller that forgets trains
on, quietly, with a fraction of the gradient below the head.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

from cheaptrain_kernels.linear_cross_entropy import IGNORED, add_chunk, check_weights, scaled_gradients


def vocab_rows(vocab: int, size: int, rank: int) -> range:
    """The rows of a head of `vocab` rows that process `rank` of `size` owns: as `torch.chunk` and DTensor's `Shard(0)`
    cut it, so the last ones may own fewer rows, or none."""
    share = -(-vocab // size)
    return range(min(rank * share, vocab), min((rank + 1) * share, vocab))


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    group: ProcessGroup,
    weights: Tensor | None = None,
    chunk_tokens: int = 8192,
) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` with the head's rows spread over `group`. Collective: all its processes call it together.

    Backward gives `hidden` this process's PARTIAL gradient: the gradient of `hidden` is its sum over `group`, which is
    left to the caller. The gradient of `weight` is whole. As in the plain kernel both are ready when the forward ends.

    Args:
        hidden: `[tokens, hidden]`, the final hidden states, in the compute dtype; the same on every process.
        weight: `[rows, hidden]`, the rows `vocab_rows(vocab, size, rank)` of the head, a plain tensor. Cast to the
            dtype of `hidden` for the products; its gradient is summed in the dtype of `weight`.
        labels: `[tokens]` int64, the target of each position among the whole vocabulary; -100 is not supervised.
        vocab: rows of the whole head.
        group: the processes that share the head.
        weights: `[tokens]` fp32, what each position's loss and gradient are multiplied by, the same on every process;
            None: 1.
        chunk_tokens: tokens whose logits exist at once; the same on every process.

    Returns:
        loss: fp32 scalar, in nats, summed over supervised tokens, times their weights; the same bits on every process.
        correct: int64 scalar, supervised tokens whose likeliest next token is the label; of equally likely ones the
            lowest id counts, as in `torch.argmax`.

    Raises ValueError for shapes that do not fit, RuntimeError for a label outside the vocabulary (on a GPU a failed
    device assertion, later).
    """
    _check(hidden, weight, labels, vocab, group)
    check_weights(weights, labels)
    loss, correct = _VocabParallelLinearCrossEntropy.apply(hidden, weight, labels, weights, vocab, group, chunk_tokens)
    return loss, correct


@torch.no_grad()
def vocab_parallel_token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: int, group: ProcessGroup, chunk_tokens: int = 8192
) -> Tensor:
    """The cross-entropy of each token, `[tokens]` fp32, the same on every process, without gradients; 0 where the label
    is -100. Arguments as for `vocab_parallel_linear_cross_entropy`. For evaluation."""
    _check(hidden, weight, labels, vocab, group)
    first, compute_weight = _first_row(vocab, group), weight.to(hidden.dtype)
    losses = [hidden.new_empty(0, dtype=torch.float32)]
    for states, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        logits = functional.linear(states, compute_weight).float()
        losses.append(_reduce(logits, target, first, group)[0])
    return torch.cat(losses)


class _VocabParallelLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        vocab: int,
        group: ProcessGroup,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        first, compute_weight = _first_row(vocab, group), weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], labels[rows]
            logits = functional.linear(chunk, compute_weight).float()  # [chunk, rows of the head here]
            losses, total, right = _reduce(logits, target, first, group)
            if weights is not None:
                losses = losses * weights[rows]
            loss += losses.sum()
            correct += right.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one_hot, in the place of the logits; unsupervised rows, which nobody owns, become exactly zero.
            logits.mul_(((target != IGNORED) / total).unsqueeze(1))
            if weight.shape[0] > 0:
                index, own = _own_targets(target, first, weight.shape[0])
                logits.scatter_add_(1, index, -own.to(logits.dtype))
            if weights is not None:
                logits.mul_(weights[rows].unsqueeze(1))
            gradient = logits.to(hidden.dtype)
            add_chunk(gradient, chunk, compute_weight, None if grad_hidden is None else grad_hidden[rows], grad_weight)
            del logits, gradient  # or they would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None


def _reduce(logits: Tensor, target: Tensor, first: int, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """What a chunk's rows of logits come to over all processes.

    `logits` `[chunk, rows]` fp32 are this process's columns, and are overwritten with exp(logits - the row's largest).
    Returns `[chunk]` each: the loss (0 where not supervised), the sum of all exponentials, whether the target was the
    likeliest (False where not supervised).
    """
    size = logits.shape[1]
    if size > 0:
        own_largest, likeliest = logits.max(-1)  # the first of equal ones
    else:
        own_largest, likeliest = logits.new_full((len(target),), -torch.inf), torch.zeros_like(target)
    largest = own_largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits.sub_(largest.unsqueeze(1))

    index, own = _own_targets(target, first, size)
    target_logit = logits.gather(1, index).where(own, 0.0).squeeze(1) if size > 0 else torch.zeros_like(largest)
    # The label is the likeliest of the whole row when this sums to 1: its owner's first best is the label (+1), and
    # no process has an equal one of a lower id (-1 each).
    candidate = likeliest + first
    vote = (candidate == target).float() - (candidate < target).float()
    vote = vote.where(own_largest == largest, 0.0)
    logits.exp_()
    sums = torch.stack([logits.sum(-1), target_logit, vote])  # [3, chunk]
    dist.all_reduce(sums, group=group)
    total, target_logit, votes = sums.unbind()
    supervised = target != IGNORED
    return (total.log() - target_logit) * supervised, total, (votes == 1) & supervised


def _own_targets(target: Tensor, first: int, size: int) -> tuple[Tensor, Tensor]:
    """Which of this process's `size` columns is each target's, and whether one is; both `[chunk, 1]`."""
    index = (target - first).unsqueeze(1)
    own = (index >= 0) & (index < size)
    return index.where(own, 0), own


def _first_row(vocab: int, group: ProcessGroup) -> int:
    return vocab_rows(vocab, group.size(), group.rank()).start


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, vocab: int, group: ProcessGroup) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"expected [tokens, hidden], [rows, hidden], [tokens]; got {hidden.shape}, {weight.shape}, {labels.shape}"
        )
    owned = len(vocab_rows(vocab, group.size(), group.rank()))
    if weight.shape[0] != owned:
        raise ValueError(
            f"process {group.rank()} of {group.size()} owns {owned} of the head's {vocab} rows, and was given "
            f"{weight.shape[0]}: pass the local rows of a head sharded by Shard(0), and the whole head's number of rows"
        )
    # A label that no process owns would go unnoticed: no gather is out of bounds here.
    known = (labels == IGNORED) | ((labels >= 0) & (labels < vocab))
    torch._assert_async(known.all(), f"a label lies outside the vocabulary of {vocab}")
