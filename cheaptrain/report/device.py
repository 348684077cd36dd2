"""What a run is planned for: the GPU the recipe names, else this machine's, else its CPUs."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from cheaptrain.errors import RecipeError
from cheaptrain.hardware import GPUS, Gpu, find_gpu
from cheaptrain.recipe.schema import Plan

USABLE = 0.92  # the rest: the driver's context, NCCL, libraries' workspaces, fragments; on a CPU the program itself
_USUAL = "H100"
_CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")


@dataclass(frozen=True)
class Device:
    """`memory_bytes`: of one GPU, or of the whole machine. `gpu`: peak and memory, if its kind is known.
    `assumed`: nobody said that it is this one."""

    name: str
    is_gpu: bool
    gpu: Gpu | None
    memory_bytes: int
    here: bool
    assumed: bool = False

    def usable_bytes(self, processes: int) -> int:
        """What one of `processes` processes can have: most of its GPU, or its part of the machine's memory."""
        return int(USABLE * self.memory_bytes) if self.is_gpu else int(USABLE * self.memory_bytes) // processes


def this_device() -> Device:
    """The GPU training would take on this machine, or the machine itself."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Device(properties.name, True, find_gpu(properties.name), properties.total_memory, True)
    return Device(f"this machine, {os.cpu_count()} CPUs", False, None, _ram(), True)


def device_to_plan_for(plan: Plan, *, gpus: bool = False) -> Device:
    """The GPU that `plan.gpu` names, or this machine's device; when it has to be `gpus` and this machine has none, one
    that many have. Raises RecipeError for a kind that is not known."""
    here = this_device()
    if plan.gpu is None and (here.is_gpu or not gpus):
        return here
    gpu = find_gpu(plan.gpu or _USUAL)
    if gpu is None:
        raise RecipeError(
            f"plan.gpu: {plan.gpu!r} is not known; there are {', '.join(gpu.name for gpu in GPUS)}. "
            "Or leave it out and give plan.tokens_per_second"
        )
    return Device(gpu.name, True, gpu, gpu.memory_bytes, gpu == here.gpu, assumed=plan.gpu is None)


def _ram() -> int:
    """Memory of the machine, or of the container we are in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(_CONTAINER_LIMIT.read_text()))
    except (OSError, ValueError):
        return physical
