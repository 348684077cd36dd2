"""What a model weighs and costs, without building it: parameters by part, and FLOPs a token.

Counted on meta tensors of the real class, so the figures are those of the model that will train. A tied output layer
is the embedding: it is counted once, there.
"""

from collections import Counter

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from cheaptrain.model.build import meta_model
from cheaptrain.model.config import model_config
from cheaptrain.model.lora import add_adapters
from cheaptrain.model.parts import decoder_layers
from cheaptrain.recipe import schema
from cheaptrain.recipe.resolve import ModelFacts


def model_facts(spec: schema.Model, vocab_size: int, seq_len: int, lora: schema.Lora | None = None) -> ModelFacts:
    """Parameters and FLOPs of the model of `spec` with a tokenizer of `vocab_size` tokens, on rows of `seq_len`.

    `by_part` has the parts that exist of embedding, attention, mlp, norms, head (absent when tied) and other. FLOPs of
    a trained token, forward and backward, are 6·N + 12·layers·heads·head_dim·seq_len, where N leaves out what is only
    looked up (an untied input embedding, learned positions) and counts of the experts of a layer those a token goes
    through. The attention term is that of full attention, the causal half not taken off: the usual convention for MFU.
    With adapters beside it the model's own weights need no gradient, which is 2·N less.
    """
    model = meta_model(model_config(spec, vocab_size=vocab_size, seq_len=seq_len))
    by_part: Counter[str] = Counter()
    for name, count in _parts(model).values():
        by_part[name] += count
    total = sum(p.numel() for p in model.parameters())
    matmul = sum(_used(p, model.config) for p in model.parameters()) - _looked_up(model)
    trained = add_adapters(model, lora, seed=0) if lora is not None else 0
    config = model.config
    width = config.num_attention_heads * (
        getattr(config, "head_dim", 0) or config.hidden_size // config.num_attention_heads
    )
    return ModelFacts(
        parameters=total,
        embedding_parameters=by_part["embedding"],
        by_part=dict(by_part),
        flops_per_token=float(
            (4 * matmul + 6 * trained if lora is not None else 6 * matmul)
            + 12 * config.num_hidden_layers * width * seq_len
        ),
        adapters=trained,
    )


def _parts(model: PreTrainedModel) -> dict[int, tuple[str, int]]:
    """Every parameter once (by its id): the part it belongs to and its size."""
    found: dict[int, tuple[str, int]] = {}

    def claim(module: nn.Module, part: str) -> None:
        for parameter in module.parameters():
            found.setdefault(id(parameter), (part, parameter.numel()))

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            claim(module, "embedding")
        elif "norm" in type(module).__name__.lower():
            claim(module, "norms")
    for layer in decoder_layers(model):
        for child in layer.children():
            claim(child, "attention" if "attention" in type(child).__name__.lower() else "mlp")
    claim(model.get_output_embeddings(), "head")
    claim(model, "other")
    return found


def _looked_up(model: PreTrainedModel) -> int:
    """Parameters that no matrix multiplication uses: embeddings, except the one that is the output layer too."""
    tied = model.get_output_embeddings().weight
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    return sum(weight.numel() for weight in tables if weight is not tied)


def _used(parameter: nn.Parameter, config: PreTrainedConfig) -> int:
    """How many of its numbers one token meets: all, or the share of the experts it is sent to (stored [experts, …])."""
    if parameter.dim() != 3:
        return parameter.numel()
    return parameter.numel() * config.num_experts_per_tok // parameter.shape[0]
