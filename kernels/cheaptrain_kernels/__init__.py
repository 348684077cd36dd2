"""Fused operations, each beside its plain PyTorch reference.

Those for layers (`rms_norm`, `swiglu`, `rope`) are modules of their own: training does not use them, see there.
"""

from cheaptrain_kernels.backend import Backend, backend_for, use_backend
from cheaptrain_kernels.columns import Spread
from cheaptrain_kernels.divergence import DistillationLoss, TeacherHead, TopK
from cheaptrain_kernels.linear_cross_entropy import (
    CrossEntropySums,
    linear_cross_entropy,
    linear_cross_entropy_reference,
    token_losses,
)
from cheaptrain_kernels.linear_distillation import (
    DistillationSums,
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
    "Backend",
    "CrossEntropySums",
    "DistillationLoss",
    "DistillationSums",
    "SpanSums",
    "SpanWord",
    "Spread",
    "TeacherHead",
    "TopK",
    "backend_for",
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
    "use_backend",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_losses",
    "vocab_rows",
]
