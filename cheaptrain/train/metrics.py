"""Where numbers go: metrics.jsonl, which is the truth, and the trackers, which are copies.

A tracker that fails in the middle must not end a run that costs money: it is switched off with a warning, and
metrics.jsonl goes on. A tracker that cannot start is an error, because nothing has been spent yet.
"""

import importlib.util
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.schema import Log


class Unwritten:
    """Where records go on every process but the main one: nowhere."""

    def append(self, record: Mapping[str, Any]) -> None: ...

    def sync(self) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """Writes one record to metrics.jsonl and to every tracker."""

    def __init__(self, file: JsonLines | Unwritten, accelerator: Accelerator) -> None:
        self.file = file
        self.accelerator = accelerator
        self._switched_off: set[str] = set()

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """`values` under their final names (`train/loss`, `val/bpb`, ...), at `step`."""
        self.file.append({"step": step, **values})
        for tracker in self.accelerator.trackers:
            if tracker.name in self._switched_off:
                continue
            try:
                tracker.log(dict(values), step=step)
            except Exception as error:  # a tracker is a guest here
                warnings.warn(f"{tracker.name} switched off: {type(error).__name__}: {error}", stacklevel=2)
                self._switched_off.add(tracker.name)

    def close(self) -> None:
        """Finish the trackers and close the file. Raises CheaptrainError when lines of the file are lost."""
        for tracker in self.accelerator.trackers:
            try:
                tracker.finish()
            except Exception as error:
                warnings.warn(f"{tracker.name} did not finish: {type(error).__name__}: {error}", stacklevel=2)
        self.accelerator.trackers = []
        self.file.close()


def refuse_missing_trackers(log: Log) -> None:
    """Raise PreflightError for trackers of the recipe that are not installed."""
    missing = [tracker for tracker in log.trackers if importlib.util.find_spec(tracker) is None]
    if missing:
        raise PreflightError(
            f"log.trackers: {', '.join(missing)} not installed; run: pip install 'cheaptrain[{','.join(missing)}]'"
        )


def start_trackers(
    accelerator: Accelerator,
    log: Log,
    *,
    directory: Path,
    name: str,
    run_id: str,
    first_step: int,
    config: Mapping[str, Any],
) -> None:
    """Start the recipe's trackers on `accelerator`. The same `run_id` continues the same curve after a resume.

    `first_step` is the first that will be logged: a fresh run logs step 0 too, of an earlier attempt perhaps again.

    Raises PreflightError when a tracker does not start.
    """
    if not log.trackers:
        return
    try:
        accelerator.init_trackers(
            log.project,
            config=_flat(config),
            init_kwargs={
                "wandb": {"id": run_id, "name": name, "dir": str(directory), "resume": "allow"},
                "trackio": {"name": f"{name}-{run_id}", "resume": "allow"},
                "tensorboard": {"purge_step": first_step},
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
