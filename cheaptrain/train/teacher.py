"""The teacher: a model that is only read. Which one, what of it must fit the student, and its word on a micro-batch.

It reads the very rows the student reads, with the same positions and the same documents kept apart, and is laid out
over the same processes by the same `parallelize`: its layers are shards that are gathered one at a time. Its embedding
and head stay gathered once they are, because nothing ever changes them. It has no gradient, no dropout and no fp32
weights unless asked for. The traps: a vocabulary padded to another size (cut to the tokens there are), another
tokenizer (refused, `data/same_tokenizer.py`), rows longer than it has positions for, and another teacher after a
resume (its hash is among the inputs of the run).
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from cheaptrain_kernels import TeacherHead
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedConfig, PreTrainedModel

from cheaptrain.data.rows import RowBatch
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError
from cheaptrain.model.attention.asked import unsupported_attention
from cheaptrain.model.build import build_model
from cheaptrain.model.config import model_config
from cheaptrain.model.fp8 import multiplies_in_fp8
from cheaptrain.model.parts import decoder_layers, head
from cheaptrain.model.proof import prove_documents_isolated, prove_head
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import Processes
from cheaptrain.parallel.root import Root
from cheaptrain.recipe.parents import teacher_model
from cheaptrain.recipe.schema import Distill, Model
from cheaptrain.train.objective import Compute, hidden_states

_UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class Teacher:
    """A model that is laid out and only read; `compute` is in its own precision."""

    root: Root
    compute: Compute
    top_k: int | None

    def says(self, batch: RowBatch) -> TeacherHead:
        """Its hidden states `[rows * seq, hidden]` for a batch on the device, and its head whole or, with tensor
        parallelism, this process's rows of it. Call outside of autocast. Collective."""
        with torch.no_grad():
            hidden, weight = self.root(_read, batch, self.compute)
        return TeacherHead(hidden, weight, self.top_k)


@dataclass(frozen=True)
class TeacherShape:
    """What is known of a teacher before it is loaded: where its shape comes from, how many tokens it is asked about
    (None: not known), and, where it reads rows of its own, how long they are at most (`longest_row`)."""

    model: Model
    vocab_size: int | None
    longest: int | None = None

    def row(self, seq_len: int) -> int:
        """Tokens of its rows, for a student with rows of `seq_len`."""
        return seq_len if self.longest is None else min(seq_len, self.longest)


def longest_row(config: PreTrainedConfig) -> int:
    """Tokens that a model can read at once: its positions, and no more than its attention looks back."""
    longest = getattr(config, "max_position_embeddings", None) or _UNBOUNDED
    for name in ("sliding_window", "attention_chunk_size"):
        window = getattr(config, name, None)
        if window is not None and window < longest and unsupported_attention(config, longest):
            longest = window
    return int(longest)


def teacher_config(model: Model, *, vocab_size: int, seq_len: int) -> PreTrainedConfig:
    """The config of a teacher for rows of `seq_len` tokens. Raises RecipeError for rows it cannot read."""
    with speaking_of_the_teacher():
        known = getattr(model_config(model, vocab_size=vocab_size, seq_len=1), "max_position_embeddings", None)
        if known is not None and seq_len > known:
            raise RecipeError(
                f"distill.teacher: it has {known:,} positions, and rows are {seq_len:,} tokens long: set data.seq_len "
                f"= {known} or less, or take a teacher that reads longer rows"
            )
        return model_config(model, vocab_size=vocab_size, seq_len=seq_len)


def load_teacher(
    distill: Distill,
    *,
    vocab_size: int,
    head_rows: int,
    seq_len: int,
    mesh: DeviceMesh,
    processes: Processes,
    compute: Compute,
    compile_layers: bool,
) -> Teacher:
    """Load, prove and lay out the teacher of a recipe whose tokenizer has `vocab_size` tokens, on all processes
    together. `head_rows`: of the student's head, which tensor parallelism splits; `compute`: how the student is run.

    Raises PreflightError for what cannot be had here: weights, precision, layout, document masks.
    """
    size, tp = mesh.size(), mesh["tp"].size()
    base = refuse_precision(distill, processes.device, tp)
    quantised = distill.precision in ("int8", "fp8")
    with speaking_of_the_teacher():
        model = build_model(
            teacher_model(distill),
            vocab_size=vocab_size,
            seq_len=seq_len,
            seed=0,
            eot_id=0,
            dtype=base,
            device=processes.device if size == 1 or quantised else "cpu",
        )
        model.requires_grad_(False).eval()
        masked = compute.document_mask or compute.context is not None
        _prove(model, masked, base, processes)
    _refuse_other_weights(model, processes)
    if tp > 1 and model.config.vocab_size != head_rows:
        # Split by rows, both heads must be cut at the same tokens. The rows that come or go are no tokens.
        model.resize_token_embeddings(head_rows, mean_resizing=False)
    if quantised:
        _quantise(model, distill.precision)
        root = Root(model)
    else:
        root = parallelize(model, mesh, dtype=base, compile_layers=compile_layers)
    root.requires_grad_(False)  # again: splitting makes new parameters
    return Teacher(root.eval(), replace(compute, dtype=base), distill.top_k)


