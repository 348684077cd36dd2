"""Fused operations, each beside its plain PyTorch reference."""

from cheaptrain_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses
from cheaptrain_kernels.vocab_parallel import (
    vocab_parallel_linear_cross_entropy,
    vocab_parallel_token_losses,
    vocab_rows,
)

__all__ = [
    "linear_cross_entropy",
    "linear_cross_entropy_reference",
    "token_losses",
    "vocab_parallel_linear_cross_entropy",
    "vocab_parallel_token_losses",
    "vocab_rows",
]
