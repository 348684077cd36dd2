"""Waiting for processes that have work of their own, however long it takes.

The processes of a run are never far apart in training, so their groups give up after minutes. Tasks of an evaluation
take one of them an hour and another none. Whoever is done first waits here, in a group without a time-out that is made
for the occasion; a process that dies still ends the wait, because its connection breaks.
"""

import time
from datetime import timedelta

import torch
import torch.distributed as dist

from cheaptrain.errors import CheaptrainError
from cheaptrain.parallel.processes import Processes

_PATIENCE = timedelta(days=30)
_LOOK_SECONDS = 0.05


class Meeting:
    """Make one before the work, on all processes together; `wait` after it."""

    def __init__(self, processes: Processes) -> None:
        self._group = dist.new_group(backend="gloo", timeout=_PATIENCE) if processes.size > 1 else None

    def wait(self) -> None:
        """Return when every process has come here. Raises CheaptrainError when one is gone."""
        if self._group is None:
            return
        try:
            here = dist.all_reduce(torch.zeros(1), group=self._group, async_op=True)
            # Asked now and then, so that signals are heard meanwhile.
            while not here.is_completed():  # type: ignore[union-attr]
                time.sleep(_LOOK_SECONDS)
            here.wait()  # type: ignore[union-attr]
        except RuntimeError as error:  # what gloo raises for a connection that broke
            raise CheaptrainError(f"a process went away while the others waited for it: {error}") from error
        finally:
            dist.destroy_process_group(self._group)
            self._group = None
