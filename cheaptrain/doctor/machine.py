"""Software, memory, cores, limits and the clock of this machine."""

import importlib.metadata
import os
import platform
import resource
import shutil
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from cheaptrain.doctor.cgroup import core_limit, memory_limit
from cheaptrain.doctor.findings import Finding, doubt, fail, note, ok
from cheaptrain.hardware import visible_cores
from cheaptrain.units import size

_NAMED = ("torch", "transformers", "accelerate")
_FEW_FILES = 1024
_FILES_A_PROCESS = 256
_SHM_WITH_GPUS = 1_000_000_000
_WALL_JUMP_SECONDS = 0.2
_TELLING = ("NCCL_", "TORCH_NCCL_", "GLOO_", "CUDA_", "PYTORCH_", "OMP_", "ACCELERATE_")


def software() -> Iterator[Finding]:
    """Versions of what matters, and whether everything cheaptrain asks for is there in a version it knows."""
    versions = ", ".join(f"{name} {_version_of(name) or 'missing'}" for name in _NAMED)
    yield ok("python", f"{platform.python_version()}, {versions}")
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("cheaptrain") or ()]
    except importlib.metadata.PackageNotFoundError:
        yield note("packages", "cheaptrain runs from a folder and is not installed, so versions cannot be checked")
        return
    wanted = [requirement for requirement in wanted if not requirement.marker or requirement.marker.evaluate()]
    yield from _packages({requirement.name: requirement for requirement in wanted})


def _packages(wanted: Mapping[str, Requirement]) -> Iterator[Finding]:
    there = {name: _version_of(name) for name in wanted}
    missing = [str(wanted[name]) for name, version in there.items() if version is None]
    other = [
        f"{name} {version} (wanted: {wanted[name].specifier})"
        for name, version in there.items()
        if version is not None and not wanted[name].specifier.contains(version, prereleases=True)
    ]
    if missing:
        quoted = " ".join(f"'{requirement}'" for requirement in missing)
        yield fail("packages", f"not installed: {', '.join(missing)}", f"pip install {quoted}")
    if other:
        yield doubt("packages", f"in versions not tested: {', '.join(other)}", "pip install the versions wanted")
    if not missing and not other:
        yield ok("packages", f"all {len(wanted)} that are needed, in versions that are known")


def environment(variables: Mapping[str, str], recipe: Mapping[str, str]) -> Iterator[Finding]:
    """What is set in the environment and steers GPUs and communication; a job elsewhere will not have it."""
    set_here = {name: value for name, value in sorted(variables.items()) if name.startswith(_TELLING)}
    for name, value in recipe.items():
        if variables.get(name, value) != value:
            yield doubt(
                name,
                f"{variables[name]!r} in the environment, {value!r} in [env] of the recipe, which is taken",
                f"unset {name}, or change the recipe",
            )
    if others := {name: value for name, value in set_here.items() if name not in recipe}:
        lines = tuple(f"{name}={value}" for name, value in others.items())
        yield note("environment", "set here and not by the recipe ([env] would take it along):", lines)


@dataclass(frozen=True)
class Limits:
    """What the processes of this machine can have. Memory in bytes; `shm`: size of /dev/shm, None where there is
    none."""

    memory: int
    memory_limit: int | None
    available: int
    cores: int
    usable_cores: float
    open_files: int
    shm: int | None
    locked_memory: int | None


def find_limits() -> Limits:
    """The limits of this process, which its children inherit."""
    memory = psutil.virtual_memory()
    affinity = visible_cores()
    shm, locked = Path("/dev/shm"), resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Limits(
        memory=memory.total,
        memory_limit=memory_limit(),
        available=memory.available,
        cores=os.cpu_count() or 1,
        usable_cores=min(affinity, core_limit() or affinity),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm=shutil.disk_usage(shm).total if shm.is_dir() else None,
        locked_memory=None if locked == resource.RLIM_INFINITY else locked,
    )


