"""Optimizer moments and random states as plain named tensors.

torch numbers an optimizer's parameters in the order they were handed over, so its own state_dict puts moments on the
wrong matrix, without a word, when groups are put together in another order. Here every moment is filed under its
parameter's name, and a name too many or too few is an error. Learning rates and other settings are not filed: they
come from the recipe. Random states are tensors too, because pickling them (the usual way) would make a checkpoint
run code when it is read.
"""

import random
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cheaptrain.errors import PreflightError

_PREFIX = "optimizer/"


def optimizer_tensors(
    optimizers: Optimizer | Iterable[Optimizer], names: Mapping[nn.Parameter, str]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State of one or several optimizers: tensors called `optimizer/<parameter>/<key>`, and the rest.

    `names` maps each parameter to its name, as in `{p: n for n, p in model.named_parameters()}`. The tensors are the
    live ones, not copies.
    """
    tensors: dict[str, Tensor] = {}
    entries: dict[str, Any] = {}
    for name, (parameter, optimizer, _) in _owners(optimizers, names).items():
        state = optimizer.state.get(parameter, {})
        entries[name] = {
            "optimizer": type(optimizer).__name__,
            "shape": list(parameter.shape),
            "tensors": [key for key, value in state.items() if isinstance(value, Tensor)],
            "values": {key: value for key, value in state.items() if not isinstance(value, Tensor)},
        }
        tensors |= {f"{_PREFIX}{name}/{key}": state[key] for key in entries[name]["tensors"]}
    return tensors, {"parameters": entries}


def load_optimizer_tensors(
    optimizers: Optimizer | Iterable[Optimizer],
    names: Mapping[nn.Parameter, str],
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, Any],
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit, on each parameter's device. Other tensors are not looked at.

    Raises PreflightError that names each parameter and tensor missing, left over, or of another shape or optimizer;
    then nothing was changed.
    """
    owners, entries = _owners(optimizers, names), scalars["parameters"]
    wrong = [f"{name}: not in the checkpoint" for name in owners.keys() - entries.keys()]
    wrong += [f"{name}: in the checkpoint, not in the model" for name in entries.keys() - owners.keys()]
    expected = set()
    for name in owners.keys() & entries.keys():
        (parameter, optimizer, _), entry = owners[name], entries[name]
        here, saved = (type(optimizer).__name__, list(parameter.shape)), (entry["optimizer"], entry["shape"])
        if here != saved:
            wrong.append(f"{name}: saved of {saved[0]} with shape {saved[1]}, here {here[0]} with shape {here[1]}")
        expected |= {f"{_PREFIX}{name}/{key}" for key in entry["tensors"]}
    wrong += [f"{name}: missing" for name in expected - tensors.keys()]
    if not wrong:
        found = {name for name in tensors if name.startswith(_PREFIX)}
        wrong += [f"{name}: belongs to no parameter" for name in found - expected]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise PreflightError(f"the optimizer state does not fit this model: {'; '.join(sorted(wrong)[:10])}{more}")
    for name, (parameter, optimizer, group) in owners.items():
        entry = entries[name]
        state = dict(entry["values"])
        for key in entry["tensors"]:
            # Only fused and capturable optimizers count their steps on the device.
            on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
            state[key] = tensors[f"{_PREFIX}{name}/{key}"].to("cpu" if on_host else parameter.device, copy=True)
        if state:
            optimizer.state[parameter] = state


def rng_tensors() -> dict[str, Tensor]:
    """Random states of Python, numpy, torch on the CPU and, if there is one, on this process's GPU."""
    version, words, gauss = random.getstate()
    numpy_state: Any = np.random.get_state(legacy=False)
    if numpy_state["bit_generator"] != "MT19937":
        raise ValueError(f"numpy's global generator is {numpy_state['bit_generator']}, not the MT19937 it comes with")
    state = {
        "rng/python": torch.tensor([version, *words], dtype=torch.int64),
        "rng/python_gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "rng/numpy": torch.tensor(
            [*numpy_state["state"]["key"].tolist(), numpy_state["state"]["pos"]], dtype=torch.int64
        ),
        "rng/numpy_gauss": torch.tensor([numpy_state["has_gauss"], numpy_state["gauss"]], dtype=torch.float64),
        "rng/torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["rng/cuda"] = torch.cuda.get_rng_state()
    return state


def restore_rng(tensors: Mapping[str, Tensor]) -> list[str]:
    """Put back what `rng_tensors` gave; returns the names without a place here (a GPU's state without a GPU).

    Raises PreflightError when a state is missing.
    """
    needed = ["rng/python", "rng/python_gauss", "rng/numpy", "rng/numpy_gauss", "rng/torch"]
    if missing := [name for name in needed if name not in tensors]:
        raise PreflightError(f"the checkpoint lacks random states: {', '.join(missing)}")
    version, *words = tensors["rng/python"].tolist()
    gauss = tensors["rng/python_gauss"].tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    *key, position = tensors["rng/numpy"].tolist()
    has_gauss, cached = tensors["rng/numpy_gauss"].tolist()
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, int(has_gauss), cached))
    torch.set_rng_state(tensors["rng/torch"])
    if "rng/cuda" in tensors and not torch.cuda.is_available():
        return ["rng/cuda"]
    if "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"])
    return []


def _owners(
    optimizers: Optimizer | Iterable[Optimizer], names: Mapping[nn.Parameter, str]
) -> dict[str, tuple[nn.Parameter, Optimizer, dict[str, Any]]]:
    """Parameter, optimizer and group of each name. Raises ValueError for a parameter with no name or two groups."""
    owners: dict[str, tuple[nn.Parameter, Optimizer, dict[str, Any]]] = {}
    for optimizer in [optimizers] if isinstance(optimizers, Optimizer) else optimizers:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter not in names:
                    raise ValueError(f"an optimized parameter of shape {list(parameter.shape)} has no name")
                if names[parameter] in owners:
                    raise ValueError(f"{names[parameter]} belongs to two optimizer groups")
                owners[names[parameter]] = (parameter, optimizer, group)
    return owners
