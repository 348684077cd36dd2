"""`cheaptrain doctor`: what of this machine is right for a long run, what is doubtful, and what would end it.

Everything is tried rather than looked up: kernels run, disks are written to, processes talk. What may hang or crash
does so in child processes with a time-out. The children import this file too, so it imports nothing heavy before
`examine` is called.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from cheaptrain.doctor.findings import Finding
    from cheaptrain.recipe.load import LoadedRecipe


def examine(recipes: Sequence[LoadedRecipe], console: Console, *, processes: int | None = None) -> None:
    """Print what this machine has to say about training `recipes`, which may be none.

    `processes`: to start for trying out communication; default: those of the recipes' [parallel] as far as there are
    GPUs for them, else one a GPU, else one. Raises RecipeError when a recipe does not add up, and PreflightError, after
    printing, when something would stop the run, or when a launcher started this.
    """
    import torch

    from cheaptrain.doctor import gpus, machine
    from cheaptrain.doctor.communication import communication_findings
    from cheaptrain.doctor.device import look_at_device
    from cheaptrain.doctor.storage import storage_findings
    from cheaptrain.doctor.subject import find_subject
    from cheaptrain.doctor.view import print_section
    from cheaptrain.errors import PreflightError

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise PreflightError(
            "the doctor starts its processes itself: run `cheaptrain doctor` once on each machine, and for all of them "
            "together  accelerate launch … -m cheaptrain.doctor.probe"
        )
    found: list[Finding] = []

    def section(title: str, *findings: Iterable[Finding]) -> None:
        print_section(title, _kept(chain(*findings), found), console)

    clock = machine.read_clock()
    subject = find_subject(recipes, processes, gpus=torch.cuda.device_count())
    environment = {**os.environ, **subject.env}
    section(
        f"software of {platform.node()}",
        subject.findings(),
        machine.software(),
        machine.environment(os.environ, subject.env),
    )
    device = look_at_device(subject.shape, subject.precision, environment)
    on_gpu = bool(device.gpus)
    section(
        "device",
        gpus.gpu_findings(device, gpus.ask_nvidia_smi(), seen=gpus.gpu_seen(), torch_version=str(torch.__version__)),
        machine.compiler() if on_gpu and subject.compiled else (),
    )
    section("attention, forward and backward", gpus.attention_findings(device, subject.precision))
    section("machine", machine.limit_findings(machine.find_limits(), subject.here, gpus=len(device.gpus)))
    section("disks", storage_findings(subject.places))
    section("communication", communication_findings(subject.here, environment, on_gpu=on_gpu))
    newest_file = Path(torch.__file__).stat().st_mtime
    section("clock", machine.clock_findings(clock, machine.read_clock(), newest_file))
    _conclude(found, console)


def _conclude(found: Sequence[Finding], console: Console) -> None:
    """The last line, or PreflightError with everything that would stop a run."""
    from cheaptrain.errors import PreflightError
    from cheaptrain.say import say

    doubts = sum(finding.mark == "doubt" for finding in found)
    doubtful = {0: "", 1: "; 1 doubt, above"}.get(doubts, f"; {doubts} doubts, above")
    failures = [f"{finding.subject}: {finding.says}" for finding in found if finding.mark == "FAIL"]
    if failures:
        raise PreflightError("\n".join([f"a run would not go well here{doubtful}", *failures]))
    say(console, f"nothing found that would stop a run{doubtful}", "bold")


def _kept(findings: Iterable[Finding], found: list[Finding]) -> Iterator[Finding]:
    for finding in findings:
        found.append(finding)
        yield finding
