"""Distillation through both language-model heads, a chunk of tokens at a time.

The logits of student and teacher for 32,768 tokens of a vocabulary of 128,256 are 16.8 GB each in fp32, and autograd
keeps several copies. Here they are made for one chunk, turned into the gradient of the student's logits in place,
multiplied into the gradients of hidden states and head, and dropped, as in `linear_cross_entropy`. At most four
`[chunk, vocab]` fp32 tensors are alive, and a chunk has as many tokens as keep one of them below 256 MiB
(`distilled_at_once`), so the peak is the same for a vocabulary of 32,000 and of 256,000. With a top-k teacher out of a
cache there are two of them, and none of the teacher's.

Vocabularies are padded, each model's to another size; the probabilities a model gives to rows that are no token are
noise. Only the first `vocab` rows of either head take part.

The heads' rows may be spread over the processes of a group (`Spread`): what a row of logits needs from all of them is
a handful of numbers, which travel; logits never do. As in `vocab_parallel.py` every process then gets its own PARTIAL
gradient of the hidden states, to be summed by the caller, and the whole gradient of its own rows of the head.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup
from torch.nn import functional

from cheaptrain_kernels.divergence import LEAST, DistillationLoss, TopK, compare, keep_top_k, log_of_rest
from cheaptrain_kernels.linear_cross_entropy import IGNORED, add_chunk, check_weights, scaled_gradients
from cheaptrain_kernels.vocab_parallel import vocab_rows

LOGITS_AT_ONCE = 2**26  # of one model: 256 MiB in fp32


class TeacherHead(NamedTuple):
    """A teacher at hand: logits are `hidden @ weight.T`. With `top_k` only so many are learnt, and the rest as one."""

    hidden: Tensor  # [tokens, hidden of the teacher], in its compute dtype
    weight: Tensor  # [rows of its head here, hidden of the teacher]
    top_k: int | None = None


class DistillationSums(NamedTuple):
    """Sums over supervised positions, times their weights where they have one; only `loss` has a gradient."""

    loss: Tensor  # fp32: alpha T^2 divergence + (1 - alpha) cross-entropy
    divergence: Tensor  # fp32, T^2 included
    cross_entropy: Tensor  # fp32, of the student at T = 1, in nats
    correct: Tensor  # int64: the student's likeliest token is the label
    agreed: Tensor  # int64: it is the teacher's


@dataclass(frozen=True)
class Spread:
    """Heads whose rows are spread over a group, as `vocab_rows` says; `rows`: of a whole head, the same of both."""

    group: ProcessGroup
    rows: int


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
        hidden, weight, teacher, labels, weights, loss, _Columns(vocab, weight.shape[0], spread), chunk_tokens
    )
    return DistillationSums(*results)


@torch.no_grad()
def teacher_top_k(
    hidden: Tensor, weight: Tensor, k: int, *, temperature: float, vocab: int, chunk_tokens: int = 8192
) -> TopK:
    """What `linear_distillation` makes of `TeacherHead(hidden, weight, k)`, to be kept: by the same operations."""
    columns = _Columns(vocab, weight.shape[0], None)
    head = weight[: columns.count].to(hidden.dtype)
    parts = [
        keep_top_k(_log_softmax(states, head, temperature, columns).log, k)
        for states in hidden.split(distilled_at_once(vocab, chunk_tokens))
    ]
    return TopK(*(torch.cat(part) for part in zip(*parts, strict=True)))


def distilled_at_once(columns: int, chunk_tokens: int) -> int:
    """Tokens of a chunk with so many `columns` of logits here: as many as `LOGITS_AT_ONCE` allows."""
    return min(chunk_tokens, max(1, LOGITS_AT_ONCE // max(1, columns)))


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
        columns: "_Columns",
        chunk_tokens: int,
    ) -> tuple[Tensor, ...]:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        chunk_tokens = distilled_at_once(columns.most, chunk_tokens)
        head = weight[: columns.count].to(hidden.dtype)
        said = teacher.weight[: columns.count].to(teacher.hidden.dtype) if isinstance(teacher, TeacherHead) else None
        divergence, cross_entropy = torch.zeros(2, dtype=torch.float32, device=hidden.device).unbind()
        correct, agreed = torch.zeros(2, dtype=torch.int64, device=hidden.device).unbind()
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        grad_weight = torch.zeros_like(weight) if want_weight else None

        for start in range(0, hidden.shape[0], chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            states, target = hidden[rows], labels[rows]
            supervised = target != IGNORED
            factor = supervised.float() if weights is None else supervised * weights[rows]  # [chunk]
            student = _log_softmax(states, head, loss.temperature, columns)
            taught = _teach(teacher, rows, said, student.log, loss, columns)
            cross_entropy += ((student.log_total - columns.logits_of(target, student, loss)) * factor).sum()
            divergence += (taught.divergence * factor).sum() * loss.temperature**2
            correct += ((student.likeliest == target) & supervised).sum()
            agreed += ((student.likeliest == taught.likeliest) & supervised).sum()
            if grad_hidden is None and grad_weight is None:
                continue
            plain = None
            if loss.alpha < 1:  # softmax at T = 1, less the label
                plain = student.log.add(student.log_scaled[:, None]).mul_(loss.temperature)
                plain = plain.sub_(student.log_total[:, None]).exp_()
                columns.less_one_at(target, plain)
            gradient = taught.pull(student.log).mul_((factor * (loss.alpha * loss.temperature)).unsqueeze(1))
            if plain is not None:
                gradient.add_(plain.mul_((factor * (1 - loss.alpha)).unsqueeze(1)))
            gradient = gradient.to(hidden.dtype)
            add_chunk(
                gradient,
                states,
                head,
                None if grad_hidden is None else grad_hidden[rows],
                None if grad_weight is None else grad_weight[: columns.count],
            )
            del student, taught, plain, gradient  # or they would still be there when the next chunk's logits are made
        ctx.gradients, ctx.chunk_tokens = (grad_hidden, grad_weight), chunk_tokens
        total = loss.alpha * divergence + (1 - loss.alpha) * cross_entropy
        ctx.mark_non_differentiable(divergence, cross_entropy, correct, agreed)
        return total, divergence, cross_entropy, correct, agreed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = scaled_gradients(ctx, grad_loss)
        return grad_hidden, grad_weight, None, None, None, None, None, None


class _LogSoftmax(NamedTuple):
    """Of logits z, less their row's largest: `log` = z / T - `log_scaled`, the columns here; `log_scaled` and
    `log_total` are the logarithms of the sums of exp(z / T) and exp(z); `likeliest`: the id of the largest."""

    log: Tensor  # [chunk, columns]
    log_scaled: Tensor  # [chunk]
    log_total: Tensor  # [chunk]
    likeliest: Tensor  # [chunk]


def _log_softmax(states: Tensor, head: Tensor, temperature: float, columns: "_Columns") -> _LogSoftmax:
    logits = functional.linear(states, head).float()  # [chunk, columns]
    likeliest = columns.less_largest(logits)
    total = logits.exp().sum(-1)
    if temperature == 1:
        log_total = log_scaled = columns.sum(total).log()
    else:
        scaled = logits.div_(temperature).exp().sum(-1)
        log_total, log_scaled = columns.sum(torch.stack([total, scaled])).log().unbind()
    return _LogSoftmax(logits.sub_(log_scaled[:, None]), log_scaled, log_total, likeliest)


class _Taught(NamedTuple):
    """What a teacher says of a chunk. `h` of each token; or of the `kept` ones and, last, of all others."""

    divergence: Tensor  # [chunk]
    likeliest: Tensor  # [chunk]
    h: Tensor  # [chunk, columns], or [chunk, k + 1]
    total: Tensor  # [chunk]; the sum of h over all outcomes
    kept: Tensor | None = None  # [chunk, k] ids
    log_q: Tensor | None = None  # [chunk, k + 1], the student's

    def pull(self, log_q: Tensor) -> Tensor:
        """The gradient of the divergence over the student's logits / T, `[chunk, columns]`, in the place of
        `log_q`."""
        if self.kept is None or self.log_q is None:
            return log_q.exp_().mul_(-self.total[:, None]).add_(self.h)
        # A token among the others moves their sum: by its share of it.
        q = self.log_q.exp()
        pulled = log_q.exp_().mul_((self.h[:, -1] / q[:, -1] - self.total)[:, None])
        return pulled.scatter_(1, self.kept, (self.h - q * self.total[:, None])[:, :-1])


def _teach(
    teacher: TeacherHead | TopK,
    rows: slice,
    head: Tensor | None,
    log_q: Tensor,
    loss: DistillationLoss,
    columns: "_Columns",
) -> _Taught:
    """The teacher's word on the positions `rows`, of which the student says `log_q` (left as it is)."""
    if isinstance(teacher, TeacherHead):
        assert head is not None
        said = _log_softmax(teacher.hidden[rows], head, loss.temperature, columns)
        if teacher.top_k is None:
            divergence, h = compare(said.log, log_q, loss)
            divergence, total = columns.sum(torch.stack([divergence, h.sum(-1)])).unbind()
            return _Taught(divergence, said.likeliest, h, total)
        top = keep_top_k(said.log, teacher.top_k)
        del said
    else:
        top = teacher.rows(rows)
    ids = top.ids.long()
    kept = log_q.gather(1, ids)
    rest = log_of_rest(log_q, ids)
    log_q.scatter_(1, ids, kept)
    outcomes = torch.cat([kept, rest[:, None]], -1)  # [chunk, k + 1]
    log_p = torch.cat([top.log_probabilities, top.log_rest[:, None].clamp_min(LEAST)], -1)
    divergence, h = compare(log_p, outcomes, loss)
    return _Taught(divergence, ids[:, 0], h, h.sum(-1), ids, outcomes)


