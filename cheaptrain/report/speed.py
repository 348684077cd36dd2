"""About how long a step takes in a layout. Assumptions, and said to be such wherever a figure is shown.

    step = compute + messages of tp and cp + what FSDP's messages take longer than compute

Compute is the FLOPs of the step, recomputation included, at `plan.mfu` of the peak. Messages are the bytes that were
counted when the layout was measured, over the data sheets' bandwidths at a share that is reached in practice. Those of
tensor and context parallelism are waited for; those of FSDP travel beside the computing of another layer. Nothing is
said of stragglers, of small messages, or of nodes that share switches.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from cheaptrain.hardware import GPUS_PER_NODE, NETWORK_BYTES_PER_SECOND, Gpu
from cheaptrain.recipe.layout import AXES, Layout

REACHED = 0.7  # share of a link's bandwidth that large messages reach
_RECOMPUTED = 4 / 3  # forward twice instead of once, of forward + backward = 1 + 2
_WAITED_FOR = ("tp", "cp")


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: `waiting` for messages comes on top of `compute`."""

    compute: float
    waiting: float

    @property
    def total(self) -> float:
        return self.compute + self.waiting


def predicted_step_seconds(
    layout: Layout,
    gpu: Gpu,
    *,
    flops: float,
    mfu: float,
    recompute: bool,
    accumulation: int,
    sent: Mapping[str, float],
    sent_before: Mapping[str, float],
) -> StepTime:
    """The time of one step of `flops` (of all processes, nothing recomputed) on `layout.world_size` GPUs.

    `sent` and `sent_before` as in `measure.Measured`: bytes by axis, of the last micro-batch and of each before it.
    """
    compute = flops * (_RECOMPUTED if recompute else 1.0) / (layout.world_size * mfu * gpu.flops)
    seconds = {
        axis: (sent.get(axis, 0.0) + (accumulation - 1) * sent_before.get(axis, 0.0))
        / link_bytes_per_second(layout, axis, gpu)
        for axis in {**sent, **sent_before}
    }
    exposed = sum(seconds.get(axis, 0.0) for axis in _WAITED_FOR)
    beside = sum(took for axis, took in seconds.items() if axis not in _WAITED_FOR)
    return StepTime(compute, exposed + max(0.0, beside - compute))


def link_bytes_per_second(layout: Layout, axis: str, gpu: Gpu) -> float:
    """What a process can send along an axis ("dp_shard_cp" among them), as far as messages reach it in practice.

    Neighbours along the last axis are neighbouring GPUs. A ring that leaves the node goes over as many network cards
    as it has GPUs there.
    """
    sizes = dict(zip(AXES, layout.sizes, strict=True)) | {"dp_shard_cp": layout.dp_shard * layout.cp}
    inner = {
        "tp": 1,
        "cp": layout.tp,
        "dp_shard": layout.tp * layout.cp,
        "dp_shard_cp": layout.tp,
        "dp_replicate": layout.tp * layout.cp * layout.dp_shard,
    }[axis]
    in_node = max(1, min(sizes[axis], GPUS_PER_NODE // inner))
    link = gpu.link_bytes_per_second
    if sizes[axis] > in_node:
        link = min(link, in_node * NETWORK_BYTES_PER_SECOND)
    return REACHED * link
