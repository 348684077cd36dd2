"""What a container or a job may use of the machine: memory and cores, as the kernel will enforce them.

The trap: in a container the machine's own figures are shown (`free`, `nproc --all`), and the process that believes them
is killed without a word. Both kinds of control groups are read, and every level above our own, for the smallest limit
holds.
"""

from collections.abc import Iterator
from pathlib import Path

_UNLIMITED = 1 << 60  # version 1 writes a number near the largest one instead of "max"


def memory_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes all our processes may use together; None without a limit."""
    texts = [*_values(proc, root, "", "memory.max"), *_values(proc, root, "memory", "memory.limit_in_bytes")]
    limits = [int(text) for text in texts if text.isdecimal() and int(text) < _UNLIMITED]
    return min(limits, default=None)


def core_limit(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time all our processes may use together; None without a limit."""
    limits = []
    for text in _values(proc, root, "", "cpu.max"):
        quota, _, period = text.partition(" ")
        if quota.isdecimal() and period.isdecimal():
            limits.append(int(quota) / int(period))
    periods = list(_values(proc, root, "cpu", "cpu.cfs_period_us"))
    for quota, period in zip(_values(proc, root, "cpu", "cpu.cfs_quota_us"), periods, strict=False):
        if quota.isdecimal() and period.isdecimal():  # -1: no limit
            limits.append(int(quota) / int(period))
    return min(limits, default=None)


def _values(proc: Path, root: Path, controller: str, name: str) -> Iterator[str]:
    """Contents of the file `name` of our group and of all above it. `controller`: of version 1; empty: version 2."""
    try:
        lines = proc.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller not in controllers.split(","):
            continue
        group = Path(path.lstrip("/"))
        # In a container the path may be the host's, and the container's own group is the root of what is seen.
        for folder in dict.fromkeys((group, *group.parents)):
            try:
                yield (root / controller / folder / name).read_text().strip()
            except OSError:
                continue
