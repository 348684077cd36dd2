"""`cheaptrain compare`: what differs between runs, and how sure one can be of it; a page, a JSON file, a table.

The first side is the baseline, every other is held against it. Everything is only read, so runs may still be going on;
what could not be read stands among the notes of the comparison, never only in a log.
"""

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cheaptrain.compare.held_out import compare_held_out
from cheaptrain.compare.logged import Axis, Logged, along, read_logged
from cheaptrain.compare.recipes import Difference, differences
from cheaptrain.compare.sides import Member, Side, sides_of
from cheaptrain.compare.statistics import LEVEL, RESAMPLES
from cheaptrain.compare.tasks import Comparison, compare_tasks
from cheaptrain.durable import replace_json
from cheaptrain.errors import CheaptrainError

OUTPUTS = Path("outputs/compare")
PAGE, DATA = "compare.html", "compare.json"
_FORMAT, _VERSION = "cheaptrain comparison", 1


@dataclass(frozen=True)
class Pair:
    """One side against the baseline."""

    second: str
    tasks: tuple[Comparison, ...]
    held_out: tuple[Comparison, ...]


@dataclass(frozen=True)
class Report:
    """All that was found. `logged`: of each side what its runs logged."""

    sides: tuple[Side, ...]
    logged: tuple[tuple[Logged, ...], ...]
    axis: Axis
    differences: tuple[Difference, ...]
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]


def compare(what: Sequence[str], axis: Axis = "tokens") -> Report:
    """Hold the first of `what` against each of the others. Raises RecipeError for what cannot be compared."""
    notes: dict[str, None] = {}
    sides = sides_of(what, notes.setdefault)
    logged = read_logged(sides, axis, notes.setdefault)
    first, pairs = sides[0], list[Pair]()
    for number, side in enumerate(sides[1:], 1):
        held_out = compare_held_out(first, side, (logged[0], logged[number]))
        notes |= dict.fromkeys(_unlike(first, side))
        pairs.append(Pair(side.name, tuple(compare_tasks(first, side)), tuple(held_out)))
    if not any(comparison.n for pair in pairs for comparison in pair.tasks):
        notes["no task was scored on both sides: `cheaptrain eval` scores them"] = None
    if all(len(side.members) == 1 for side in sides):
        notes["one run a side: intervals are about these checkpoints; other seeds of the recipes may differ more"] = (
            None
        )
    return Report(tuple(sides), tuple(map(tuple, logged)), axis, tuple(differences(sides)), tuple(pairs), tuple(notes))


def write(report: Report, output: Path | None = None) -> Path:
    """Write page and JSON into `output`, by default a folder of outputs/compare named for the sides; returns the page.
    What an earlier comparison of the same sides wrote there is replaced. Raises CheaptrainError when it cannot be
    written."""
    # Here: matplotlib takes a second, which nobody should pay who only wants the table.
    from cheaptrain.compare.curves import pictures_of
    from cheaptrain.compare.page import render

    folder = output or OUTPUTS / _name(report.sides)
    content, pictures = to_json(report), pictures_of(report.sides, report.logged, report.axis)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_json(folder / DATA, content)
        (folder / PAGE).write_text(render(content, pictures), encoding="utf-8")
    except OSError as error:
        raise CheaptrainError(
            f"{error.filename or folder}: {error.strerror}; name another folder by --output"
        ) from error
    return folder / PAGE


def to_json(report: Report) -> dict[str, Any]:
    """For machines, and what the page shows. Differences are second minus first, in the unit of the score."""
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "axis": report.axis,
        "level": LEVEL,
        "resamples": RESAMPLES,
        "sides": [_side(side, logged) for side, logged in zip(report.sides, report.logged, strict=True)],
        "notes": list(report.notes),
        "differences": [asdict(difference) for difference in report.differences],
        "pairs": [
            {
                "first": report.sides[0].name,
                "second": pair.second,
                "tasks": [comparison.to_json() for comparison in pair.tasks],
                "held_out": [comparison.to_json() for comparison in pair.held_out],
            }
            for pair in report.pairs
        ],
    }


def _unlike(first: Side, second: Side) -> Iterator[str]:
    """Whether the scored checkpoints had read as much."""
    read = [
        {member.evaluation.checkpoint.tokens for member in side.members if member.evaluation} - {None}
        for side in (first, second)
    ]
    if all(read) and read[0] != read[1]:
        of_side = (", ".join(f"{tokens:,}" for tokens in sorted(filter(None, one))) for one in read)
        told = (f"{side.name} after {tokens}" for side, tokens in zip((first, second), of_side, strict=True))
        yield f"scored after different numbers of tokens: {'; '.join(told)}"


def _side(side: Side, logged: Sequence[Logged]) -> dict[str, Any]:
    of_run = {run.member.path: run for run in logged}
    return {"name": side.name, "runs": [_run(member, of_run.get(member.path)) for member in side.members]}


def _run(member: Member, run: Logged | None) -> dict[str, Any]:
    """Where a run stands and what was scored of it."""
    told: dict[str, Any] = {"name": member.name, "path": str(member.path), "seed": member.seed}
    if run is not None:
        steps = run.metrics["train/tokens"].steps
        seconds = along(run, steps[-1:], "time")
        tokens = run.metrics.last("train/tokens")
        told |= {
            "step": int(steps[-1]) if len(steps) else None,
            "tokens": None if tokens is None else int(tokens),
            "seconds": float(seconds[0]) if len(seconds) else None,
            "loss": run.metrics.last("train/loss"),
            "held_out_loss": run.metrics.last("val/loss"),
            "held_out_bits_a_byte": run.metrics.last("val/bpb"),
        }
    scored = member.evaluation.checkpoint if member.evaluation else None
    return told | {"scored": asdict(scored) if scored else None}


def _name(sides: Sequence[Side]) -> str:
    """Readable, and another for other runs of the same names."""
    names: Mapping[str, None] = dict.fromkeys(re.sub(r"[^\w.-]+", "-", side.name).strip("-.") for side in sides)
    paths = [[str(member.path.resolve()) for member in side.members] for side in sides]
    digest = hashlib.sha256(os.fsencode(repr(paths))).hexdigest()[:8]
    return f"{'-vs-'.join(names)[:100]}-{digest}"
