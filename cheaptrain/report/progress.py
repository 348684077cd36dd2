"""How far a run has come, from metrics.jsonl, while it may still be written.

Only the few lines that are needed are parsed: the file of a long run has hundreds of megabytes, and who looks every
minute should not pay for them. The last line may be half there; a line that is none is counted, never fatal.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cheaptrain.checkpoint.paths import RunDirectory

_LAST_STEPS = 20  # that the speed is taken from


@dataclass(frozen=True)
class Progress:
    """The newest of each that a run has logged; None where there is none. Seconds are the mean of its last steps."""

    step: int | None = None
    tokens: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    seconds_a_step: float | None = None


def read_progress(run: RunDirectory, report: Callable[[str], None]) -> Progress:
    """What the metrics of `run` say. What cannot be read goes to `report`."""
    try:
        lines = run.metrics.read_bytes().split(b"\n")[:-1] if run.metrics.exists() else []
    except OSError as error:
        report(f"{run.metrics} cannot be read: {error.strerror}")
        return Progress()
    steps = _newest(lines, "train/loss", _LAST_STEPS)
    held_out = _newest(lines, "val/loss", 1)
    if not steps and not held_out:
        if any(line.strip() for line in lines):
            report(f"{run.metrics}: no line of it can be read")
        return Progress()
    last = steps[0] if steps else {}
    seconds = [record["train/step_seconds"] for record in steps if record.get("train/step_seconds")]
    newest = max([record for record in (last, *held_out) if record], key=lambda record: record["step"])
    return Progress(
        step=newest["step"],
        tokens=newest.get("train/tokens"),
        loss=last.get("train/loss"),
        validation_loss=held_out[0]["val/loss"] if held_out else None,
        seconds_a_step=sum(seconds) / len(seconds) if seconds else None,
    )


def _newest(lines: list[bytes], key: str, most: int) -> list[dict[str, Any]]:
    """The last records that have `key`, newest first."""
    found, mark = list[dict[str, Any]](), f'"{key}"'.encode()
    for line in reversed(lines):
        if mark not in line:
            continue
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and key in record and isinstance(record.get("step"), int):
            found.append(record)
            if len(found) == most:
                break
    return found
