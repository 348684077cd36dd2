"""What was measured, kept: one JSON file a machine, to which every command adds its samples.

A sample is one variant of one work measured once, with the code and the versions it is of; so repeated commands are
further rounds, and a median is over samples of one code and one set of versions only. Failures are samples too: a row
that is missing because memory did not suffice is not a row nobody asked for.
"""

import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cheaptrain
from cheaptrain.durable import replace_json
from cheaptrain.errors import CheaptrainError

FILE = "throughput.json"
FROM_MACHINE = ("code", "versions", "commit")


@dataclass(frozen=True)
class Row:
    """The samples of one variant of one work, of one code. `failure`: why there are none."""

    work: str
    variant: str
    samples: list[dict[str, Any]]
    failure: str | None

    def median(self, key: str) -> float | None:
        """Of a figure over the samples that have it."""
        values = [sample[key] for sample in self.samples if sample.get(key) is not None]
        return statistics.median(values) if values else None

    def ends(self, key: str) -> tuple[float, float] | None:
        """The least and the largest of them."""
        values = [sample[key] for sample in self.samples if sample.get(key) is not None]
        return (min(values), max(values)) if values else None


def results_file(machine: dict[str, Any], output: Path | None) -> Path:
    """Where the samples of a machine are kept: in `output`, beside the repository's benchmarks, or in outputs/bench."""
    if output is None:
        beside = Path(cheaptrain.__file__).parents[1] / "benchmarks"
        output = beside / "results" if (beside / "throughput.py").is_file() else Path("outputs/bench")
    return output / slug(machine["device"]) / FILE


def slug(device: str) -> str:
    """The name of a device as a folder: "NVIDIA H200" → "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") or "machine"


def read_samples(file: Path) -> dict[str, Any]:
    """What the file holds, or nothing yet. Raises CheaptrainError when it is no such file."""
    if not file.exists():
        return {"machine": {}, "samples": []}
    try:
        held: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(held["samples"], list):
            raise TypeError("samples is no list")
    except (ValueError, KeyError, TypeError) as error:
        raise CheaptrainError(f"{file} does not hold samples of a benchmark ({error}): move it away") from error
    return held


def add_sample(file: Path, machine: dict[str, Any], sample: dict[str, Any]) -> None:
    """Append one sample, in one move: an interrupted command loses nothing of what it measured."""
    held = read_samples(file)
    held["machine"] = {name: value for name, value in machine.items() if name not in FROM_MACHINE}
    held["samples"].append(sample)
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_json(file, held)


def same_code(sample: dict[str, Any], machine: dict[str, Any]) -> bool:
    """Whether a sample is of the code and the versions that `machine` has now."""
    return all(sample.get(name) == machine[name] for name in ("code", "versions"))


def newest_rows(samples: Sequence[dict[str, Any]], work: str) -> list[Row]:
    """A row a variant, of the code that was measured last on this work."""
    of_work = [sample for sample in samples if sample["work"] == work]
    if not of_work:
        return []
    of_code = [sample for sample in of_work if same_code(sample, of_work[-1])]
    rows = []
    for variant in dict.fromkeys(sample["variant"] for sample in of_code):
        mine = [sample for sample in of_code if sample["variant"] == variant]
        good = [sample for sample in mine if "error" not in sample]
        rows.append(Row(work, variant, good, None if good else mine[-1]["error"]))
    return rows
