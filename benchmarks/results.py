"""What every benchmark writes down: its figures, and the machine, the versions and the day they are of.

One JSON file a benchmark in benchmarks/results/, with the table that `readme.py` puts into benchmarks/README.md. So no
figure there is typed by hand.
"""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def report(
    name: str, *, title: str, header: Sequence[str], rows: Sequence[Sequence[str]], data: Mapping[str, Any]
) -> None:
    """Print a Markdown table and write `results/<name>.json`: the table, the figures in full, machine and day."""
    here = machine()
    print(f"{title}\n{machine_line(here)}\n\n{table(header, rows)}")
    RESULTS.mkdir(exist_ok=True)
    result = {
        "title": title,
        "machine": here,
        "header": list(header),
        "rows": [list(row) for row in rows],
        "data": data,
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, versions and date of this run."""
    names = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "numpy")
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in names},
        "date": datetime.now(UTC).date().isoformat(),
    }


def machine_line(machine: Mapping[str, Any]) -> str:
    """The same in one line."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    where = f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB"
    return f"{machine['date']}, {where}, Python {machine['python']}, {versions}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
