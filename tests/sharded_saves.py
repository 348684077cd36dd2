"""Checkpoints of tiny real models laid out over forked processes, and hashes of what they hold."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fake_checkpoints import ALONE, LINEAGE, unexpected
from model_helpers import build, tokens
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from cheaptrain.checkpoint.load import load_state_into, saved_tensors
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.state import optimizer_tensors
from cheaptrain.checkpoint.verify import newest_good
from cheaptrain.checkpoint.write import CheckpointParts, save_checkpoint
from cheaptrain.model.streamed import SavedForm, saved_form
from cheaptrain.parallel.mesh import make_mesh
from cheaptrain.parallel.parallelize import parallelize
from cheaptrain.parallel.processes import Processes, join
from cheaptrain.parallel.root import Root
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.schema import Train
from cheaptrain.train.objective import Compute
from cheaptrain.train.optim import build_optimizers
from cheaptrain.train.saving import allowed_difference, live_logits, prove_saved

COMPUTE = Compute(torch.device("cpu"), torch.float32, True, 1024)


@dataclass
class Trained:
    """A model on this process, and what trains it."""

    processes: Processes
    model: PreTrainedModel
    root: Root
    optimizers: list[Optimizer]
    form: SavedForm | None
    compute: Compute = COMPUTE

    def step(self) -> None:
        """One step of the optimizers along gradients that are a function of the weights: the same in every layout."""
        for parameter in self.model.parameters():
            parameter.grad = (parameter.detach() * 3).sin()
        for optimizer in self.optimizers:
            optimizer.step()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and scalars of the optimizers."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return optimizer_tensors(self.optimizers, names)

    def parts(self, step: int, **changes: Any) -> CheckpointParts:
        """Everything of a checkpoint, proven as in training."""
        ids = tokens()[:1]
        logits = live_logits(self.root, ids, self.compute, self.processes)
        state, scalars = self.state()
        allowed = allowed_difference(self.processes, self.compute)
        given: dict[str, Any] = {
            "weights": saved_tensors(self.model),
            "files": self.form.files if self.form else {},
            "prove": partial(prove_saved, self.form, logits, ids, allowed),
            "recipe": {"train": {"steps": 9}},
            "tokens_seen": step,
            "lineage": LINEAGE,
            "state_tensors": state,
            "state_scalars": {"step": step, "optimizer": scalars},
        }
        return CheckpointParts(**given | changes)

    def save(self, path: str, step: int, **changes: Any) -> Path:
        """Save, while training waits."""
        run = RunDirectory(Path(path))
        return save_checkpoint(
            run, step=step, parts=self.parts(step, **changes), processes=self.processes, report=unexpected
        )

    def load_newest(self, path: str) -> dict[str, Any]:
        """Go on from the newest checkpoint; its scalars."""
        checkpoint = self.processes.on_main(lambda: newest_good(RunDirectory(Path(path)), unexpected))
        assert checkpoint is not None
        return load_state_into(checkpoint, self.model, self.optimizers, self.processes)

    def hashes(self) -> dict[str, str]:
        """A hash of every whole tensor. Collective."""
        return {name: digest(tensor) for name, tensor in {**saved_tensors(self.model), **self.state()[0]}.items()}


def laid_out(
    layout: Layout,
    optimizer: str = "adamw",
    preset: str = "tiny-qwen3",
    seed: int = 1,
    dtype: torch.dtype = torch.float32,
) -> Trained:
    """A fresh model over the processes of `layout`. Collective."""
    processes = join(60)
    torch.set_num_threads(1)  # accelerate has set them to all there are
    model = build(preset, seed=seed)
    root = parallelize(model, make_mesh(layout, "cpu"), dtype=dtype)
    train = Train(steps=1, global_batch_tokens=1, lr=1e-2, optimizer=optimizer)  # type: ignore[arg-type]
    form = saved_form(model) if processes.is_main else None
    return Trained(processes, model, root, build_optimizers(model, train), form, replace(COMPUTE, dtype=dtype))


def alone(preset: str = "tiny-qwen3") -> Trained:
    """A fresh model of one process that has made no process group: other tests of this process fork ranks."""
    model = build(preset)
    train = Train(steps=1, global_batch_tokens=1, lr=1e-2)
    return Trained(ALONE, model, Root(model), build_optimizers(model, train), saved_form(model))


def digest(tensor: Tensor) -> str:
    """SHA-256 over dtype, shape and bits of the whole of a tensor, sharded or not."""
    whole = (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
    content = f"{whole.dtype}{tuple(whole.shape)}".encode() + whole.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(content).hexdigest()


def raised(work: Callable[[], Any]) -> str:
    """The error of `work`, as "Class: message"."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
