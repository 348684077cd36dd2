"""A copy of what this process holds, taken between two steps: what a checkpoint is written from.

Training changes weights and moments while they are being written, so they are copied first: this is what the loop waits
for. The copies lie in the same memory from save to save. Fresh memory each time would be given back in pieces, and the
process would grow; on a GPU it is pinned, which takes longer to get than to fill.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from cheaptrain.checkpoint.blocks import Block, local_block


class Buffers:
    """CPU memory for the blocks of this process, kept from one snapshot to the next."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Block]:
        """Blocks that hold what `tensors` hold now. They are valid until the next copy."""
        blocks, on_gpu = {}, False
        for name, tensor in tensors.items():
            place, live = local_block(tensor)
            buffer = self._buffer(name, live)
            buffer.copy_(live, non_blocking=True)
            on_gpu = on_gpu or live.is_cuda
            blocks[name] = Block(place, buffer)
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        self._kept = {name: block.data for name, block in blocks.items()}
        return blocks

    def _buffer(self, name: str, live: Tensor) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept.shape != live.shape or kept.dtype != live.dtype:
            kept = torch.empty(live.shape, dtype=live.dtype, pin_memory=live.is_cuda)
        return kept


def live_blocks(tensors: Mapping[str, Tensor]) -> dict[str, Block]:
    """Blocks of what lies on this process, without a copy where it is on the CPU and row-major: for a save that
    training waits for."""
    found = {name: local_block(tensor) for name, tensor in tensors.items()}
    return {name: Block(place, live.cpu().contiguous()) for name, (place, live) in found.items()}
