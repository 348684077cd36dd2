"""Distillation through both language-model heads, a chunk of tokens at a time.

The logits of student and teacher for 32,768 tokens of a vocabulary of 128,256 are 16.8 GB each in fp32, and autograd
keeps several copies. Here they are made for one chunk, turned into the gradient of the student's logits in place,
multiplied into the gradients of hidden states and head, and dropped, as in `linear_cross_entropy`. A chunk has as many
tokens as keep the logits of a model below a bound (`distilled_at_once`), so the peak is the same for a vocabulary of
32,000 and of 256,000. By torch that is 256 MiB of fp32, four times at most; with a top-k teacher out of a cache there
are two of them, and none of the teacher's. By Triton it is one tensor a model, in the compute dtype: 1 GiB in bf16,
because matrix products of 512 tokens do not fill a GPU.

Vocabularies are padded, each model's to another size; the probabilities a model gives to rows that are no token are
noise. Only the first `vocab` rows of either head take part.

The heads' rows may be spread over the processes of a group (`Spread`). As in `vocab_parallel.py` every process then
gets its own PARTIAL gradient of the hidden states, to be summed by the caller, and the whole gradient of its own rows
of the head.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cheaptrain_kernels.backend import Backend, backend_for
from cheaptrain_kernels.columns import Columns, Spread
from cheaptrain_kernels.distillation_torch import top_k_by_torch, word_by_torch
from cheaptrain_kernels.distillation_triton import top_k_by_triton, word_by_triton
from cheaptrain_kernels.divergence import DistillationLoss, TeacherHead, TopK
from cheaptrain_kernels.linear_cross_entropy import IGNORED, check_labels, check_weights
from cheaptrain_kernels.products import add_chunk, compute_head, scaled_gradients
from cheaptrain_kernels.vocab_parallel import vocab_rows

LOGITS_AT_ONCE: dict[Backend, int] = {"torch": 2**26, "triton": 2**29}  # of one model: numbers
_WHOLE_TILES = 256  # tokens: what a large chunk is a multiple of, for the matrix products


class DistillationSums(NamedTuple):
    """Sums over supervised positions, times their weights where they have one; only `loss` has a gradient."""

    loss: Tensor  # fp32: alpha T^2 divergence + (1 - alpha) cross-entropy
    divergence: Tensor  # fp32, T^2 included
    cross_entropy: Tensor  # fp32, of the student at T = 1, in nats
    correct: Tensor  # int64: the student's likeliest token is the label
    agreed: Tensor  # int64: it is the teacher's


def linear_distillation(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead | TopK,
    labels: Tensor,
    *,
    loss: DistillationLoss,
    vocab: int,
    weights: Tensor | None = None,
    chunk_tokens: int = 8192,
    spread: Spread | None = None,
) -> DistillationSums:
    """The loss of `hidden @ weight.T` against a teacher and the labels, summed. Call it outside of autocast.

    Args:
        hidden: `[tokens, hidden]`, the student's final hidden states, in the compute dtype.
        weight: `[rows, hidden]`, its head. Cast to the dtype of `hidden` for the products; its gradient is summed in
            the dtype of `weight`.
        teacher: its hidden states and head, or its top-k log-probabilities (see divergence.py). Gets no gradient.
        labels: `[tokens]` int64, the target of each position; what is -100 counts nothing, and has no gradient.
        vocab: tokens there are; further rows of either head are padding.
        weights: `[tokens]` fp32, what the loss and gradient of each position are multiplied by; None: 1.
        chunk_tokens: tokens whose logits exist at once, at most.
        spread: both heads are spread over processes, and these are their rows here; not with top-k. Collective.

    Raises ValueError for shapes that do not fit.
    """
    _check(hidden, weight, teacher, labels, vocab, spread)
    check_weights(weights, labels)
    results = _LinearDistillation.apply(
        hidden, weight, teacher, labels, weights, loss, Columns(vocab, weight.shape[0], spread), chunk_tokens
    )
    return DistillationSums(*results)


@torch.no_grad()
def teacher_top_k(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float, vocab: int, chunk_tokens: int = 8192
) -> TopK:
    """What `linear_distillation` makes of `TeacherHead(hidden, weight, k)`, to be kept: by the same operations."""
    columns, backend = Columns(vocab, weight.shape[0], None), backend_for(hidden.device)
    head = compute_head(weight, vocab, hidden.dtype, backend, spare=True)
    top_k = top_k_by_triton if backend == "triton" else top_k_by_torch
    parts = [
        top_k(states, head, k, temperature, columns)
        for states in hidden.split(distilled_at_once(vocab, chunk_tokens, backend))
    ]
    return TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))


def distilled_at_once(columns: int, chunk_tokens: int, backend: Backend = "torch") -> int:
    """Tokens of a chunk with so many `columns` of logits here: as many as `LOGITS_AT_ONCE` allows."""
    most = max(1, LOGITS_AT_ONCE[backend] // max(1, columns))
    if backend == "triton" and most > _WHOLE_TILES:
        most -= most % _WHOLE_TILES
    return min(chunk_tokens, most)


def linear_distillation_reference(
    hidden: Tensor,
    weight: Tensor,
    teacher: TeacherHead | TopK,
    labels: Tensor,
    *,
    loss: DistillationLoss,
    vocab: int,
    weights: Tensor | None = None,
) -> DistillationSums:
    """The plain way: all logits at once, the definitions as they are written, autograd."""
    logits = functional.linear(hidden, weight[:vocab]).float()
    log_q = functional.log_softmax(logits / loss.temperature, -1)
    if isinstance(teacher, TeacherHead):
        said = functional.linear(teacher.hidden, teacher.weight[:vocab]).float().detach()
        log_p = functional.log_softmax(said / loss.temperature, -1)
        likeliest = said.argmax(-1)
        if teacher.top_k is not None:
            kept, ids = log_p.topk(teacher.top_k)
            log_p, log_q = _with_rest(kept, 1 - kept.exp().sum(-1)), _outcomes(log_q, ids)
    else:
        ids, likeliest = teacher.ids.long(), teacher.ids[:, 0]
        log_p = torch.cat([teacher.log_probabilities, teacher.log_rest[:, None]], -1)
        log_q = _outcomes(log_q, ids)
    p, q, b = log_p.exp(), log_q.exp(), loss.beta
    if loss.divergence == "forward_kl":
        divergence = (p * (log_p - log_q)).sum(-1)
    elif loss.divergence == "reverse_kl":
        divergence = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (b * p + (1 - b) * q).log()
        divergence = (b * p * (log_p - log_m) + (1 - b) * q * (log_q - log_m)).sum(-1)
    supervised = labels != IGNORED
    factor = supervised.float() if weights is None else supervised * weights
    cross_entropy = (functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none") * factor).sum()
    divergence = (divergence * factor).sum() * loss.temperature**2
    guess = logits.argmax(-1)
    return DistillationSums(
        loss.alpha * divergence + (1 - loss.alpha) * cross_entropy,
        divergence.detach(),
        cross_entropy.detach(),
        ((guess == labels) & supervised).sum(),
        ((guess == likeliest) & supervised).sum(),
    )


def _outcomes(log_q: Tensor, ids: Tensor) -> Tensor:
    kept = log_q.gather(1, ids)
    return _with_rest(kept, 1 - kept.exp().sum(-1))


def _with_rest(log_kept: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([log_kept, rest.clamp_min(1e-30).log()[:, None]], -1)


class _LinearDistillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        teacher: TeacherHead | TopK,
        labels: Tensor,
        weights: Tensor | None,
        loss: DistillationLoss,
        columns: Columns,
        chunk_tokens: int,
    ) -> tuple[Tensor, ...]:
        labels = labels.contiguous()
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        wanted, backend = want_hidden or want_weight, backend_for(hidden.device)
        word = word_by_triton if backend == "triton" else word_by_torch
        chunk_tokens = distilled_at_once(columns.most, chunk_tokens, backend)
        head = compute_head(weight, columns.count, hidden.dtype, backend)
        if isinstance(teacher, TeacherHead):
            other = compute_head(teacher.weight, columns.count, teacher.hidden.dtype, backend, spare=True)
            teacher = teacher._replace(weight=other)
        divergence, cross_entropy = (torch.zeros((), dtype=torch.float32, device=hidden.device) for _ in range(2))
        correct, agreed = (torch.zeros((), dtype=torch.int64, device=hidden.device) for _ in range(2))
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states, target = hidden[rows], labels[rows]
            supervised = target != IGNORED
            factor = supervised.float() if weights is None else supervised * weights[rows]  # [chunk]
            said = word(states, head, teacher.rows(rows), target, factor, loss, columns, wanted)
            cross_entropy += (said.cross_entropy * factor).sum()
            divergence += (said.divergence * factor).sum() * loss.temperature**2
            correct += ((said.likeliest == target) & supervised).sum()
            agreed += ((said.likeliest == said.taught) & supervised).sum()
            if said.gradient is not None:
                add_chunk(
                    said.gradient,
                    states,
                    head,
                    None if grad_hidden is None else grad_hidden[rows],
                    None if grad_weight is None else grad_weight[: columns.count],
                )
            del said  # or its gradient would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        total = loss.alpha * divergence + (1 - loss.alpha) * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy, correct, agreed)
        return total, divergence, cross_entropy, correct, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None, None


def _check(
    hidden: Tensor, weight: Tensor, teacher: TeacherHead | TopK, labels: Tensor, vocab: int, spread: Spread | None
) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or labels.dim() != 1 or len(hidden) != len(labels):
        raise ValueError(
            f"expected [tokens, hidden], [rows, hidden], [tokens]; got {hidden.shape}, {weight.shape}, {labels.shape}"
        )
    k = teacher.top_k if isinstance(teacher, TeacherHead) else teacher.ids.shape[1]
    if isinstance(teacher, TeacherHead):
        if len(teacher.hidden) != len(hidden) or teacher.hidden.dim() != 2 or teacher.weight.dim() != 2:
            raise ValueError(
                f"the teacher's states are {teacher.hidden.shape} and its head {teacher.weight.shape}, for "
                f"{len(hidden)} tokens"
            )
    elif len(teacher.ids) != len(hidden):
        raise ValueError(f"the teacher speaks of {len(teacher.ids)} tokens, the student of {len(hidden)}")
    if k is not None and (spread is not None or not 0 < k <= vocab):
        raise ValueError(f"top-k of {k} tokens needs a whole vocabulary of at least as many; it has {vocab}")
    heads = [weight] + ([teacher.weight] if isinstance(teacher, TeacherHead) else [])
    for rows in (len(each) for each in heads):
        if spread is None and rows < vocab:
            raise ValueError(f"a head of {rows} rows has no vocabulary of {vocab} tokens")
        if spread is not None:
            owned = len(vocab_rows(spread.rows, spread.group.size(), spread.group.rank()))
            if rows != owned or spread.rows < vocab:
                raise ValueError(
                    f"process {spread.group.rank()} of {spread.group.size()} owns {owned} rows of heads of "
                    f"{spread.rows} for {vocab} tokens, and was given {rows}"
                )
    check_labels(labels, vocab)
