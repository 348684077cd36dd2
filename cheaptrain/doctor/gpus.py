"""What is said of GPUs, their driver, and the attention paths on them.

The classics: a CPU build of torch on a GPU machine, which trains on, silently, a hundred times slower; a driver older
than the CUDA of the build; a GPU newer than the build, for which it has no kernels; somebody else's process in the
memory; GPUs that cannot read each other's memory, so that everything goes through the host.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cheaptrain.doctor.attention_paths import CAUSAL, PACKED, PACKED_FP32, TRAINED_WITH
from cheaptrain.doctor.device import Device, Gpu
from cheaptrain.doctor.findings import Finding, doubt, fail, note, ok
from cheaptrain.units import size

_LITTLE_FREE = 0.9  # of the memory
_FAST = ("SDPA cuDNN", "SDPA flash", "SDPA efficient")
_INSTALL = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


@dataclass(frozen=True)
class Smi:
    """What nvidia-smi says. `cuda`: the newest CUDA the driver knows; `users`: lines on processes, by GPU uuid."""

    driver: str
    cuda: tuple[int, int] | None
    users: Mapping[str, tuple[str, ...]]
    topology: tuple[str, ...] = ()

    @property
    def known(self) -> str:
        """The driver, in words."""
        return f"driver {self.driver}" + (f" for CUDA up to {self.cuda[0]}.{self.cuda[1]}" if self.cuda else "")


def ask_nvidia_smi() -> Smi | None:
    """What nvidia-smi says, or None where it is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    overview = _output(["nvidia-smi"])
    driver = _output(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    query = "--query-compute-apps=gpu_uuid,pid,used_gpu_memory,process_name"
    processes = _output(["nvidia-smi", query, "--format=csv,noheader"])
    if overview is None or driver is None:
        return None
    topology = _output(["nvidia-smi", "topo", "-m"]) or ""
    return read_nvidia_smi(overview, driver, processes or "", topology)


def read_nvidia_smi(overview: str, driver: str, processes: str, topology: str = "") -> Smi:
    """Its answers as one record."""
    cuda = re.search(r"CUDA (?:\w+ )?Version\s*:\s*(\d+)\.(\d+)", overview)
    users: dict[str, tuple[str, ...]] = {}
    for line in processes.splitlines():
        uuid, *rest = (part.strip() for part in line.split(",", 3))
        if len(rest) == 3:
            users[uuid] = (*users.get(uuid, ()), f"process {rest[0]}, {rest[1]}: {rest[2]}")
    matrix = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;]*m", "", topology).split("Legend")[0].splitlines()]
    return Smi(
        driver.split("\n")[0].strip(),
        (int(cuda[1]), int(cuda[2])) if cuda else None,
        users,
        tuple(line for line in matrix if line),
    )


