"""The `state/` folder of a checkpoint: what a resumed run needs besides the weights.

Tensors go through torch.distributed.checkpoint with its safetensors writer (its usual format is pickled), numbers
into trainer.json. Two traps: the writer builds each file in memory before it writes it, so tensors are spread over
files of at most a gigabyte; and its errors arrive wrapped in an exception that is no Exception, so `except
Exception` lets a full disk through.
"""

import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, HuggingFaceStorageReader, HuggingFaceStorageWriter

from cheaptrain.durable import write_json

_BYTES_PER_FILE = 2**30


def write_state(folder: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write trainer.json and model-*.safetensors into `folder`, which must not be there yet.

    Every name, dtype and shape is looked up again in the written files. Raises OSError or SafetensorError when the
    disk cannot, ValueError when a scalar is not finite or a tensor did not arrive.
    """
    folder.mkdir()
    write_json(folder / "trainer.json", dict(scalars))
    if not tensors:
        return
    # safetensors takes only whole, row-major tensors; for most this is the same tensor, not a copy.
    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with _single_process():
        dcp.save(whole, storage_writer=HuggingFaceStorageWriter(str(folder), _spread(whole)), no_dist=True)
    written = {name: (tuple(m.size), m.properties.dtype) for name, m in _read_metadata(folder).items()}
    asked = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in whole.items()}
    if written != asked:
        wrong = sorted(name for name in written.keys() | asked.keys() if written.get(name) != asked.get(name))
        raise ValueError(f"{folder}: not written as given: {', '.join(wrong[:5])}")


def read_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU, bit for bit as written) and scalars of a `state/` folder."""
    scalars = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))
    tensors = {name: torch.empty(m.size, dtype=m.properties.dtype) for name, m in _read_metadata(folder).items()}
    if tensors:
        with _single_process():
            dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return tensors, scalars


def _spread(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """File number (from 1) of each tensor, filled in order up to the limit."""
    number, filled, files = 1, 0, {}
    for name, tensor in tensors.items():
        if filled and filled + tensor.nbytes > _BYTES_PER_FILE:
            number, filled = number + 1, 0
        files[name] = number
        filled += tensor.nbytes
    return files


def _read_metadata(folder: Path) -> dict[str, Any]:
    return dict(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


@contextmanager
def _single_process() -> Iterator[None]:
    """Silence the library's remark that there is one process, and unwrap the error it wraps."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as wrapped:
            error = next(iter(wrapped.failures.values()))[0]
            raise error from None
