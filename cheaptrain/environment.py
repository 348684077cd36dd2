"""Where a run was made: versions, machine, and the commit of the code, asked when it starts.

A number is only as good as what can be said of its making, and afterwards nobody knows which commit it was. The traps:
variables of the environment hold secrets, so none is kept; and a git that hangs on a network disk, is not there, or
distrusts the folder is no reason not to train: then it says "not known".
"""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil
import torch

import cheaptrain

_PACKAGES = (
    "accelerate", "datasets", "flash-attn", "liger-kernel", "lm-eval", "numpy", "peft", "safetensors", "tokenizers",
    "torch", "torchao", "transformers", "triton",
)  # fmt: skip
_GIT_SECONDS = 5.0
_CPU_NAMES = Path("/proc/cpuinfo")


def environment_of(device: torch.device) -> dict[str, Any]:
    """What this process runs on, for the record of a launch: plain JSON values, None for what is not known."""
    on_gpu = device.type == "cuda"
    return {
        "cheaptrain": cheaptrain.__version__,
        "python": platform.python_version(),
        "packages": versions_of(_PACKAGES),
        "cuda": torch.version.cuda if on_gpu else None,
        "device": torch.cuda.get_device_name(device) if on_gpu else _cpu(),
        "gpus": torch.cuda.device_count() if on_gpu else 0,
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "code": _own_state(Path(cheaptrain.__file__).resolve()),
        "folder": git_state(Path.cwd()),
    }


def git_state(folder: Path, *below: str) -> dict[str, Any] | None:
    """The commit that `folder` is checked out at, and whether files that git follows (those `below` only, if it is
    given) were changed since; None where nobody can tell. Files that git does not follow count for nothing: outputs
    usually lie among them."""
    commit = _git(folder, "rev-parse", "HEAD")
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", *below)
    if not commit or changed is None:
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _own_state(file: Path) -> dict[str, Any] | None:
    """Of the package, unless it only happens to lie in somebody's repository, as an installed one may."""
    followed = _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    return git_state(file.parent, ".") if followed else None


def _git(folder: Path, *arguments: str) -> str | None:
    # Without optional locks: asking must not write into somebody's repository.
    environment = os.environ | {"GIT_OPTIONAL_LOCKS": "0", "GIT_TERMINAL_PROMPT": "0"}
    try:
        asked = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return asked.stdout.strip() if asked.returncode == 0 else None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those that are installed."""
    return {name: version for name in packages if (version := _version(name)) is not None}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = _CPU_NAMES.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
