"""The products around a chunk of logits: columns that are no token take no part, and nothing is copied for nothing."""

import pytest
import torch
from cheaptrain_kernels.products import add_chunk, compute_head


@pytest.mark.parametrize(("count", "columns"), [(32, 32), (48, 48), (37, 64), (1, 64), (0, 0)])
def test_a_head_gets_rows_of_zeros_for_whole_cache_lines(count: int, columns: int) -> None:
    weight = torch.randn(50, 8)
    head = compute_head(weight, count, torch.bfloat16, "triton")
    assert head.shape == (columns, 8) and head.dtype == torch.bfloat16
    assert torch.equal(head[:count], weight[:count].bfloat16()) and not head[count:].any()
    assert compute_head(weight, count, torch.bfloat16, "torch").shape == (count, 8)


def test_a_head_with_rows_to_spare_is_not_copied() -> None:
    weight = torch.randn(80, 8)
    assert compute_head(weight, 37, torch.float32, "triton", spare=True).data_ptr() == weight.data_ptr()
    assert compute_head(weight, 37, torch.float32, "triton").data_ptr() != weight.data_ptr()
    assert compute_head(weight[:50], 37, torch.float32, "triton", spare=True).data_ptr() != weight.data_ptr()
    assert compute_head(weight, 48, torch.float32, "triton").data_ptr() == weight.data_ptr()


def test_gradients_of_padded_columns_reach_no_row_of_the_head() -> None:
    weight, chunk = torch.randn(37, 8), torch.randn(5, 8)
    head = compute_head(weight, 37, torch.float32, "triton")
    gradient = torch.randn(5, 64)
    grad_hidden, grad_weight = torch.full((5, 8), torch.nan), torch.ones(37, 8)
    add_chunk(gradient, chunk, head, grad_hidden, grad_weight)
    torch.testing.assert_close(grad_hidden, gradient[:, :37] @ weight)
    torch.testing.assert_close(grad_weight, 1 + gradient[:, :37].T @ chunk)
    rounded = torch.ones(37, 8)
    add_chunk(gradient.bfloat16(), chunk.bfloat16(), head.bfloat16(), None, rounded)
    torch.testing.assert_close(rounded, grad_weight, rtol=5e-2, atol=5e-2)
