"""A worker process of preparing: `python -m cheaptrain.data.worker <descriptor>`.

It is started as a fresh interpreter, not forked (threads of the parent would be lost in the middle of their work) and
not by multiprocessing (which imports the user's main script again). It talks over one socket: a setup message, then a
task a message; answers are ("progress", bytes, tokens), ("done", record, CPU seconds) and ("failed", exception). The
trap: a worker whose parent was killed would go on and write into a folder that another run now owns; a thread watches
the socket and ends the process the moment the other end is gone.
"""

import errno
import os
import queue
import signal
import sys
import threading
import time
import traceback
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from cheaptrain.chat.rendering import ChatSpec, Renderer
from cheaptrain.data.encode import Encoder, EncoderSpec, encode_texts
from cheaptrain.data.foreign_index import index_unit
from cheaptrain.data.sources import Unit
from cheaptrain.data.units import Encode, Job, Refusal, write_unit
from cheaptrain.errors import CheaptrainError


@dataclass(frozen=True)
class Setup:
    """Sent once. `token_bytes`: bytes of text of each id, int32 [vocabulary], for sources that are tokens already.
    `chat`: how conversations are rendered, if there are any."""

    encoder: EncoderSpec
    token_bytes: Any
    chat: ChatSpec | None = None


@dataclass(frozen=True)
class Task:
    """One unit to do."""

    job: Job
    unit: Unit
    limit: int | None


def main() -> None:
    """Serve tasks until the parent closes the socket."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    connection = Connection(int(sys.argv[1]))
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_receive, args=(connection, messages), daemon=True).start()
    setup: Setup = messages.get()
    encoder = Encoder(setup.encoder)
    while True:
        task: Task = messages.get()
        started = time.process_time()
        try:
            record = _perform(task, encoder, setup, lambda *done: connection.send(("progress", *done)))
        except CheaptrainError as error:
            connection.send(("failed", error))
        except OSError as error:
            connection.send(("failed", CheaptrainError(_system_message(error, task))))
        except Exception:
            connection.send(("failed", CheaptrainError(f"{_place(task)}: a bug:\n{traceback.format_exc()}")))
        else:
            connection.send(("done", record, time.process_time() - started))


def _perform(task: Task, encoder: Encoder, setup: Setup, progress: Any) -> dict[str, Any]:
    if task.job.source.kind == "tokens":
        return index_unit(task.job, task.unit, encoder.spec, setup.token_bytes, progress)
    encode: Encode = partial(encode_texts, encoder)
    refusal: Refusal = _none
    if task.job.of_chats:
        assert setup.chat is not None
        renderer = Renderer(encoder, setup.chat)
        encode, refusal = renderer.encode, renderer.refusal
    return write_unit(task.job, task.unit, task.limit, encoder.spec.dtype, encode, refusal, progress)


def _none(document: Any) -> None:
    """Every text can be encoded."""


def _receive(connection: Connection, messages: "queue.SimpleQueue[Any]") -> None:
    """Hand messages on as they come; when the parent is gone, end the process, whatever it is doing."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _system_message(error: OSError, task: Task) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"no space left on the disk of {task.job.directory}, while on {_place(task)}; finished units are kept: "
            "make room, or set data.dir to another disk, and run the same command again"
        )
    return f"{_place(task)}: {error}"


def _place(task: Task) -> str:
    return f"source {task.job.source.name!r}, unit {task.unit.index} ({task.unit.label})"


if __name__ == "__main__":
    main()