def refuse_precision(distill: Distill, device: torch.device, tp: int) -> torch.dtype:
    """The dtype that the teacher computes in on `device`. Raises PreflightError for a precision that cannot be had."""
    precision = distill.precision
    if precision in ("int8", "fp8"):
        if importlib.util.find_spec("torchao") is None:
            raise PreflightError(f'distill.precision = "{precision}" needs torchao; run: pip install torchao')
        if tp > 1:
            raise PreflightError(
                f'distill.precision = "{precision}": every process keeps a quantised teacher whole, which does not go '
                f'with parallel.tp = {tp}: set distill.precision = "bf16", or parallel.tp = 1'
            )
        if precision == "fp8" and not multiplies_in_fp8(device):
            raise PreflightError(
                'distill.precision = "fp8" needs a GPU that computes in it (Ada, Hopper or newer): set "int8" or "bf16"'
            )
    refuse_top_k(distill, tp)
    if precision == "fp32" or (device.type == "cpu" and precision != "bf16"):
        return torch.float32
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise PreflightError(
            f'{torch.cuda.get_device_name(device)} has no bf16: set distill.precision = "fp32" for the teacher'
        )
    return torch.bfloat16


def refuse_top_k(distill: Distill, tp: int) -> None:
    """Raise PreflightError where a head is split that top-k needs whole."""
    if distill.top_k is not None and tp > 1:
        raise PreflightError(
            f"distill.top_k = {distill.top_k} needs whole rows of logits, and parallel.tp = {tp} splits them: leave "
            "top_k out, or set parallel.tp = 1"
        )


@contextmanager
def speaking_of_the_teacher() -> Iterator[None]:
    """Whatever loads models names `model.init_from`; here it is `distill.teacher` that is meant."""
    try:
        yield
    except (RecipeError, PreflightError) as error:
        said = str(error).replace("model.init_from", "distill.teacher").replace("model.revision", "distill.revision")
        raise type(error)(said if "distill." in said else f"distill.teacher: {said}") from error


def _read(model: PreTrainedModel, batch: RowBatch, compute: Compute) -> tuple[Tensor, Tensor]:
    """Runs inside the teacher's root. The head's weight is handed out: it stays there after the forward pass."""
    return hidden_states(model, batch, compute).flatten(0, 1), head(model).weight


def _prove(model: PreTrainedModel, masked: bool, dtype: torch.dtype, processes: Processes) -> None:
    """What is proven of the student (`setup.py`): that its logits are its head's, and that documents are kept apart."""

    def prove() -> None:
        prove_head(model)
        prove_documents_isolated(model, document_mask=masked, seed=0, dtype=dtype)

    processes.on_main(prove)


def _refuse_other_weights(model: PreTrainedModel, processes: Processes) -> None:
    """Each process reads the teacher for itself, from another disk perhaps."""
    hashes = [int(torch.hash_tensor(tensor).view(torch.int64)) for tensor in model.state_dict().values()]
    everywhere = processes.all_of(hashes)
    if others := [rank for rank, theirs in enumerate(everywhere) if theirs != everywhere[0]]:
        raise PreflightError(
            f"distill.teacher: its weights are not the same on rank {', '.join(map(str, others[:8]))} as on rank 0. "
            "All machines must read the same files"
        )


def _quantise(model: PreTrainedModel, precision: str) -> None:
    """Matrices of the layers, in place. Embedding and head stay as they are: the loss needs the head's own numbers."""
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, Int8WeightOnlyConfig, quantize_

    config: Any = Int8WeightOnlyConfig() if precision == "int8" else Float8DynamicActivationFloat8WeightConfig()
    layers = decoder_layers(model)
    if not any(isinstance(module, nn.Linear) for module in layers.modules()):
        raise CheaptrainError(
            f'distill.precision = "{precision}": {type(model).__name__} has no linear layers that could be quantised; '
            'set "bf16"'
        )
    quantize_(layers, config)