def limit_findings(limits: Limits, processes: int, *, gpus: int, infiniband: bool | None = None) -> Iterator[Finding]:
    """Memory, cores, open files, shared memory. `infiniband`: whether the machine has it; default: look."""
    yield _memory(limits)
    yield _cores(limits, processes)
    yield _open_files(limits.open_files, processes)
    if limits.shm is not None:
        yield _shared_memory(limits.shm, gpus)
    if infiniband is None:
        infiniband = Path("/sys/class/infiniband").is_dir() and any(Path("/sys/class/infiniband").iterdir())
    if infiniband and limits.locked_memory is not None:
        yield doubt(
            "locked memory",
            f"limited to {size(limits.locked_memory)}, and InfiniBand needs it without limit",
            "ulimit -l unlimited; in a container: --ulimit memlock=-1",
        )


def _memory(limits: Limits) -> Finding:
    says = f"{size(limits.memory)}, {size(limits.available)} available"
    if limits.memory_limit is None or limits.memory_limit >= limits.memory:
        return ok("memory", f"{says}, no limit of a container or job")
    return note("memory", f"{says}; limited to {size(limits.memory_limit)} by a container or job")


def _cores(limits: Limits, processes: int) -> Finding:
    says = f"{limits.usable_cores:g} of the machine's {limits.cores} usable"
    if limits.usable_cores < processes:
        return doubt(
            "cores",
            f"{says}, for {processes} processes",
            "ask for more cores (Slurm: --cpus-per-task, docker: --cpus); each process wants at least one",
        )
    return ok("cores", says)


def _open_files(allowed: int, processes: int) -> Finding:
    needed = max(_FEW_FILES, _FILES_A_PROCESS * processes)
    if 0 <= allowed < needed:  # negative: no limit
        return doubt(
            "open files",
            f"at most {allowed:,} a process; shards and the connections of {processes} may need {needed:,}",
            f"ulimit -n {max(65_536, needed)}; in a container: --ulimit nofile=65536",
        )
    return ok("open files", f"{allowed:,} a process" if allowed >= 0 else "no limit")


def _shared_memory(shm: int, gpus: int) -> Finding:
    if gpus > 1 and shm < _SHM_WITH_GPUS:
        return doubt(
            "/dev/shm",
            f"{size(shm)}, and {gpus} GPUs of one machine talk through it",
            "docker: --shm-size=8g or --ipc=host; Kubernetes: an emptyDir of medium Memory at /dev/shm",
        )
    return ok("/dev/shm", size(shm))


def compiler() -> Iterator[Finding]:
    """Whether what torch.compile calls for GPU code is there: a C compiler and Python's own headers."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        yield fail("compiler", "no C compiler, which torch.compile calls", 'install gcc, or train.compile = "off"')
    elif not header.exists():
        package = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        yield fail("compiler", f"no {header}, which Triton includes", f'install {package}, or train.compile = "off"')
    else:
        yield ok("compiler", "a C compiler and Python's headers, for torch.compile")


@dataclass(frozen=True)
class Clock:
    """Both clocks at one moment, in seconds."""

    wall: float
    monotonic: float


def read_clock() -> Clock:
    """Now."""
    return Clock(time.time(), time.monotonic())


def clock_findings(before: Clock, after: Clock, newest_file: float) -> Iterator[Finding]:
    """Whether the wall clock ran as the monotonic one did, and is not in the past. `newest_file`: the time stamp of
    something that is certainly older than now."""
    passed = after.monotonic - before.monotonic
    jump = (after.wall - before.wall) - passed
    if passed < 0:
        yield fail("clock", "the monotonic clock went back: time-outs cannot work", "start the machine anew")
    elif abs(jump) > _WALL_JUMP_SECONDS:
        yield doubt(
            "clock",
            f"the wall clock jumped by {jump:+.1f} s in {passed:.0f} s",
            "let one service (chrony, systemd-timesyncd) set it; in a virtual machine, look at the host's",
        )
    elif after.wall < newest_file:
        yield doubt(
            "clock",
            f"it says {time.strftime('%Y-%m-%d', time.localtime(after.wall))}, before torch was installed here",
            "set it (timedatectl set-ntp true): certificates and the order of files depend on it",
        )
    else:
        yield ok("clock", f"ran evenly for {passed:.0f} s")


def _version_of(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
