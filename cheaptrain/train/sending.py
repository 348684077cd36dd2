"""Copies from the host to a device, for which the host does not wait.

The trap: `non_blocking` says nothing about memory that is not page-locked. CUDA may then wait for all that was handed
over before, and the step with it.
"""

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU `tensor` on `device`. The memory it is sent from is not used again before the copy is made."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
