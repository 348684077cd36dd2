"""Everything one stage trains with, put together by `setup.py`, used by `loop.py` and `save.py`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.checkpoint.launch_record import Note
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.loader import Loader
from cheaptrain.data.rows import RowBatch
from cheaptrain.data.tokenizer import TextTokenizer
from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.root import Root
from cheaptrain.parallel.watch import Watch
from cheaptrain.recipe.resolve import Resolved
from cheaptrain.recipe.schema import Recipe
from cheaptrain.train.evaluating import LightSet
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.metrics import Metrics, Unwritten
from cheaptrain.train.objective import Compute, Objective
from cheaptrain.train.saving import Saving
from cheaptrain.train.signals import StopRequest


@dataclass
class Stage:
    """One stage, ready to train."""

    name: str
    recipe: Recipe
    resolved: Resolved
    run: RunDirectory
    run_id: str  # of the trackers, kept over resumes
    saved_recipe: dict[str, Any]  # what every checkpoint carries as recipe.json
    lineage: dict[str, Any]
    processes: Processes
    mesh: DeviceMesh
    watch: Watch
    model: PreTrainedModel  # its parameters may be shards
    root: Root  # what to call: root(work, ...) runs work(model, ...) with its weights there
    tokenizer: TextTokenizer
    optimizers: list[Optimizer]
    compute: Compute
    objective: Objective
    loader: Loader  # of this process's rows
    validation: dict[str, list[RowBatch]]  # by source, this process's share
    token_bytes: Tensor  # [vocab], on the device
    proof_ids: Tensor  # [1, seq], on the device: the tokens of the proof of every save
    ledger: Ledger
    metrics: Metrics
    samples: JsonLines | Unwritten
    light: LightSet | None  # tasks scored while training
    saving: Saving
    stop: StopRequest
    console: Console
    flops_per_token: float
    peak_flops: float | None  # of one process; None when the GPU is not known
    checkpoint_bytes: int  # estimate
    note: Note  # adds to the record of this launch
    began: float  # when work on the stage began, on the clock of time.perf_counter()
    steps_ahead: int  # handed to the device before the last one's figures are read
