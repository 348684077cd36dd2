"""Fused operations, each beside its plain PyTorch reference."""

from cheaptrain_kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference, token_losses

__all__ = ["linear_cross_entropy", "linear_cross_entropy_reference", "token_losses"]
