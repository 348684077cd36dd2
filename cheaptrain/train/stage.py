"""Everything one stage trains with, put together by `setup.py`, used by `loop.py` and `save.py`."""

from dataclasses import dataclass
from typing import Any

from rich.console import Console
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cheaptrain.checkpoint.jsonl import JsonLines
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.loader import Loader
from cheaptrain.data.rows import RowBatch
from cheaptrain.data.tokenizer import TextTokenizer
from cheaptrain.recipe.resolve import Resolved
from cheaptrain.recipe.schema import Recipe
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.metrics import Metrics
from cheaptrain.train.objective import Compute
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
    model: PreTrainedModel
    tokenizer: TextTokenizer
    optimizers: list[Optimizer]
    compute: Compute
    loader: Loader
    validation: dict[str, list[RowBatch]]  # by source
    token_bytes: Tensor  # [vocab], on the device
    proof_ids: Tensor  # [1, seq], on the device: the tokens of the proof of every save
    ledger: Ledger
    metrics: Metrics
    samples: JsonLines
    stop: StopRequest
    console: Console
    flops_per_token: float
    peak_flops: float | None  # of one process; None when the GPU is not known
    checkpoint_bytes: int  # estimate
