"""GPUs by name: peak, memory and links, for the plan and for MFU; and the cores of this machine.

Dense bf16 peaks without sparsity, from the makers' data sheets. MFU is only shown for a GPU that is in this table: a
number against a guessed peak would be worse than none. Links are one direction of NVLink, or of PCIe where there is
none; the network is an assumption, which `cheaptrain plan` names as one.
"""

import os
import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU: dense bf16 peak in FLOP/s, memory in bytes, what it sends to others in its node in bytes/s."""

    name: str
    flops: float
    memory_bytes: int
    link_bytes_per_second: float


GPUS_PER_NODE = 8
NETWORK_BYTES_PER_SECOND = 50e9  # of one GPU out of its node: a 400 Gbit/s card each


# Longer names first: "H100 PCIe" must be tried before "H100".
GPUS = (
    Gpu("B200", 2250e12, 180_000_000_000, 900e9),
    Gpu("H200 NVL", 835e12, 141_000_000_000, 450e9),
    Gpu("H200", 989e12, 141_000_000_000, 450e9),
    Gpu("H100 PCIe", 756e12, 80_000_000_000, 64e9),
    Gpu("H100 NVL", 835e12, 94_000_000_000, 300e9),
    Gpu("H100", 989e12, 80_000_000_000, 450e9),
    Gpu("A100-SXM4-40GB", 312e12, 40_000_000_000, 300e9),
    Gpu("A100-PCIE-40GB", 312e12, 40_000_000_000, 32e9),
    Gpu("A100", 312e12, 80_000_000_000, 300e9),
    Gpu("L40S", 362e12, 48_000_000_000, 32e9),
    Gpu("L4", 121e12, 24_000_000_000, 32e9),
    Gpu("A10G", 70e12, 24_000_000_000, 32e9),
    Gpu("RTX 6000 Ada", 364e12, 48_000_000_000, 32e9),
    Gpu("RTX A6000", 155e12, 48_000_000_000, 32e9),
    Gpu("RTX 5090", 209.5e12, 32_000_000_000, 64e9),
    Gpu("RTX 4090", 165.2e12, 24_000_000_000, 32e9),
    Gpu("RTX 3090", 71e12, 24_000_000_000, 32e9),
)


_OTHER_CHIPS = ("laptop", "max-q")  # they carry a desktop card's name, and are slower


def find_gpu(name: str) -> Gpu | None:
    """The table's entry whose name stands in `name` ("NVIDIA H200", "h200"), or None.

    As whole words: an "L40" is no L4, an "RTX A1000" no A100, a "GH200" no H200.
    """
    wanted = name.lower()
    if any(word in wanted for word in _OTHER_CHIPS):
        return None
    return next((gpu for gpu in GPUS if re.search(_pattern(gpu.name), wanted)), None)


def _pattern(name: str) -> str:
    """The words of `name`, with anything but letters and digits, or nothing, between them."""
    words = re.findall("[a-z0-9]+", name.lower())
    return rf"(?<![a-z0-9]){'[^a-z0-9]*'.join(words)}(?![a-z0-9])"


def visible_cores() -> int:
    """Cores that this process may run on, which may be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
