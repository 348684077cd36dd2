"""Tiny models and packed rows for the tests of cheaptrain.model."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.build import build_model
from cheaptrain.model.parts import decoder, head
from cheaptrain.recipe.schema import Model

TINY = ["tiny-qwen3", "tiny-llama", "tiny-llama4", "tiny-gpt2"]
LAYOUTS = [[7, 12, 1, 12], [20, 12], [32]]  # lengths of the documents of three rows
VOCAB = 500


def build(
    spec: str | Model = "tiny-qwen3", *, vocab_size: int = VOCAB, seq_len: int = 32, seed: int = 1
) -> PreTrainedModel:
    model = Model(preset=spec) if isinstance(spec, str) else spec
    return build_model(model, vocab_size=vocab_size, seq_len=seq_len, seed=seed, eot_id=3)


def tokens(layouts: list[list[int]] = LAYOUTS, seed: int = 0) -> Tensor:
    shape = (len(layouts), sum(layouts[0]))
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def positions_and_documents(layouts: list[list[int]] = LAYOUTS) -> tuple[Tensor, Tensor]:
    positions = torch.stack([torch.cat([torch.arange(n) for n in layout]) for layout in layouts])
    documents = torch.stack([torch.arange(len(la)).repeat_interleave(torch.tensor(la)) for la in layouts])
    return positions, documents.to(torch.int32)


def packed_logits(model: PreTrainedModel, ids: Tensor, layouts: list[list[int]] = LAYOUTS) -> Tensor:
    positions, documents = positions_and_documents(layouts)
    output = decoder(model)(input_ids=ids, position_ids=positions, **attention_inputs(documents, True))
    return head(model)(output.last_hidden_state)


def separate_logits(twin: PreTrainedModel, ids: Tensor, layouts: list[list[int]] = LAYOUTS) -> Tensor:
    rows = [
        torch.cat([twin(part[None]).logits[0] for part in row.split(la)]) for row, la in zip(ids, layouts, strict=True)
    ]
    return torch.stack(rows)
