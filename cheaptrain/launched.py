"""What a process knows of the launcher that started it, and what it tells it.

`cheaptrain launch` gives its processes a folder (CHEAPTRAIN_EXIT_DIR) and their number (CHEAPTRAIN_PROCESSES). In the
folder each writes its pid, once it can be sent a signal, and in the end its exit code: `accelerate launch` in between
answers 1 for every code that is not 0. Started by anything else, nothing is written.

The trap: to end with 0 towards the launcher's agent, so that it does not report a stop as a crash, is only safe when
all processes end with the same code; one that fails alone must be seen to fail, or the others wait for it for ever.
They agree over the store of the agent, which outlives every process group; one that does not agree says so in the
folder, and the launcher ends the rest.
"""

import contextlib
import hashlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cheaptrain.errors import EXIT_DIVERGED, EXIT_STOPPED, PreflightError
from cheaptrain.stopping import SIGNALS, end_with_parent

EXIT_DIR = "CHEAPTRAIN_EXIT_DIR"
ASKED = "asked"  # a file there once somebody asked the launcher to stop
ENV_APPLIED = "CHEAPTRAIN_ENV_APPLIED"  # the recipe's [env] was there from the start
PROCESSES = "CHEAPTRAIN_PROCESSES"
PATIENCE_SECONDS = 15.0  # how long a process that ends waits for the others to end alike
LONG_PATIENCE_SECONDS = 300.0  # the same where training has agreed already: the main one may have uploads to finish


@dataclass(frozen=True)
class Ending:
    """How the processes end: all with the same code, and with the same words as the main one."""

    agreed: bool
    said: bool


def rank() -> int:
    """This process among all, from the launcher's environment; 0 when alone."""
    return int(os.environ.get("RANK", "0"))


def size() -> int:
    """Number of processes, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def launched() -> bool:
    """Whether `cheaptrain launch` waits for the exit code of this process. False before `announce`."""
    return _directory is not None


def assert_started(count: int) -> None:
    """Raise PreflightError unless `count` processes are what `cheaptrain launch` was asked to start."""
    asked = os.environ.get(PROCESSES, str(count))
    if asked != str(count):
        raise PreflightError(
            f"{asked} processes were to start ({PROCESSES}), and {count} came up: some launchers quietly start fewer. "
            "Start the run with `cheaptrain launch`"
        )


def announce(on_signal: Callable[[str], None]) -> None:
    """Say that this process can be sent signals. Until training takes them over, one ends it at once with exit 75:
    nothing is under way yet. `on_signal` is told the name first. Does nothing without the launcher's folder."""
    global _directory
    if EXIT_DIR not in os.environ:
        return
    _directory = Path(os.environ.pop(EXIT_DIR))  # what this process starts is not the launcher's business

    agent = os.getppid()

    def leave(number: int, _: object) -> None:
        if not _asked():
            if os.getppid() != agent:  # the launcher is gone
                os._exit(1)
            return  # the agent ends the others of one that failed: this one has words of its own, or will be killed
        on_signal(signal.Signals(number).name)
        _write("code", f"{EXIT_STOPPED} early")
        os._exit(0)  # raised as an exception it could land anywhere, in an import of torch or a destructor

    for number in SIGNALS:  # they arrive ignored: the launcher makes its agent deaf, and that is inherited
        signal.signal(number, leave)
    end_with_parent(signal.SIGTERM)  # the launcher dies, then its agent, then this: nothing trains on unseen
    _write("pid", str(os.getpid()))


def record(code: int) -> None:
    """Tell the launcher with which code this process ends."""
    if launched():
        _write("code", str(code))


def fail_alone(code: int) -> None:
    """End with `code` and have the launcher end all others. Under another launcher the exit status does that."""
    if launched():
        _write("code", f"{code} alone")
        time.sleep(PATIENCE_SECONDS)  # while this process lives, its death is not what the others complain about
    sys.exit(code)


def end_together(code: int, text: str) -> Ending:
    """Wait until all processes end with `code`, or one does not, or patience has run out."""
    if size() == 1:
        return Ending(agreed=True, said=rank() == 0)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return Ending(agreed=False, said=False)  # the store lives in rank 0, which may be gone
    from datetime import timedelta

    from torch.distributed import TCPStore

    digest = hashlib.sha256(text.encode(errors="replace")).hexdigest()
    patience = LONG_PATIENCE_SECONDS if code in (EXIT_STOPPED, EXIT_DIVERGED) else PATIENCE_SECONDS
    deadline = time.monotonic() + patience
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=PATIENCE_SECONDS))
        if rank() == 0:
            store.set("cheaptrain/end/text", digest)
        store.add(f"cheaptrain/end/{code}", 1)
        store.add("cheaptrain/end/all", 1)
        while time.monotonic() < deadline:
            alike, ended = store.add(f"cheaptrain/end/{code}", 0), store.add("cheaptrain/end/all", 0)
            if alike == size():
                return Ending(agreed=True, said=store.get("cheaptrain/end/text").decode() == digest)
            if ended > alike:
                break
            time.sleep(0.1)
    except RuntimeError:  # the agent that holds the store is gone, and with it any agreement
        return Ending(agreed=False, said=False)
    return Ending(agreed=False, said=False)


def _asked() -> bool:
    """Whether the launcher was asked to stop. It may get the same signal a moment later than this process."""
    for _ in range(20):
        if _directory is not None and (_directory / ASKED).exists():
            return True
        time.sleep(0.05)
    return False


def _write(kind: str, text: str) -> None:
    """`<rank>.<kind>` in the launcher's folder. With the launcher gone there is nobody to tell."""
    if _directory is not None:
        with contextlib.suppress(OSError):
            (_directory / f"{rank()}.{kind}").write_text(text, encoding="utf-8")


_directory: Path | None = None
