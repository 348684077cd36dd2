"""Reading weights and moments into a model that is laid out already, whatever layout wrote them.

Each process reads the slices that it holds and nothing else, straight into its tensors, so no process ever has the
whole model. Everything goes by name and shape; the trap is a tensor that is quietly left as it was because the file has
it under another name, so what is missing is always an error, and what is left over is told.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.optim import Optimizer

from cheaptrain.checkpoint.state import load_optimizer_tensors
from cheaptrain.checkpoint.state_files import read_scalars, read_tensors, stored_tensors
from cheaptrain.checkpoint.tensor_files import Entry
from cheaptrain.checkpoint.verify import STATE, Checkpoint
from cheaptrain.errors import PreflightError
from cheaptrain.parallel.processes import Processes

ADAPTER = "adapter/"  # how the names of adapters begin in the state

T = TypeVar("T")


def load_weights(model: nn.Module, folder: Path, processes: Processes) -> list[str]:
    """Fill the parameters and saved buffers of `model`, sharded or not, from the safetensors files of a transformers
    folder; returns the names in it that the model has no place for.

    Numbers of another dtype are converted. Tensors tied to each other are read once. Raises PreflightError, on all
    processes, naming what is missing or has another shape; then nothing was changed. Collective.
    """
    return _agreed(processes, lambda: _load_weights(model, folder))


def load_state_into(
    checkpoint: Checkpoint,
    model: nn.Module,
    optimizers: Optimizer | Iterable[Optimizer],
    processes: Processes,
    adapters: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Put weights and optimizer state of a verified `checkpoint` on `model` and `optimizers`, bit for bit, in whatever
    layout they have now; returns the scalars it was saved with.

    With `adapters` the model has the weights that it started from already, and only these tensors are read, from the
    state: the checkpoint's own weights have them merged.

    Raises PreflightError, on all processes, when it was saved without state or does not fit. Collective.
    """
    if not checkpoint.has_state:
        raise PreflightError(
            f"{checkpoint.path}: saved without optimizer state (checkpoint.state_in_final = false), so the run cannot "
            "go on from it; start a new stage from it with model.init_from"
        )

    def load() -> dict[str, Any]:
        folder = checkpoint.path / STATE
        scalars = read_scalars(folder)
        stored = stored_tensors(folder)
        kept = {name: stored.pop(name) for name in list(stored) if name.startswith(ADAPTER)}
        wanted = {f"{ADAPTER}{name}": tensor for name, tensor in (adapters or {}).items()}
        if {name: entry.shape for name, entry in kept.items()} != {n: tuple(t.shape) for n, t in wanted.items()}:
            raise PreflightError(f"{checkpoint.path}: the adapters in it are not those of [lora] in this recipe")
        if adapters is not None:
            read_tensors(folder, wanted)
        elif left := _load_weights(model, checkpoint.path):
            raise PreflightError(f"{checkpoint.path} holds weights that the model does not have: {_some(left)}")
        names = {parameter: name for name, parameter in model.named_parameters()}
        load_optimizer_tensors(
            optimizers, names, stored, scalars["optimizer"], lambda rooms: read_tensors(folder, rooms)
        )
        return scalars

    return _agreed(processes, load)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What of `model` is saved, by name: parameters, each once, and the buffers that belong to its state."""
    # Asking for the state first makes FSDP drop what it had gathered: parameters are their shards again.
    state = model.state_dict(keep_vars=True)
    parameters = dict(model.named_parameters())
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor) and name not in tied}


def _load_weights(model: nn.Module, folder: Path) -> list[str]:
    targets, stored = saved_tensors(model), stored_tensors(folder)
    names = {name: _name_in_file(name, model, stored) for name in targets}
    missing = [name for name, there in names.items() if there is None]
    if missing:
        raise PreflightError(f"{folder}: {len(missing)} weights of the model are missing: {_some(missing)}")
    found = {there: targets[name] for name, there in names.items() if there is not None}
    wrong = [
        f"{name} {list(stored[name].shape)} instead of {list(target.shape)}"
        for name, target in found.items()
        if stored[name].shape != tuple(target.shape)
    ]
    if wrong:
        raise PreflightError(f"{folder}: the weights do not fit the model: {_some(wrong)}")
    read_tensors(folder, found)
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - targets.keys()
    return sorted(stored.keys() - found.keys() - tied)


def _name_in_file(name: str, model: nn.Module, stored: Mapping[str, Entry]) -> str | None:
    """A transformers folder may have been saved from the decoder alone: then its names lack the decoder's own."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return next((n for n in (name, name.removeprefix(prefix)) if n in stored), None)


def _agreed(processes: Processes, work: Callable[[], T]) -> T:
    """What `work` returns here, once it is done everywhere; the first error of any process, on all."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    told = processes.all_of(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    if failures := [f"process {rank}: {text}" for rank, text in enumerate(told) if text is not None]:
        raise PreflightError(failures[0])
    return result  # type: ignore[return-value]


def _some(names: list[str]) -> str:
    return ", ".join(sorted(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
