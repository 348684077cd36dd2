"""Fused operations, each beside its plain PyTorch reference."""

from cheaptrain_kernels.divergence import DistillationLoss, TopK
from cheaptrain_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses
from cheaptrain_kernels.linear_distillation import (
    DistillationSums,
    Spread,
    TeacherHead,
    distilled_at_once,
    linear_distillation,
    linear_distillation_reference,
    teacher_top_k,
)
from cheaptrain_kernels.linear_span_distillation import (
    SpanSums,
    SpanWord,
    linear_span_distillation,
    linear_span_distillation_reference,
    sum_of_spans,
)
from cheaptrain_kernels.vocab_parallel import (
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_losses,
    vocab_rows,
)

__all__ = [
    "DistillationLoss",
    "DistillationSums",
    "SpanSums",
    "SpanWord",
    "Spread",
    "TeacherHead",
    "TopK",
    "distilled_at_once",
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "linear_distillation",
    "linear_distillation_reference",
    "linear_span_distillation",
    "linear_span_distillation_reference",
    "sum_of_spans",
    "teacher_top_k",
    "token_losses",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_losses",
    "vocab_rows",
]
