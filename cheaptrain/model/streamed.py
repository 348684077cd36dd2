"""A model run from its folder alone, without ever holding all of it.

What a checkpoint is besides its weights (config, generation settings, tokenizer) is the same in every save of a run.
So it is made once, as bytes, and so is an empty model of the class that transformers builds from it: its parameters
have shapes and no memory. A save writes the bytes; its proof runs the empty model, each layer's weights read when its
turn comes and dropped after it.

The trap is the place this runs in, a background thread beside training. Building a model there would change what is
global to the process (the device new tensors get, on which compiled layers keep watch, and how modules register
parameters), so the empty model is built before, on the training thread; running it touches nothing but its own hooks.
"""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model.parts import decoder_layers
from cheaptrain.model.saving import saved_config

_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SavedForm:
    """What checkpoints of a model are, its weights left out."""

    files: dict[str, bytes]  # by path in the folder
    empty: PreTrainedModel  # of the class and config that these files say


def saved_form(model: PreTrainedModel, write_more: Callable[[Path], Any] = lambda folder: None) -> SavedForm:
    """The form of checkpoints of `model`; `write_more` writes what else belongs into the folder (a tokenizer).

    Proven here, once: the files say the class and the token ids of the live model. Raises PreflightError otherwise.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        saved_config(model).save_pretrained(folder)
        assert model.generation_config is not None
        model.generation_config.save_pretrained(folder)
        write_more(folder)
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        empty = _empty_model(folder)
    there, here = _shapes(empty), _shapes(model)
    if there != here:
        differing = [name for name in {**there, **here} if there.get(name) != here.get(name)]
        raise PreflightError(
            f"{type(model).__name__}: what transformers builds from its saved config is another model: it differs in "
            f"{', '.join(differing[:3])}"
        )
    for part, key in product(("config", "generation_config"), _ENDS):
        if getattr(getattr(empty, part), key) != getattr(getattr(model, part), key):
            raise PreflightError(f"{key} of the saved {part} is not what it is in the live model")
    return SavedForm(files, empty)


@torch.no_grad()
def streamed_logits(form: SavedForm, folder: Path, ids: Tensor) -> Tensor:
    """Logits `[rows, seq, vocab]` of `ids` `[rows, seq]`, on the CPU, from the weights in `folder` under transformers'
    own attention. Raises CheaptrainError when names or shapes in it are not those of the model."""
    where = _where(folder)
    _check_names(form.empty, folder, where)
    with _weights_from(form.empty, folder, where):
        logits: Tensor = form.empty(ids.cpu(), use_cache=False).logits
    return logits


def _empty_model(folder: Path) -> PreTrainedModel:
    """The model that `folder` says, as anyone would get it: SDPA, fp32, evaluation mode; parameters on meta."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.random.fork_rng(devices=[]), init_empty_weights(include_buffers=False):
        empty: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, attn_implementation="sdpa"
        )
    empty.tie_weights()  # registering a parameter anew untied them
    empty.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return empty.eval()


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _where(folder: Path) -> dict[str, str]:
    """The file of each tensor, from the index that transformers reads, or the one file there is."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        table: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return table
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def _check_names(empty: PreTrainedModel, folder: Path, where: Mapping[str, str]) -> None:
    wanted = _shapes(empty) | {name: tuple(buffer.shape) for name, buffer in _saved_buffers(empty).items()}
    found: dict[str, tuple[int, ...]] = {}
    for name in sorted(set(where.values())):
        with safe_open(folder / name, "pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    wrong = [name for name in {**wanted, **found} if wanted.get(name) != found.get(name)]
    if wrong or found.keys() != where.keys():
        which = ", ".join(sorted(wrong)[:3]) or "the index"
        raise CheaptrainError(f"{folder}: its weights and its config do not belong together: {which}")


def _saved_buffers(model: nn.Module) -> dict[str, Tensor]:
    names = {name for name, _ in model.named_buffers()}
    return {name: tensor for name, tensor in model.state_dict().items() if name in names}


@contextmanager
def _weights_from(empty: PreTrainedModel, folder: Path, where: Mapping[str, str]) -> Iterator[None]:
    """While inside, `empty` has its embedding, final norm and head, and each decoder layer its weights during its own
    forward pass and no longer.

    What lies outside of the layers stays because transformers asks it for its device before it is called: a meta tensor
    there is no error, it makes the token ids nonsense.
    """
    layers = list(decoder_layers(empty))
    inside = {module for layer in layers for module in layer.modules()}
    outer = _Part([module for module in empty.modules() if module not in inside], empty)
    parts = [(layer, _Part(layer.modules(), empty)) for layer in layers]
    handles = []
    for layer, part in parts:
        handles.append(layer.register_forward_pre_hook(lambda *_, part=part: part.fill(folder, where)))
        handles.append(layer.register_forward_hook(lambda *_, part=part: part.empty_again(), always_call=True))
    buffers = _saved_buffers(empty)
    before = {name: buffer.clone() for name, buffer in buffers.items()}
    try:
        for name, buffer in buffers.items():
            buffer.copy_(_read(folder, where, name))
        outer.fill(folder, where)
        yield
    finally:
        outer.empty_again()
        for name, buffer in buffers.items():
            buffer.copy_(before[name])
        for handle in handles:
            handle.remove()


class _Part:
    """Modules whose parameters get their memory together. Tied ones share it."""

    def __init__(self, modules: Iterable[nn.Module], empty: PreTrainedModel) -> None:
        names = {id(parameter): name for name, parameter in empty.named_parameters()}
        self.slots = [
            (module, key, parameter, names[id(parameter)])
            for module in modules
            for key, parameter in module._parameters.items()
            if parameter is not None
        ]

    def fill(self, folder: Path, where: Mapping[str, str]) -> None:
        """Read the weights."""
        read = {name: nn.Parameter(_read(folder, where, name), requires_grad=False) for *_, name in self.slots}
        for module, key, _, name in self.slots:
            module._parameters[key] = read[name]

    def empty_again(self) -> None:
        """Drop them."""
        for module, key, parameter, _ in self.slots:
            module._parameters[key] = parameter


def _read(folder: Path, where: Mapping[str, str], name: str) -> Tensor:
    with safe_open(folder / where[name], "pt") as file:
        tensor: Tensor = file.get_tensor(name)
        # A copy: what the file gives is not aligned as memory is, and kernels may then round otherwise.
        return tensor.to(torch.float32, copy=True)
