"""Cross-entropy through the language-model head, a chunk of tokens at a time.

The logits of 32,768 tokens over a vocabulary of 128,256 are 16.8 GB in fp32, and plain autograd keeps several copies.
Here the logits of one chunk are made, turned into their own gradient in place, multiplied into the gradients of the
hidden states and of the head, and dropped: the largest thing alive is `[chunk, vocab]`, in the compute dtype where
Triton does it (`triton_rows.py`), in fp32 where torch does. The gradients are therefore ready when the forward ends,
and the backward only scales them by the incoming scalar.

Logits in bf16 are what a model in bf16 has anyway: the matrix product rounds them before anything looks at them, here
as in the plain way. All that comes after is fp32, and the gradient of the logits is rounded to bf16 for its products.

The loss is a *sum* over supervised tokens, never a mean: the caller divides by the count of the whole global batch,
which is the only division that makes accumulation and the number of processes invisible.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cheaptrain_kernels.backend import backend_for
from cheaptrain_kernels.products import add_chunk, compute_head, scaled_gradients
from cheaptrain_kernels.row_ops import cross_entropy_rows

IGNORED = -100


class CrossEntropySums(NamedTuple):
    """Sums over supervised tokens, times their weights where they have one; only `loss` has a gradient."""

    loss: Tensor  # fp32 scalar, what is minimised: the cross-entropy in nats, and the z-loss
    correct: Tensor  # int64 scalar, tokens whose likeliest next token is the label; of equal ones the lowest id counts
    cross_entropy: Tensor  # fp32 scalar, without the z-loss


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
) -> CrossEntropySums:
    """The plain way: all logits at once. Same arguments and results as `linear_cross_entropy`."""
    logits = functional.linear(hidden, weight).float()
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    supervised = labels != IGNORED
    losses = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none")
    factor = supervised.float() if weights is None else supervised * weights
    loss = cross_entropy = (losses * factor).sum()
    if z_loss:
        loss = cross_entropy + z_loss * (logits.logsumexp(-1).square() * factor).sum()
    correct = ((logits.argmax(-1) == labels) & supervised).sum()
    return CrossEntropySums(loss, correct, cross_entropy.detach())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    weights: Tensor | None = None,
    z_loss: float = 0.0,
    soft_cap: float | None = None,
    chunk_tokens: int = 8192,
) -> CrossEntropySums:
    """Sum of the cross-entropies of `hidden @ weight.T`, and how many tokens were predicted right.

    Args:
        hidden: `[tokens, hidden]`, the final hidden states, in the compute dtype.
        weight: `[vocab, hidden]`, the head. Cast to the dtype of `hidden` for the products; its gradient is summed in
            the dtype of `weight`.
        labels: `[tokens]` int64, the target of each position; -100 is not supervised.
        weights: `[tokens]` fp32, what each position's loss and gradient are multiplied by; None: 1.
        z_loss: adds so much of each token's squared logarithm of the sum of exponentials (PaLM, arXiv 2204.02311).
        soft_cap: logits become soft_cap x tanh(logits / soft_cap) (Gemma 2, arXiv 2408.00118).
        chunk_tokens: tokens whose logits exist at once.

    Raises ValueError for shapes that do not fit, RuntimeError for a label outside the vocabulary (on a GPU a failed
    device assertion, later).
    """
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1:
        raise ValueError(
            f"expected [tokens, hidden], [vocab, hidden], [tokens]; got {hidden.shape}, {weight.shape}, {labels.shape}"
        )
    check_weights(weights, labels)
    check_labels(labels, weight.shape[0])
    with torch.autocast(hidden.device.type, enabled=False):
        results = _LinearCrossEntropy.apply(
            hidden, weight, labels, weights, z_loss, checked_cap(soft_cap), chunk_tokens
        )
    return CrossEntropySums(*results)


@torch.no_grad()
def token_losses(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, soft_cap: float | None = None, chunk_tokens: int = 8192
) -> Tensor:
    """The cross-entropy of each token, `[tokens]` fp32, without gradients; 0 where the label is -100. For
    evaluation."""
    check_labels(labels, weight.shape[0])
    cap, backend = checked_cap(soft_cap), backend_for(hidden.device)
    head = compute_head(weight, weight.shape[0], hidden.dtype, backend)
    losses = [hidden.new_empty(0, dtype=torch.float32)]
    for states, target in zip(hidden.split(chunk_tokens), labels.split(chunk_tokens), strict=True):
        logits = functional.linear(states, head)
        if backend == "triton":
            losses.append(cross_entropy_rows(logits, target.contiguous(), None, weight.shape[0], 0.0, cap, False)[1])
        else:
            losses.append(functional.cross_entropy(capped(logits.float(), cap), target, reduction="none"))
        del logits
    return torch.cat(losses)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        weights: Tensor | None,
        z_loss: float,
        soft_cap: float,
        chunk_tokens: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        wanted = want_hidden or want_weight
        vocab, backend = weight.shape[0], backend_for(hidden.device)
        head = compute_head(weight, vocab, hidden.dtype, backend)
        loss, cross_entropy = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None
        labels, weights = labels.contiguous(), None if weights is None else weights.float().contiguous()

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            chunk, target, own = hidden[rows], labels[rows], None if weights is None else weights[rows]
            if backend == "triton":
                gradient = functional.linear(chunk, head)  # [chunk, columns]: logits, until the next line
                found = cross_entropy_rows(gradient, target, own, vocab, z_loss, soft_cap, wanted).sum(1)
            else:
                found, gradient = _by_torch(chunk, head, target, own, z_loss, soft_cap, wanted)
            loss += found[0]
            cross_entropy += found[1]
            correct += found[2].long()  # a chunk has fewer tokens than an fp32 number can count
            if wanted:
                add_chunk(gradient, chunk, head, None if grad_hidden is None else grad_hidden[rows], grad_weight)
            del gradient  # or it would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        ctx.mark_non_differentiable(correct, cross_entropy)
        return loss, correct, cross_entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None


def _by_torch(
    chunk: Tensor,
    head: Tensor,
    target: Tensor,
    weights: Tensor | None,
    z_loss: float,
    soft_cap: float,
    wanted: bool,
) -> tuple[Tensor, Tensor]:
    """What `cross_entropy_rows` gives, summed: `[3]`; and the gradient `[chunk, vocab]` where it is wanted."""
    supervised = target != IGNORED
    factor = supervised.float() if weights is None else supervised * weights  # [chunk]
    index = target.clamp_min(0).unsqueeze(1)  # [chunk, 1]
    logits = capped(functional.linear(chunk, head).float(), soft_cap)  # [chunk, vocab]
    correct = ((logits.argmax(-1) == target) & supervised).sum()
    slope = 1 - (logits / soft_cap).square() if soft_cap and wanted else None
    log_sum = logits.logsumexp(-1) if z_loss else None
    log_probabilities = functional.log_softmax(logits, -1)
    del logits
    cross_entropy = loss = -(log_probabilities.gather(1, index).squeeze(1) * factor).sum()
    if log_sum is not None:
        loss = cross_entropy + z_loss * (log_sum.square() * factor).sum()
    found = torch.stack([loss, cross_entropy, correct.float()])
    if not wanted:
        return found, log_probabilities
    # softmax - one_hot, written over the log-probabilities; unsupervised rows become exactly zero.
    gradient = log_probabilities.exp_()
    if log_sum is not None:
        gradient.mul_((1 + 2 * z_loss * log_sum).unsqueeze(1))
    gradient.scatter_add_(1, index, torch.full_like(index, -1, dtype=gradient.dtype))
    gradient.mul_(factor.unsqueeze(1))
    if slope is not None:
        gradient.mul_(slope)
    return found, gradient.to(chunk.dtype)


def capped(logits: Tensor, soft_cap: float) -> Tensor:
    """soft_cap x tanh(logits / soft_cap), in place; 0: as they are."""
    return logits.div_(soft_cap).tanh_().mul_(soft_cap) if soft_cap else logits


def checked_cap(soft_cap: float | None) -> float:
    """0 for None. Raises ValueError for a cap that is not above 0."""
    if soft_cap is not None and soft_cap <= 0:
        raise ValueError(f"a soft cap is a number above 0, or None; got {soft_cap}")
    return soft_cap or 0.0


def check_labels(labels: Tensor, vocab: int) -> None:
    """Raise RuntimeError for a label outside the vocabulary: a gather may not notice. On a GPU without waiting for it:
    the assertion fails later, on the device."""
    known = (labels == IGNORED) | ((labels >= 0) & (labels < vocab))
    torch._assert_async(known.all(), f"a label lies outside the vocabulary of {vocab}")


def check_weights(weights: Tensor | None, labels: Tensor) -> None:
    """Raise ValueError for weights that are not one for each label."""
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"expected a weight for each of the {labels.shape} labels; got {weights.shape}")
