"""Optimizer moments as plain named tensors.

torch numbers an optimizer's parameters in the order they were handed over, so its own state_dict puts moments on the
wrong matrix, without a word, when groups are put together in another order. Here every moment is filed under its
parameter's name, and a name too many or too few is an error. Learning rates and other settings are not filed: they
come from the recipe. Nor are random states: every step seeds them anew.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from cheaptrain.checkpoint.tensor_files import Entry
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
    stored: Mapping[str, Entry],
    scalars: Mapping[str, Any],
    read: Callable[[Mapping[str, Tensor]], None],
) -> None:
    """Put back what `optimizer_tensors` gave, bit for bit, laid out and placed like each parameter.

    `stored` says what tensors there are, `read` fills those it is given by name. Raises PreflightError that names each
    parameter and tensor missing, left over, or of another shape or optimizer; then nothing was changed.
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
    wrong += [f"{name}: missing" for name in expected - stored.keys()]
    if not wrong:
        wrong += [f"{name}: belongs to no parameter" for name in stored.keys() - expected]
    if wrong:
        more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise PreflightError(f"the optimizer state does not fit this model: {'; '.join(sorted(wrong)[:10])}{more}")
    states = {
        name: {key: _room(stored[f"{_PREFIX}{name}/{key}"], key, parameter, group) for key in entries[name]["tensors"]}
        for name, (parameter, _, group) in owners.items()
    }
    read({f"{_PREFIX}{name}/{key}": room for name, state in states.items() for key, room in state.items()})
    for name, (parameter, optimizer, _) in owners.items():
        if state := {**entries[name]["values"], **states[name]}:
            optimizer.state[parameter] = state


def _room(stored: Entry, key: str, parameter: nn.Parameter, group: Mapping[str, Any]) -> Tensor:
    """An empty tensor for what is stored: laid out like the parameter when it has its shape, else whole everywhere."""
    if stored.shape == tuple(parameter.shape) and key != "step":
        return torch.empty_like(parameter, dtype=stored.dtype, requires_grad=False)
    # Only fused and capturable optimizers count their steps on the device.
    on_host = key == "step" and not (group.get("fused") or group.get("capturable"))
    return torch.empty(stored.shape, dtype=stored.dtype, device="cpu" if on_host else parameter.device)


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
