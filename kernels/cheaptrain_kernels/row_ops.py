"""The Triton kernels as operators of torch: importing this imports no Triton, the first call does.

As operators they are seen by torch.compile, which does not look into them, and by fake tensors, on which nothing runs:
what a GPU will need can be counted on a machine that has neither GPU nor Triton. Rows of logits `[rows, columns]` may
be further apart than `columns`; columns from `vocab` on are no tokens, and get a gradient of zero.
"""

import torch
from torch import Tensor

_CROSS_ENTROPY = (
    "(Tensor(a!) logits, Tensor labels, Tensor? weights, int vocab, float z_loss, float soft_cap, bool writes) "
    "-> Tensor"
)
_STATISTICS = "(Tensor logits, Tensor? labels, int vocab, float temperature, float soft_cap) -> (Tensor, Tensor)"
_GRADIENT = "(Tensor(a!) logits, Tensor targets, Tensor factors, int vocab, float temperature, float soft_cap) -> ()"

_DIVERGENCE = (
    "(Tensor(a!) logits, Tensor teacher_logits, Tensor targets, Tensor facts, int vocab, str divergence, float beta, "
    "float temperature, float alpha, bool measures, bool writes) -> Tensor"
)


@torch.library.custom_op("cheaptrain::cross_entropy_rows", mutates_args=("logits",), schema=_CROSS_ENTROPY)
def cross_entropy_rows(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None,
    vocab: int,
    z_loss: float,
    soft_cap: float,
    writes: bool,
) -> Tensor:
    """The loss of each row, its cross-entropy, and whether the label is the likeliest token: `[3, rows]` fp32.

    `labels` `[rows]` int64, -100: not supervised, three zeros; `weights` `[rows]` fp32 multiply the first two. The loss
    is the cross-entropy and `z_loss` times the squared logarithm of the sum of exponentials. `soft_cap` 0: none. With
    `writes` the logits are overwritten with the gradient of the loss, else only read.
    """
    from cheaptrain_kernels import triton_rows

    return triton_rows.cross_entropy_rows(logits, labels, weights, vocab, z_loss, soft_cap, writes)


@cross_entropy_rows.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(3, logits.shape[0], dtype=torch.float32)


@torch.library.custom_op("cheaptrain::row_statistics", mutates_args=(), schema=_STATISTICS)
def row_statistics(
    logits: Tensor, labels: Tensor | None, vocab: int, temperature: float, soft_cap: float
) -> tuple[Tensor, Tensor]:
    """Of each row z: the largest logit, the sum of exp(z - largest), that of exp((z - largest) / temperature): `[3,
    rows]` fp32; and the first column of the largest, `[rows]` int64.

    Without any finite logit they are -3e38, 0, 0 and 0. A row whose label is -100 is not read: 0, 1, 1 and 0.
    """
    from cheaptrain_kernels import triton_rows

    return triton_rows.row_statistics(logits, labels, vocab, temperature, soft_cap)


@row_statistics.register_fake
def _(logits: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    return logits.new_empty(3, rows, dtype=torch.float32), logits.new_empty(rows, dtype=torch.int64)


@torch.library.custom_op("cheaptrain::softmax_gradient", mutates_args=("logits",), schema=_GRADIENT)
def softmax_gradient(
    logits: Tensor, targets: Tensor, factors: Tensor, vocab: int, temperature: float, soft_cap: float
) -> None:
    """Write share x exp(z - shift) - taken x (column is the target) over the logits z of each row.

    `factors` `[3, rows]` fp32: shift, share, taken; or `[5, rows]`, with scaled_shift and scaled_share for a further
    scaled_share x exp(z / temperature - scaled_shift). `targets` `[rows]` int64: columns, of others nothing is taken.
    A row without any share is not read. With `soft_cap` z is the capped logit, and the gradient that of the raw one.
    """
    from cheaptrain_kernels import triton_rows

    triton_rows.softmax_gradient(logits, targets, factors, vocab, temperature, soft_cap)


@softmax_gradient.register_fake
def _(logits: Tensor, *_: object) -> None:
    return None


@torch.library.custom_op("cheaptrain::divergence_rows", mutates_args=("logits",), schema=_DIVERGENCE)
def divergence_rows(
    logits: Tensor,
    teacher_logits: Tensor,
    targets: Tensor,
    facts: Tensor,
    vocab: int,
    divergence: str,
    beta: float,
    temperature: float,
    alpha: float,
    measures: bool,
    writes: bool,
) -> Tensor:
    """The divergence of each row of a teacher's logits from the student's, and the gradient of a `DistillationLoss`.

    `facts` `[7, rows]` fp32: of the student the largest logit z, and the logarithms of the sums of exp((z - largest) /
    temperature) and of exp(z - largest); of the teacher the first two of them; what the row's loss is multiplied by
    (0: its logits are not read); and, where that is not forward KL, what the pull of its tokens is measured from:
    the divergence of reverse KL, or the sum of h for jsd. `targets` `[rows]` int64: columns; of others none is taken.

    With `measures` returns `[2, rows]` fp32: the divergence without the temperature squared, and for jsd the sum of h;
    0 where nothing is read. With `writes` the student's logits are overwritten with the gradient of the loss.
    """
    from cheaptrain_kernels import triton_divergence

    return triton_divergence.divergence_rows(
        logits, teacher_logits, targets, facts, vocab, divergence, beta, temperature, alpha, measures, writes
    )


@divergence_rows.register_fake
def _(logits: Tensor, *_: object) -> Tensor:
    return logits.new_empty(2, logits.shape[0], dtype=torch.float32)
