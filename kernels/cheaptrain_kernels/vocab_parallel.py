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

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

from cheaptrain_kernels.backend import Backend, backend_for
from cheaptrain_kernels.linear_cross_entropy import (
    IGNORED,
    CrossEntropySums,
    capped,
    check_labels,
    check_weights,
    checked_cap,
)
from cheaptrain_kernels.products import add_chunk, compute_head, scaled_gradients
from cheaptrain_kernels.row_ops import row_statistics, softmax_gradient


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
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 8192,
) -> CrossEntropySums:
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
        z_loss, soft_cap: as for `linear_cross_entropy`.
        chunk_tokens: tokens whose logits exist at once; the same on every process.

    The sums have the same bits on every process.

    Raises ValueError for shapes that do not fit, RuntimeError for a label outside the vocabulary (on a GPU a failed
    device assertion, later).
    """
    _check(hidden, weight, labels, vocab, group)
    check_weights(weights, labels)
    with torch.autocast(hidden.device.type, enabled=False):
        results = _VocabParallelLinearCrossEntropy.apply(
            hidden, weight, labels, weights, vocab, group, z_loss, checked_cap(soft_cap), chunk_tokens
        )
    return CrossEntropySums(*results)


@torch.no_grad()
def vocab_parallel_token_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab: int,
    group: ProcessGroup,
    soft_cap: float | None = None,
    chunk_tokens: int = 8192,
) -> Tensor:
    """The cross-entropy of each token, `[tokens]` fp32, the same on every process, without gradients; 0 where the label
    is -100. Arguments as for `vocab_parallel_linear_cross_entropy`. For evaluation."""
    _check(hidden, weight, labels, vocab, group)
    cap, first, own, backend = checked_cap(soft_cap), _first_row(vocab, group), len(weight), backend_for(hidden.device)
    head = compute_head(weight, own, hidden.dtype, backend)
    losses = [hidden.new_empty(0, dtype=torch.float32)]
    for states, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        logits = functional.linear(states, head)
        losses.append(_reduce(_look_at(logits, target, first, own, cap, backend)[0], target, first, group).entropy)
        del logits
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
        z_loss: float,
        soft_cap: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        first, own, backend = _first_row(vocab, group), len(weight), backend_for(hidden.device)
        head = compute_head(weight, own, hidden.dtype, backend)
        loss, cross_entropy = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], labels[rows]
            supervised = target != IGNORED
            factor = supervised.float() if weights is None else supervised * weights[rows]  # [chunk]
            logits = functional.linear(chunk, head)  # [chunk, rows of the head here]
            here, logits = _look_at(logits, target, first, own, soft_cap, backend)
            found = _reduce(here, target, first, group)
            entropy = (found.entropy * factor).sum()
            cross_entropy += entropy
            loss += entropy + z_loss * (found.log_sum.square() * factor).sum() if z_loss else entropy
            correct += found.right.sum()
            if grad_hidden is None and grad_weight is None:
                continue
            share = factor * (1 + 2 * z_loss * found.log_sum)
            if backend == "triton":
                softmax_gradient(
                    logits, target - first, torch.stack([found.log_sum, share, factor]), own, 1.0, soft_cap
                )
            else:
                _gradient_by_torch(logits, target, first, found.log_sum, share, factor, soft_cap)
            gradient = logits.to(hidden.dtype)
            add_chunk(gradient, chunk, head, None if grad_hidden is None else grad_hidden[rows], grad_weight)
            del logits, gradient  # or they would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        ctx.mark_non_differentiable(correct, cross_entropy)
        return loss, correct, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None, None, None


class _Here(NamedTuple):
    """What this process's columns say of each row, `[chunk]` each."""

    largest: Tensor
    total: Tensor  # the sum of exp(logit - largest)
    likeliest: Tensor  # a column, the first of equal ones
    target_logit: Tensor
    owns_target: Tensor  # else its logit is anything


class _Everywhere(NamedTuple):
    """What a chunk's rows of logits come to over all processes, `[chunk]` each."""

    entropy: Tensor  # 0 where not supervised
    log_sum: Tensor  # the logarithm of the sum of all exponentials
    right: Tensor  # whether the target was the likeliest; False where not supervised


def _look_at(
    logits: Tensor, target: Tensor, first: int, own: int, soft_cap: float, backend: Backend
) -> tuple[_Here, Tensor]:
    """What this process's columns say, of raw logits `[chunk, columns]` in the compute dtype; and the capped logits
    in fp32 where torch is to make the gradient of them, else the raw ones as they are."""
    index, owns = _own_targets(target, first, own)
    logits = logits if backend == "triton" else capped(logits.float(), soft_cap)
    if own:
        target_logit = logits.gather(1, index).float()
        target_logit = (capped(target_logit, soft_cap) if backend == "triton" else target_logit).squeeze(1)
    else:
        target_logit = torch.zeros_like(target, dtype=torch.float32)
    if backend == "triton":
        (largest, total, _), likeliest = row_statistics(logits, target.contiguous(), own, 1.0, soft_cap)
    elif own:
        largest, likeliest = logits.max(-1)
        total = (logits - largest.unsqueeze(1)).exp_().sum(-1)
    else:
        largest, likeliest = target_logit.new_full((len(target),), -torch.inf), torch.zeros_like(target)
        total = torch.zeros_like(largest)
    return _Here(largest, total, likeliest, target_logit, owns.squeeze(1)), logits


def _reduce(here: _Here, target: Tensor, first: int, group: ProcessGroup) -> _Everywhere:
    """Over all processes, in two messages."""
    largest = here.largest.clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    # The label is the likeliest of the whole row when this sums to 1: its owner's first best is the label (+1), and
    # no process has an equal one of a lower id (-1 each).
    candidate = here.likeliest + first
    vote = (candidate == target).float() - (candidate < target).float()
    vote = vote.where(here.largest == largest, 0.0)
    total = here.total * (here.largest - largest).exp()
    sums = torch.stack([total, (here.target_logit - largest).where(here.owns_target, 0.0), vote])  # [3, chunk]
    dist.all_reduce(sums, group=group)
    log_total, supervised = sums[0].log(), target != IGNORED
    return _Everywhere((log_total - sums[1]) * supervised, largest + log_total, (sums[2] == 1) & supervised)


def _gradient_by_torch(
    logits: Tensor, target: Tensor, first: int, log_sum: Tensor, share: Tensor, factor: Tensor, soft_cap: float
) -> Tensor:
    """What `softmax_gradient` gives, in the place of capped fp32 `logits` `[chunk, columns]`."""
    slope = 1 - (logits / soft_cap).square() if soft_cap else None
    logits.sub_(log_sum.unsqueeze(1)).exp_().mul_(share.unsqueeze(1))
    if logits.shape[1]:
        index, owns = _own_targets(target, first, logits.shape[1])
        logits.scatter_add_(1, index, -(owns * factor.unsqueeze(1)))
    return logits if slope is None else logits.mul_(slope)


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
    check_labels(labels, vocab)
