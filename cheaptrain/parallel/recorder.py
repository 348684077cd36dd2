"""What the collectives of this process were: torch's Flight Recorder, switched on and put into the run's folder.

It keeps the last two thousand collectives of each process with their stacks, costs next to nothing, and is the only
witness when processes wait for each other over NCCL: `torchfrtrace --prefix collectives-rank- FOLDER` compares what the
ranks recorded and names the collective that not all of them joined (of gloo's records it makes nothing; they are plain
pickles). The trap: how much is kept is read once, when the process group is made, so the settings must stand in the
environment before that.
"""

import os
from pathlib import Path

import torch
from torch._C import _distributed_c10d

_PREFIX = "collectives-rank-"  # the rank follows
_FILE_PREFIX = "TORCH_FR_DUMP_TEMP_FILE"
_BUFFER_SIZE = "2000"  # collectives; torch's own default, said here because 0 switches the recorder off


def record_collectives(directory: Path) -> None:
    """Let torch record its collectives and write them into `directory` when one of them times out.

    Call before `join`, and again when the folder changes. What the user has set in the environment stays. The folder is
    made only where it is used: on a GPU, where NCCL writes into it without us.
    """
    global _ours
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # the older name
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", _BUFFER_SIZE)
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    theirs = os.environ.get(_FILE_PREFIX, os.environ.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE"))
    if theirs is None or theirs == _ours:
        _ours = os.environ[_FILE_PREFIX] = str(directory / _PREFIX)
        if torch.cuda.is_available():
            directory.mkdir(parents=True, exist_ok=True)


def write_collectives(directory: Path, rank: int) -> None:
    """Write what was recorded so far into `directory`, as torchfrtrace reads it."""
    # On a GPU NCCL has a recorder of its own. Not run there yet.
    dump = "_dump_nccl_trace" if torch.cuda.is_available() else "_dump_fr_trace"
    content: bytes = getattr(_distributed_c10d, dump)()
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{_PREFIX}{rank}").write_bytes(content)


_ours: str | None = None
