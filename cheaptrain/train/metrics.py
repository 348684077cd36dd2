"""Where numbers go: metrics.jsonl, which is the truth, and the trackers, which are copies.

A tracker that fails in the middle must not end a run that costs money: it is switched off with a warning, and
metrics.jsonl goes on. A tracker that cannot start is an error, because nothing has been spent yet.
"""

import importlib.util
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Log
from cheaptrain.train.jsonl import JsonLines


class Metrics:
    """Writes one record to metrics.jsonl and to every tracker."""

    def __init__(self, file: JsonLines, accelerator: Accelerator) -> None:
        self.file = file
        self.accelerator = accelerator
        self.tracking = bool(accelerator.trackers)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` under their final names (`train/loss`, `val/bpb`, ...), at `step`."""
        self.file.append({"step": step, **values})
        if not self.tracking:
            return
        try:
            self.accelerator.log(dict(values), step=step)
        except Exception as error:  # a tracker is a guest here
            warnings.warn(f"trackers switched off: {type(error).__name__}: {error}", stacklevel=2)
            self.tracking = False

    def close(self) -> None:
        """Close the file and finish the trackers."""
        self.file.close()
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                warnings.warn(f"{tracker.name} did not finish: {type(error).__name__}: {error}", stacklevel=2)
        self.accelerator.trackers = []


def start_trackers(
    accelerator: Accelerator, log: Log, *, directory: Path, name: str, run_id: str, step: int, config: Mapping[str, Any]
) -> None:
    """Start the recipe's trackers on `accelerator`. The same `run_id` continues the same curve after a resume.

    Raises PreflightError when a tracker is not installed or does not start.
    """
    missing = [tracker for tracker in log.trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        extras = ",".join(missing)
        raise PreflightError(
            f"log.trackers: {', '.join(missing)} not installed; run: pip install 'cheaptrain[{extras}]'"
        )
    if not log.trackers:
        return
    if "trackio" in log.trackers:
        os.environ.setdefault("TRACKIO_DIR", str(directory / "trackio"))
    try:
        accelerator.init_trackers(
            log.project,
            config=_flat(config),
            init_kwargs={
                "wandb": {"id": run_id, "name": name, "dir": str(directory), "resume": "allow"},
                "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
                "tensorboard": {"purge_step": step + 1},
            },
        )
    except Exception as error:
        raise PreflightError(
            f"log.trackers: {', '.join(log.trackers)} did not start ({type(error).__name__}: {error}); "
            "for wandb without a network set WANDB_MODE=offline, or leave it out with log.trackers=[]"
        ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
