"""What the threads of this process are doing, as text.

Two ways, for two states of the process. `python_stacks` goes through the interpreter: it has the names of threads and
the lines of code, and can be sent to others. `write_stacks` and the signal of `stacks_on_signal` use faulthandler,
which reads the stacks from C and works even when a thread holds the interpreter and never lets go.
"""

import faulthandler
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch.distributed as dist

STACKS_SIGNAL = signal.SIGUSR2
WATCH_THREADS = "watch"  # their names begin so
_UNINTERESTING = (WATCH_THREADS, "signals")
_LEAST_FRAMES = 3  # of these innermost ones one is torch.distributed's when a thread waits in a collective
_FRAMES = 15  # of each thread in a report
_DISTRIBUTED = str(Path(dist.__file__).parent) + "/"
_COMPUTING = _DISTRIBUTED + "tensor/"  # DTensor's own frames lie around every operation, waiting or not


def in_collective(thread: int) -> bool:
    """Whether the thread with this identity waits inside a collective, as far as its Python frames show it.

    A thread that waits for the GPU, where the collectives of NCCL run, does not show.
    """
    frame: FrameType | None = sys._current_frames().get(thread)
    for _ in range(_LEAST_FRAMES):
        if frame is None:
            return False
        name = frame.f_code.co_filename
        if name.startswith(_DISTRIBUTED) and not name.startswith(_COMPUTING):
            return True
        frame = frame.f_back
    return False


def python_stacks(first: int) -> str:
    """The innermost frames of every Python thread but those that only wait for trouble, of `first` first.

    It reads lines of source code from the disk.
    """
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = {
        thread: frame
        for thread, frame in sys._current_frames().items()
        if not names.get(thread, "").startswith(_UNINTERESTING)
    }
    lines = []
    for thread in sorted(frames, key=lambda thread: (thread != first, thread)):
        lines.append(f"thread {names.get(thread, thread)}:")
        lines += [line.rstrip("\n") for line in traceback.format_stack(frames[thread])[-_FRAMES:]]
    return "\n".join(lines)


def write_stacks(path: Path, title: str) -> None:
    """Append the stacks of all threads to the file at `path`, under `title` and the time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {title}", file=file, flush=True)
        faulthandler.dump_traceback(file=file, all_threads=True)


@contextmanager
def stacks_on_signal() -> Iterator[None]:
    """Within the block, SIGUSR2 writes the stacks of all threads on stderr and changes nothing else: a look into a run
    that seems to hang. A handler somebody else has set stays."""
    if signal.getsignal(STACKS_SIGNAL) is not signal.SIG_DFL:
        yield
        return
    faulthandler.register(STACKS_SIGNAL, file=2, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(STACKS_SIGNAL)