def gpu_seen() -> bool:
    """Whether the machine shows an NVIDIA GPU, whatever torch thinks."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def gpu_findings(device: Device, smi: Smi | None, *, seen: bool, torch_version: str) -> Iterator[Finding]:
    """GPUs, driver and build. `seen`: the machine shows an NVIDIA GPU."""
    if device.trouble:
        yield fail(
            "device",
            f"the process that looks for GPUs came to nothing: {device.trouble}",
            "try python -c 'import torch; torch.zeros(1, device=\"cuda\")'; if it hangs or dies as well, the driver "
            "or the installation of torch is broken: look at nvidia-smi, at dmesg, or start the machine anew",
        )
    elif not device.gpus:
        yield _no_gpu(device, smi, seen, torch_version)
    else:
        yield from _gpus(device, smi)
        yield _driver(device, smi)
        if len(device.gpus) > 1:
            yield _peers(device, smi)


def _no_gpu(device: Device, smi: Smi | None, seen: bool, torch_version: str) -> Finding:
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles"):
        return note("GPU", f"hidden by CUDA_VISIBLE_DEVICES={hidden!r}: training runs on the CPU")
    if not (seen or smi):
        return note("GPU", "none here: training runs on the CPU")
    known = f" ({smi.known})" if smi else ""
    if device.build_cuda is None:
        build = f"cu{smi.cuda[0]}X" if smi and smi.cuda else "cu…"
        return fail(
            "GPU",
            f"the machine has one{known}, and torch {torch_version} is a build for the CPU",
            f"install a build for CUDA:\n{_INSTALL.format(build=build)}\n(https://pytorch.org/get-started gives the "
            "exact name)",
        )
    if smi and smi.cuda and smi.cuda < _version(device.build_cuda):
        return fail(
            "GPU",
            f"torch {torch_version} is built for CUDA {device.build_cuda}, the {smi.known}: {device.why_no_gpu}",
            "install a newer driver, or a build of torch for that CUDA (https://pytorch.org/get-started)",
        )
    return fail(
        "GPU",
        f"the machine has one{known}, and torch {torch_version} cannot use it: {device.why_no_gpu}",
        "look at nvidia-smi; in a container, start it with --gpus all; see CUDA_VISIBLE_DEVICES",
    )


def _gpus(device: Device, smi: Smi | None) -> Iterator[Finding]:
    for index, gpu in enumerate(device.gpus):
        users = next((lines for uuid, lines in (smi.users if smi else {}).items() if gpu.uuid and gpu.uuid in uuid), ())
        says = f"{gpu.name}, {size(gpu.memory)}, {size(gpu.free)} free"
        if gpu.free < _LITTLE_FREE * gpu.memory:
            yield doubt(
                f"GPU {index}",
                f"{says}: something else uses it",
                "end the processes below if they are yours, or take other GPUs with CUDA_VISIBLE_DEVICES"
                if users
                else "nvidia-smi on the host shows who it is; or take other GPUs with CUDA_VISIBLE_DEVICES",
                users,
            )
        elif users:
            yield doubt(f"GPU {index}", f"{says}, shared with", "wait for them to end, or take other GPUs", users)
        else:
            yield ok(f"GPU {index}", says)
        if problem := _kernels_missing(gpu, device.kernels_for):
            yield problem
    without = [str(index) for index, gpu in enumerate(device.gpus) if not gpu.bf16]
    if without:
        yield doubt(
            "bf16",
            f"GPU {', '.join(without)} computes bf16 in software only",
            'expect it to be slow; train.precision = "fp32" may be faster',
        )
    else:
        yield ok("bf16", "in hardware")
    if len({gpu.name for gpu in device.gpus}) > 1:
        yield doubt(
            "GPUs", "they are not of one kind, and the slowest sets the pace", "choose some with CUDA_VISIBLE_DEVICES"
        )


def _kernels_missing(gpu: Gpu, kernels_for: Sequence[str]) -> Finding | None:
    """A build runs on GPUs of the same major capability and a minor one not below; PTX also on later ones."""
    if not kernels_for:
        return None
    major, minor = gpu.capability
    for name in kernels_for:
        if found := re.fullmatch(r"(sm|compute)_(\d+)(\d)[af]?", name):
            kind, of = found[1], (int(found[2]), int(found[3]))
            if (of[0] == major and of[1] <= minor) or (kind == "compute" and of <= (major, minor)):
                return None
    return fail(
        "build",
        f"this torch has kernels for {', '.join(kernels_for)}, none for the {gpu.name} (sm_{major}{minor})",
        "install a newer build of torch (https://pytorch.org/get-started)",
    )


def _driver(device: Device, smi: Smi | None) -> Finding:
    build = f"torch is built for CUDA {device.build_cuda}"
    if smi is None:
        return note("driver", f"{build}; nvidia-smi is not here to say more")
    if smi.cuda and device.build_cuda and smi.cuda < _version(device.build_cuda):
        # Within one major version newer libraries run on an older driver, as long as they need nothing new of it.
        return doubt("driver", f"{build}, newer than the {smi.known}", "a newer driver is safer")
    return ok("driver", f"{smi.known}; {build}")


def _peers(device: Device, smi: Smi | None) -> Finding:
    table = smi.topology if smi else ()
    count = len(device.gpus)
    apart = [f"{i}-{j}" for i in range(count) for j in range(i + 1, count) if not device.peers[i][j]]
    if not apart:
        return ok("GPU to GPU", "every GPU reads the memory of every other one directly", table)
    pairs = ", ".join(apart[:8]) + (" …" if len(apart) > 8 else "")
    links = "" if any("NV" in line for line in table) else " There is no NVLink either."
    return note("GPU to GPU", f"no direct access between {pairs}: messages go through the host's memory.{links}", table)


def attention_findings(device: Device, precision: str) -> Iterator[Finding]:
    """The attention paths. Those of training must run and be right; of the others it is said whether they do."""
    if not device.paths:
        yield note("attention", "not tried, because the device could not be looked at")
    for name, ran in device.paths.items():
        difference, allowed, error = ran["difference"], ran["allowed"], ran["error"]
        wrong = difference is not None and not difference <= allowed
        if difference is not None and not wrong:
            yield ok(name, f"forward and backward, {difference:.0e} from plain arithmetic (allowed {allowed:.0e})")
            continue
        says = f"wrong by {difference:.1e} (allowed {allowed:.0e})" if wrong else f"does not run: {error}"
        if name in TRAINED_WITH:
            yield fail(name, says, _instead(name, bool(device.gpus), precision))
        elif wrong and name != PACKED_FP32:
            yield doubt(name, says, "another build of torch; training takes the first kernel that runs")
        else:
            yield note(name, says)
    if device.gpus and device.paths and not any(_ran(device, name) for name in _FAST):
        yield doubt(
            CAUSAL,
            "no fast kernel runs here, only plain arithmetic: slow, and it takes memory for seq x seq numbers",
            "another build of torch, or a newer GPU",
        )


def _ran(device: Device, name: str) -> bool:
    ran = device.paths.get(name)
    return ran is not None and ran["difference"] is not None and ran["difference"] <= ran["allowed"]


def _instead(name: str, on_gpu: bool, precision: str) -> str:
    if name == PACKED and on_gpu and precision != "fp32":
        return (
            "another build of torch; or data.document_mask = false, and documents of a row see each other; or "
            'train.precision = "fp32", which is slow'
        )
    return "another build of torch; no training is possible with this one"


def _version(text: str) -> tuple[int, int]:
    major, _, minor = text.partition(".")
    return int(major), int(minor.split(".")[0] or 0)


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
