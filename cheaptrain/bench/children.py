"""The processes that measure: started, told to go, waited for, and ended whatever happens.

Each is the first of a group of its own, so that what it starts (compilers) can be ended with it, and a Ctrl-C in the
terminal reaches this process alone, which then ends them all.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from typing import Any

from cheaptrain.bench.child import MARK
from cheaptrain.launching import set_defaults

_GRACE_SECONDS = 15.0  # for a process that said its result to end by itself
_KEPT_LINES = 30


class Child:
    """A process with one job. `close` it in any case."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.process = subprocess.Popen(
            [sys.executable, "-m", "cheaptrain.bench.child", json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=_environment(),
        )
        self._said: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._other: deque[str] = deque(maxlen=_KEPT_LINES)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait(self, kind: str, seconds: float) -> dict[str, Any]:
        """The next thing of `kind` that it says, or {"error": ...}: it ended, or had to be, for saying nothing."""
        try:
            said = self._said.get(timeout=max(0.0, seconds))
        except queue.Empty:
            self._kill()
            return {"error": f"nothing after {seconds:.0f} s"}
        if said is None:
            code, last = self.process.wait(), [line for line in self._other if line.strip()]
            return {"error": f"ended with {code}: {last[-1].strip()[:300] if last else 'no word'}"}
        return said if said["kind"] == kind else {"error": f"said {said['kind']} instead of {kind}"}

    def go(self) -> None:
        """Let it begin."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):  # it ended already: `wait` says how
            self.process.stdin.write("go\n")
            self.process.stdin.flush()

    def close(self, *, at_once: bool = False) -> None:
        """End it and all it started, at the latest now."""
        if not at_once:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_SECONDS)
        self._kill()
        self.process.wait()
        self._reader.join(timeout=5)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):
                stream.close()

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def _read(self) -> None:
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stdout:
                if line.startswith(MARK):
                    self._said.put(json.loads(line[len(MARK) :]))
                else:
                    self._other.append(line)
        self._said.put(None)


def _environment() -> dict[str, str]:
    """The same for all variants: what a run has."""
    environment = dict(os.environ)
    set_defaults(environment)
    environment.setdefault("CUDA_VISIBLE_DEVICES", "0")  # one GPU for all: some take every one they see
    environment.setdefault("TOKENIZERS_PARALLELISM", "false")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    # The packages as they were found here, for an interpreter that starts in another folder.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return environment
