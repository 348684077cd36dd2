"""The parts of a model that training needs by name: decoder, layers, head, hidden matrices.

Every class of transformers calls them otherwise, and `base_model` or `get_decoder()` answer with the whole model for
some (Llama 4), so they are found by structure.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from cheaptrain.errors import CheaptrainError


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """The module whose forward pass gives `last_hidden_state` `[rows, seq, hidden]`, final norm included."""
    inner = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    if len(inner) != 1:
        raise CheaptrainError(f"{type(model).__name__}: expected one decoder inside it, found {len(inner)}")
    return inner[0]


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The stack of decoder layers, first to last."""
    count = model.config.num_hidden_layers
    lists = [m for m in decoder(model).modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise CheaptrainError(f"{type(model).__name__}: found no list of its {count} decoder layers")
    return lists[0]


def head(model: PreTrainedModel) -> nn.Linear:
    """The output layer: logits are `hidden @ head.weight.T`. Raises CheaptrainError if it is anything else."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) or layer.bias is not None:
        raise CheaptrainError(
            f"{type(model).__name__}: its output layer is {layer}, but the loss here needs a linear layer without bias"
        )
    return layer


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The trainable 2-D weights inside the decoder layers, in order: what Muon updates.

    GPT-2 stores them as `[in, out]` (Conv1D), every other class as `[out, in]`.
    """
    return [p for p in decoder_layers(model).parameters() if p.dim() == 2 and p.requires_grad]


@dataclass(frozen=True)
class LayerParts:
    """The modules of one decoder layer that can be split over processes, by the name of each inside the layer."""

    attention: str
    attention_in: tuple[str, ...]  # query, key, value projections: split by heads
    attention_out: str
    head_norms: tuple[str, ...]  # norms of queries and keys, applied to each head by itself
    mlp: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    norms: tuple[str, ...]


def layer_parts(layer: nn.Module) -> LayerParts:
    """Find them. Raises CheaptrainError naming what has no place: what is not split right would be trained wrong."""
    attention = mlp = None
    norms = []
    for name, child in layer.named_children():
        if hasattr(child, "q_proj") and hasattr(child, "o_proj"):
            attention = name
        elif hasattr(child, "gate_proj") and hasattr(child, "down_proj"):
            mlp = name
        elif [tuple(p.shape) for p in child.parameters()] and all(p.dim() == 1 for p in child.parameters()):
            norms.append(name)
        elif any(True for _ in child.parameters()):
            raise CheaptrainError(_no_plan(layer, f"{name} ({type(child).__name__})"))
    if attention is None or mlp is None:
        raise CheaptrainError(_no_plan(layer, "its attention or its MLP, which are not of separate projections"))
    parts = LayerParts(
        attention=attention,
        attention_in=("q_proj", "k_proj", "v_proj"),
        attention_out="o_proj",
        head_norms=tuple(name for name in ("q_norm", "k_norm") if hasattr(layer.get_submodule(attention), name)),
        mlp=mlp,
        mlp_in=("gate_proj", "up_proj"),
        mlp_out="down_proj",
        norms=tuple(norms),
    )
    known = {f"{attention}.{n}" for n in (*parts.attention_in, parts.attention_out, *parts.head_norms)}
    known |= {f"{mlp}.{n}" for n in (*parts.mlp_in, parts.mlp_out)} | set(norms)
    for name, _ in layer.named_parameters():
        if name.rpartition(".")[0] not in known:
            raise CheaptrainError(_no_plan(layer, name))
    return parts


def _no_plan(layer: nn.Module, what: str) -> str:
    return f"{type(layer).__name__} cannot be split with parallel.tp: there is no plan for {what}; use parallel.tp = 1"
