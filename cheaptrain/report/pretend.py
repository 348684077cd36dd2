"""A child process that takes itself for one of many.

torch's fake process group lets one process lay a model out over any number of them; its messages go nowhere. A group
of processes that do not exist must never stay in a process that trains, so it lives and dies in a child. Where that is
safe the child is a fork, which starts at once; a process that has met CUDA or has a process group of its own starts a
fresh interpreter instead, which knows nothing of either.
"""

import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from cheaptrain.errors import CheaptrainError

T = TypeVar("T")

_OF_A_LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_",
    "GROUP_",
    "ROLE_",
    "NODE_RANK",
    "MASTER_",
    "ACCELERATE_",
    "TORCHELASTIC_",
)


def as_one_of(processes: int, function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` returns in a child that is the first of `processes`. Both ways it must pickle.

    Errors of ours arrive as they are, any other as a CheaptrainError with its text.
    """
    work = pickle.dumps((processes, function, arguments))
    may_fork = sys.platform == "linux" and not torch.cuda.is_available() and not dist.is_initialized()
    answer = _forked(work) if may_fork else _afresh(work)
    outcome: tuple[str, Any] = (
        pickle.loads(answer) if answer else ("error", CheaptrainError("the child process died without an answer"))
    )
    kind, value = outcome
    if kind == "error":
        raise value
    result: T = value
    return result


def _forked(work: bytes) -> bytes:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        _answer_and_leave(work, write)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def _answer_and_leave(work: bytes, write: int) -> NoReturn:
    # Whatever happens, it ends here: further up there is the parent's own code, waiting to be run a second time.
    try:
        torch.set_num_threads(1)
        with os.fdopen(write, "wb") as pipe:
            pipe.write(_answer(work))
    finally:
        os._exit(0)


def _afresh(work: bytes) -> bytes:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_OF_A_LAUNCHER)}
    environment |= {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__], input=work, capture_output=True, env=environment, check=False
    )
    if not done.stdout:
        sys.stderr.write(done.stderr.decode(errors="replace"))
    return done.stdout


def _answer(work: bytes) -> bytes:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    try:
        warnings.simplefilter("ignore")  # of torch, about what only matters to processes that exist
        processes, function, arguments = pickle.loads(work)
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=processes)
        return pickle.dumps(("result", function(*arguments)))
    except CheaptrainError as error:
        return pickle.dumps(("error", error))
    except Exception as error:
        return pickle.dumps(("error", CheaptrainError(f"{type(error).__name__}: {error}")))


if __name__ == "__main__":
    answered = _answer(sys.stdin.buffer.read())
    sys.stdout.buffer.write(answered)
