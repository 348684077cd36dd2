"""How far a student's next-token distribution is from its teacher's, and which way that pulls the student's logits.

p is the teacher's distribution and q the student's, both of logits over the temperature T:

    forward_kl    KL(p || q): q must cover all that p finds possible
    reverse_kl    KL(q || p): q must not find possible what p does not
    jsd           b KL(p || m) + (1 - b) KL(q || m), with m = b p + (1 - b) q; b is `beta` (arXiv 2306.13649)

A divergence D enters the loss times T squared, which keeps its gradient as large as it is at T = 1. What is computed
beside D is h = q dD/dq, one number an outcome; over the logits z of q the gradient of D is (h - q sum(h)) / T. Its
outcomes may be all tokens, or the k likeliest ones of the teacher and "any other": `TopK`. The trap in the latter is
the mass of the others. As 1 - sum(q) it is rounding where the k tokens have nearly all of it, and its logarithm is
anything; it is kept, and summed for the student, as the logarithm it is.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LEAST = -80.0  # log-probability that "any other token" has at least: its exponential is still a normal fp32 number


@dataclass(frozen=True)
class DistillationLoss:
    """alpha x T squared x divergence + (1 - alpha) x cross-entropy, the latter at T = 1. `beta` is for jsd alone."""

    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: float = 0.5
    temperature: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        if self.divergence not in ("forward_kl", "reverse_kl", "jsd"):
            raise ValueError(f"no divergence is called {self.divergence!r}")
        if not (0 < self.beta < 1 and 0 <= self.alpha <= 1 and self.temperature > 0):
            raise ValueError(f"beta lies between 0 and 1, alpha in [0, 1], temperature above 0; got {self}")


class TeacherHead(NamedTuple):
    """A teacher at hand: logits are `hidden @ weight.T`. With `top_k` only so many are learnt, and the rest as one."""

    hidden: Tensor  # [tokens, hidden of the teacher], in its compute dtype
    weight: Tensor  # [rows of its head here, hidden of the teacher]
    top_k: int | None = None

    def rows(self, rows: slice) -> "TeacherHead":
        """The same of some positions."""
        return self._replace(hidden=self.hidden[rows])


class TopK(NamedTuple):
    """What a teacher says of each position, cut to its k likeliest tokens and one outcome for all others."""

    ids: Tensor  # [tokens, k] integers, likeliest first
    log_probabilities: Tensor  # [tokens, k] fp32, of logits over the temperature
    log_rest: Tensor  # [tokens] fp32, of all other tokens together

    def rows(self, rows: slice) -> "TopK":
        """The same of some positions."""
        return TopK(self.ids[rows], self.log_probabilities[rows], self.log_rest[rows])


class Word(NamedTuple):
    """What student and teacher say of a chunk of tokens, row by row; `[chunk]` each."""

    divergence: Tensor  # fp32, without the temperature squared
    cross_entropy: Tensor  # fp32, of the student at T = 1; anything where nothing is supervised
    likeliest: Tensor  # int64, the student's likeliest token, of equal ones the lowest id
    taught: Tensor  # int64, the teacher's
    gradient: Tensor | None  # [chunk, columns], of the sum of losses over the student's logits, in the compute dtype


def keep_top_k(log_p: Tensor, k: int) -> TopK:
    """The k likeliest tokens of log-probabilities `[tokens, vocab]` fp32, which are spoiled."""
    kept, ids = log_p.topk(k)
    return TopK(ids.int(), kept, log_of_rest(log_p, ids))


def log_of_rest(log_q: Tensor, ids: Tensor) -> Tensor:
    """The logarithm of the mass of all tokens but `ids` `[tokens, k]`: `[tokens]`. Those of `log_q` `[tokens, vocab]`
    become -inf."""
    return log_q.scatter_(1, ids, -torch.inf).logsumexp(-1).clamp_min_(LEAST)


def compare(log_p: Tensor, log_q: Tensor, loss: DistillationLoss) -> tuple[Tensor, Tensor]:
    """The divergence of each row `[tokens]`, and h `[tokens, outcomes]`, both without T; `log_p` is overwritten.

    Both arguments are `[tokens, outcomes]` fp32 log-probabilities. Of a vocabulary spread over processes each may pass
    its own columns: rows of the results are then its addends.
    """
    if loss.divergence == "forward_kl":
        p = log_p.exp()
        return log_p.sub_(log_q).mul_(p).sum(-1), p.neg_()
    if loss.divergence == "reverse_kl":
        q = log_q.exp()
        terms = log_p.neg_().add_(log_q).mul_(q)  # q log(q / p)
        return terms.sum(-1), terms.add_(q)
    log_b, log_c = math.log(loss.beta), math.log1p(-loss.beta)
    mixed = torch.logaddexp(log_p.add_(log_b), log_q + log_c)
    from_teacher = log_p.sub_(mixed)
    share = torch.add(from_teacher, mixed).exp_()  # b p
    towards = from_teacher.sub_(log_b).mul_(share).sum(-1)  # b p log(p / m)
    del share
    terms = mixed.neg_().add_(log_q).mul_(log_q.exp()).mul_(1 - loss.beta)  # (1 - b) q log(q / m)
    return towards + terms.sum(-1), terms
