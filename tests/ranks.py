"""Several processes of one run, forked from the test: no launcher and no import in any of them.

`run_ranks(function, n, ...)` calls `function(rank, n, ...)` in n children that can find each other (`join` works in
them) and returns what each of them returned. A child that fails fails the test with its traceback; one that hangs is
killed.
"""

import os
import pickle
import shutil
import signal
import socket
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate.state import AcceleratorState


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """`function(rank, size, *arguments)` in `size` processes; their results by rank."""
    folder = Path(tempfile.mkdtemp(prefix="ranks-"))
    try:
        ended = end_ranks(function, size, *arguments, folder=folder, timeout=timeout)
        outcomes = [_outcome(folder / str(rank)) for rank in range(size)]
        failures = [
            f"rank {rank} (ended with {ended[rank]}):\n{text}"
            for rank, (kind, text) in enumerate(outcomes)
            if kind == "error"
        ]
        if failures:
            pytest.fail("\n".join(failures), pytrace=False)
        return [value for _, value in outcomes]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def end_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, folder: Path, timeout: float = 120
) -> dict[int, int | str]:
    """Like `run_ranks`, for ranks that are meant to fail: how each of them ended, an exit code, -signal, or "hung".

    Once a rank has failed the others have 20 seconds to end by themselves.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    ranks = {}
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            _child(function, rank, size, arguments, port, folder / str(rank))
        ranks[pid] = rank
    ended: dict[int, int | str] = {}
    deadline = time.monotonic() + timeout
    while len(ended) < size:
        for pid, rank in ranks.items():
            if rank in ended:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                ended[rank] = os.waitstatus_to_exitcode(status)
                if ended[rank] != 0:
                    deadline = min(deadline, time.monotonic() + 20)
        if time.monotonic() > deadline:
            for pid, rank in ranks.items():
                if rank not in ended:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    ended[rank] = "hung"
        time.sleep(0.003)
    return ended


def _child(
    function: Callable[..., Any], rank: int, size: int, arguments: tuple[Any, ...], port: int, note: Path
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    AcceleratorState._reset_state(reset_partial_state=True)  # another test of the parent may have made one
    code = 0
    try:
        torch.set_num_threads(1)
        outcome: tuple[str, Any] = ("result", function(rank, size, *arguments))
    except SystemExit as end:
        outcome, code = ("result", None), end.code if isinstance(end.code, int) else 1
    except BaseException:
        outcome, code = ("error", traceback.format_exc()), 1
    part = note.with_suffix(".part")
    part.write_bytes(pickle.dumps(outcome))
    part.rename(note)
    # The first process holds the store: gone too early, it takes the others with it.
    patience = time.monotonic() + 30
    while code == 0 and rank == 0 and time.monotonic() < patience:
        if all((note.parent / str(other)).exists() for other in range(size)):
            break
        time.sleep(0.003)
    # Not through the interpreter's end, which would run the parent's own exit handlers.
    os._exit(code)


def _outcome(note: Path) -> tuple[str, Any]:
    if not note.exists():
        return "error", "it left no result"
    outcome: tuple[str, Any] = pickle.loads(note.read_bytes())
    return outcome


def alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
