"""What the device is and which attention paths run on it, found out in a child process.

    python -m cheaptrain.doctor.device '{"paths": [...], "shape": {...}, "dtype": "bf16"}'

A GPU kernel that fails badly takes its whole process with it, and the start of CUDA itself can hang. The parent reads
the report up to there, names the path, and starts another child for the rest.
"""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cheaptrain.doctor.children import STARTED, Ended, end_after, end_with_parent, report, run_children

COMMAND = (sys.executable, "-m", "cheaptrain.doctor.device")

_START_SECONDS = 90.0
_SECONDS = 45.0


@dataclass(frozen=True)
class Gpu:
    """One GPU as torch sees it; memory in bytes."""

    name: str
    uuid: str
    memory: int
    free: int
    capability: tuple[int, int]
    bf16: bool


@dataclass(frozen=True)
class Device:
    """What torch says of the device. `why_no_gpu`: its words. `peers[i][j]`: GPU i reads GPU j's memory directly.

    `paths`: what became of each attention path, by name: `difference`, `allowed`, `error`.
    """

    build_cuda: str | None
    kernels_for: tuple[str, ...]
    gpus: tuple[Gpu, ...]
    why_no_gpu: str
    peers: tuple[tuple[bool, ...], ...]
    paths: Mapping[str, Mapping[str, Any]]
    trouble: str = ""


def look_at_device(
    shape: Mapping[str, int],
    precision: str,
    environment: Mapping[str, str] | None = None,
    *,
    command: Sequence[str] = COMMAND,
    seconds: float = _SECONDS,
) -> Device:
    """Find out about the device, in at most a few children.

    `precision` is the recipe's: auto, bf16 or fp32. Whatever fails is in the answer, nothing is raised.
    """
    environment = dict(os.environ if environment is None else environment)
    paths: dict[str, Mapping[str, Any]] = {}
    facts: dict[str, Any] | None = None
    names: list[str] | None = None  # all there are
    while True:
        asked = json.dumps({"paths": names, "shape": dict(shape), "precision": precision, "seconds": seconds})
        ended = run_children([[*command, asked]], [environment], start_seconds=_START_SECONDS, seconds=seconds)[0]
        facts = facts or next((r["facts"] for r in ended.reports if "facts" in r), None)
        planned: list[str] = next((r["planned"] for r in ended.reports if "planned" in r), [])
        paths |= {r["path"]: r for r in ended.reports if "path" in r}
        left = [name for name in planned if name not in paths]
        if facts is None or not left:
            break
        paths[left[0]] = {"difference": None, "allowed": 0.0, "error": _how_it_died(ended)}
        names = left[1:]
        if ended.code is None:  # what hung once would hang again, and again
            paths |= {n: {"difference": None, "allowed": 0.0, "error": f"not tried: {left[0]} hung"} for n in names}
            break
        if not names:
            break
    if facts is None:
        return Device(None, (), (), "", (), paths, trouble=_how_it_died(ended))
    gpus = tuple(Gpu(**{**gpu, "capability": tuple(gpu["capability"])}) for gpu in facts["gpus"])
    peers = tuple(tuple(row) for row in facts["peers"])
    return Device(facts["build_cuda"], tuple(facts["kernels_for"]), gpus, facts["why_no_gpu"], peers, paths)


def _how_it_died(ended: Ended) -> str:
    said = "; ".join(ended.last_lines(2))
    if ended.code is None:
        return "it did not end in time and was killed"
    how = f"it was killed by signal {-ended.code}" if ended.code < 0 else f"it ended its process with {ended.code}"
    return f"{how}: {said}" if said else how


def main() -> None:
    """The child: report the facts, then each path."""
    end_with_parent()
    import torch

    from cheaptrain.doctor.attention_paths import Shape, paths_on, run_path

    asked = json.loads(sys.argv[1])
    report(phase=STARTED)
    end_after(asked["seconds"] + 5)  # the parent comes first; this is for when there is none any more
    torch.set_num_threads(min(4, torch.get_num_threads()))
    facts = _facts()
    device = "cuda" if facts["gpus"] else "cpu"
    half = asked["precision"] == "bf16" or (asked["precision"] == "auto" and device == "cuda")
    names = paths_on(device) if asked["paths"] is None else asked["paths"]
    report(facts=facts, planned=names)
    for name in names:
        ran = run_path(name, Shape(**asked["shape"]), device, torch.bfloat16 if half else torch.float32)
        report(path=name, **asdict(ran))


def _facts() -> dict[str, Any]:
    import torch

    gpus, why, peers = [], "", []
    try:
        torch.cuda.init()
    except Exception as error:  # which one depends on what is missing: the build, the driver, the GPU
        why = str(error).splitlines()[0]
    count = 0 if why else torch.cuda.device_count()
    for index in range(count):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        uuid = str(getattr(properties, "uuid", ""))
        capability = (properties.major, properties.minor)
        gpus.append(asdict(Gpu(properties.name, uuid, total, free, capability, bf16)))
    for one in range(count):
        peers.append([one == other or torch.cuda.can_device_access_peer(one, other) for other in range(count)])
    return {
        "build_cuda": torch.version.cuda or torch.version.hip,
        "kernels_for": torch.cuda.get_arch_list() if count else [],
        "gpus": gpus,
        "why_no_gpu": why or ("" if gpus else "no GPU is visible"),
        "peers": peers,
    }


if __name__ == "__main__":
    main()
