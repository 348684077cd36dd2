"""Cross-entropy through the language-model head, a chunk of tokens at a time.

The logits of 32,768 tokens over a vocabulary of 128,256 are 16.8 GB in fp32, and plain autograd keeps several copies.
Here the logits of one chunk are made, turned into their own gradient in place, multiplied into the gradients of the
hidden states and of the head, and dropped: the largest thing alive is `[chunk, vocab]`. The gradients are therefore
ready when the forward ends, and the backward only scales them by the incoming scalar.

The loss is a *sum* over supervised tokens, never a mean: the caller divides by the count of the whole global batch,
which is the only division that makes accumulation and the number of processes invisible.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

IGNORED = -100


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The plain way: all logits at once. Same arguments and results as `linear_cross_entropy`."""
    logits = functional.linear(hidden, weight).float()
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    loss = losses.sum() if weights is None else (losses * weights).sum()
    return loss, ((logits.argmax(-1) == labels) & (labels != IGNORED)).sum()


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, weights: Tensor | None = None, chunk_tokens: int = 8192
) -> tuple[Tensor, Tensor]:
    """Sum of the cross-entropies of `hidden @ weight.T`, and how many tokens were predicted right.

    Args:
        hidden: `[tokens, hidden]`, the final hidden states, in the compute dtype.
        weight: `[vocab, hidden]`, the head. Cast to the dtype of `hidden` for the products; its gradient is summed in
            the dtype of `weight`.
        labels: `[tokens]` int64, the target of each position; -100 is not supervised.
        weights: `[tokens]` fp32, what each position's loss and gradient are multiplied by; None: 1.
        chunk_tokens: tokens whose logits exist at once.

    Returns:
        loss: fp32 scalar, in nats, summed over supervised tokens (0 when there is none), times their weights.
        correct: int64 scalar, supervised tokens whose likeliest next token is the label.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"expected [tokens, hidden], [vocab, hidden], [tokens]; got {hidden.shape}, {weight.shape}, {labels.shape}"
        )
    check_weights(weights, labels)
    loss, correct = _LinearCrossEntropy.apply(hidden, weight, labels, weights, chunk_tokens)
    return loss, correct


@torch.no_grad()
def token_losses(hidden: Tensor, weight: Tensor, labels: Tensor, *, chunk_tokens: int = 8192) -> Tensor:
    """The cross-entropy of each token, `[tokens]` fp32, without gradients; 0 where the label is -100. For
    evaluation."""
    compute_weight = weight.to(hidden.dtype)
    losses = [
        functional.cross_entropy(functional.linear(states, compute_weight).float(), target, reduction="none")
        for states, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor | None, chunk_tokens: int
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        compute_weight = weight.to(hidden.dtype)
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target = hidden[rows], labels[rows]
            supervised = target != IGNORED
            counts_for = supervised if weights is None else supervised * weights[rows]  # [chunk]
            index = target.clamp_min(0).unsqueeze(1)  # [chunk, 1]
            logits = functional.linear(chunk, compute_weight).float()  # [chunk, vocab]
            correct += ((logits.argmax(-1) == target) & supervised).sum()
            log_probabilities = functional.log_softmax(logits, -1)
            del logits
            loss -= (log_probabilities.gather(1, index).squeeze(1) * counts_for).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            # softmax - one_hot, written over the log-probabilities; unsupervised rows become exactly zero.
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
            gradient.mul_(counts_for.unsqueeze(1))
            gradient = gradient.to(hidden.dtype)
            add_chunk(gradient, chunk, compute_weight, None if grad_hidden is None else grad_hidden[rows], grad_weight)
            del log_probabilities, gradient  # or they would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None


def check_weights(weights: Tensor | None, labels: Tensor) -> None:
    """Raise ValueError for weights that are not one for each label."""
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"expected a weight for each of the {labels.shape} labels; got {weights.shape}")


def add_chunk(
    gradient: Tensor, chunk: Tensor, weight: Tensor, grad_hidden: Tensor | None, grad_weight: Tensor | None
) -> None:
    """Take a chunk's gradient of the logits `[chunk, vocab]` on to its hidden states and to the head.

    `chunk` `[chunk, hidden]`, `weight` `[vocab, hidden]` in the compute dtype. `grad_hidden` `[chunk, hidden]` is
    filled, `grad_weight` `[vocab, hidden]` is added to, where they are wanted.
    """
    if grad_hidden is not None:
        grad_hidden.copy_(gradient @ weight)
    if grad_weight is not None:
        if gradient.dtype == grad_weight.dtype:
            grad_weight.addmm_(gradient.T, chunk)
        else:
            grad_weight += gradient.T @ chunk


def scaled_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients that the forward pass left in `ctx.gradients`, times the incoming scalar, in place."""
    gradients: tuple[Tensor | None, Tensor | None] = ctx.gradients
    ctx.gradients = None  # free them: a second backward through the same loss is an error, as with any saved tensor
    for gradient in gradients:
        if gradient is not None:
            _scale(gradient, grad_loss, ctx.chunk_tokens)
    return gradients


def _scale(gradient: Tensor, factor: Tensor, chunk_rows: int) -> None:
    """Multiply in place by the fp32 scalar `factor`, which is 1 / tokens of the batch.

    Rounded to bf16 first, as a plain product would, it is off by up to 0.4 %, in one direction for every layer below.
    """
    if gradient.dtype.itemsize >= factor.dtype.itemsize:
        gradient.mul_(factor.to(gradient.dtype))
        return
    for rows in gradient.split(chunk_rows):
        rows.copy_(rows.to(factor.dtype).mul_(factor))
