"""The parts of a model that training needs by name: decoder, layers, head, hidden matrices.

Every class of transformers calls them otherwise, and `base_model` or `get_decoder()` answer with the whole model for
some (Llama 4), so they are found by structure.
"""

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
