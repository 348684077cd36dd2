"""Checkpoints of a model that is one small tensor: everything about saving but the size."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.state_files import read_scalars, read_tensors, stored_tensors
from cheaptrain.checkpoint.verify import Checkpoint, Report
from cheaptrain.checkpoint.write import CheckpointParts, ProofFailed, save_checkpoint
from cheaptrain.parallel.processes import Processes

ALONE = Processes(0, 1, 0, torch.device("cpu"), None, None)  # type: ignore[arg-type]  # with nobody to talk to
LINEAGE = {"identity_sha256": "a" * 64, "inputs": {"tokenizer": "b" * 64}}


def weights(step: int, size: int = 64) -> Tensor:
    """What the fake model has learnt by `step`."""
    return torch.arange(size, dtype=torch.float32) * step


def parts(step: int, size: int = 64, **changes: Any) -> CheckpointParts:
    """The parts of a checkpoint at `step`; `size` numbers of weights, three times as many of state."""
    state = {f"optimizer/w/{key}": weights(step, size) + k for k, key in enumerate(("exp_avg", "exp_avg_sq", "more"))}

    def prove(folder: Path) -> dict[str, Any]:
        difference = (load_file(folder / "model.safetensors")["w"] - weights(step, size)).abs().max().item()
        if difference:
            raise ProofFailed(f"differs by {difference}")
        return {"max_abs_difference": difference}

    given: dict[str, Any] = {
        "weights": {"w": weights(step, size)},
        "files": {"config.json": b'{"model_type": "fake"}', "tokenizer.json": b"{}"},
        "prove": prove,
        "recipe": {"train": {"steps": 1000}},
        "tokens_seen": step * 10,
        "lineage": LINEAGE,
        "state_tensors": state,
        "state_scalars": {"step": step, "loss": 1 / 3},
    }
    return CheckpointParts(**given | changes)


def unexpected(message: str) -> None:
    """A report for places where nothing is to be reported."""
    raise AssertionError(f"unexpected report: {message}")


def save(run: RunDirectory, step: int, size: int = 64, report: Report = unexpected, **changes: Any) -> Path:
    """Save a fake checkpoint, while everything waits."""
    return save_checkpoint(run, step=step, parts=parts(step, size, **changes), processes=ALONE, report=report)


def assert_is_step(checkpoint: Checkpoint | None, step: int, size: int = 64) -> None:
    """The checkpoint holds exactly what was saved at `step`."""
    assert checkpoint is not None
    assert checkpoint.step == step
    assert load_file(checkpoint.path / "model.safetensors")["w"].equal(weights(step, size))
    assert json.loads((checkpoint.path / "config.json").read_text()) == {"model_type": "fake"}
    state = checkpoint.path / "state"
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in stored_tensors(state).items()}
    read_tensors(state, tensors)
    assert tensors["optimizer/w/exp_avg"].equal(weights(step, size))
    assert read_scalars(state) == {"step": step, "loss": 1 / 3}


def names(folder: Path) -> set[str]:
    """Names of what lies in a folder."""
    return {item.name for item in folder.iterdir()}