class _Columns:
    """The tokens whose logits are made here: all, or this process's share of them."""

    def __init__(self, vocab: int, rows_here: int, spread: Spread | None) -> None:
        self.vocab = vocab
        self.group = spread.group if spread else None
        mine = range(rows_here)
        self.most = vocab
        if spread:
            mine = vocab_rows(spread.rows, spread.group.size(), spread.group.rank())
            self.most = len(vocab_rows(spread.rows, spread.group.size(), 0))
        self.first = mine.start
        self.count = max(0, min(len(mine), vocab - mine.start))

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values

    def less_largest(self, logits: Tensor) -> Tensor:
        """Take from each row of `logits` `[chunk, columns]` its largest number of all; returns the id of that, the
        lowest of several: `[chunk]`."""
        if logits.shape[1]:
            largest, here = logits.max(-1)
        else:
            largest = logits.new_full((len(logits),), -torch.inf)
            here = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
        if self.group is None:
            logits.sub_(largest.unsqueeze(1))
            return here
        own = largest.clone()
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        logits.sub_(largest.unsqueeze(1))
        ids = (here + self.first).where(own == largest, self.vocab)
        dist.all_reduce(ids, dist.ReduceOp.MIN, group=self.group)
        return ids

    def logits_of(self, target: Tensor, student: _LogSoftmax, loss: DistillationLoss) -> Tensor:
        """The student's logit of each target, less its row's largest: `[chunk]`. Of what is not supervised: of
        anything."""
        index, own = self._place(target)
        if not self.count:
            return self.sum(torch.zeros_like(student.log_total))
        logit = (student.log.gather(1, index).squeeze(1) + student.log_scaled) * loss.temperature
        return self.sum(logit.where(own.squeeze(1), 0.0)) if self.group is not None else logit

    def less_one_at(self, target: Tensor, probabilities: Tensor) -> None:
        """Take 1 from the target's column of `[chunk, columns]`."""
        if self.count:
            index, own = self._place(target)
            probabilities.scatter_add_(1, index, -own.to(probabilities.dtype))

    def _place(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """The column of each target here, and whether it is one; `[chunk, 1]` both."""
        index = (target - self.first).unsqueeze(1)
        own = (index >= 0) & (index < self.count)
        return index.where(own, 0), own


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
    known = (labels == IGNORED) | ((labels >= 0) & (labels < vocab))
    torch._assert_async(known.all(), f"a label lies outside the vocabulary of {vocab}")
