"""Proofs, run on the model in hand before it trains: what would otherwise only show as a slightly worse loss.

Documents: a packed row must give each document the logits it has alone, under transformers' own attention. This
catches a model class that goes round our attention function, that lets state leak past it (a convolution, a
recurrence), or that does not use position_ids. Head: the fused loss computes `hidden @ head.weight.T` itself, so the
model must do nothing else to its logits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from cheaptrain.errors import CheaptrainError, PreflightError
from cheaptrain.model.attention import attention_inputs
from cheaptrain.model.parts import decoder, head
from cheaptrain.model.twin import plain_twin

__all__ = ["plain_twin", "prove_documents_isolated", "prove_head"]

Layouts = list[list[int]]  # lengths of the documents of each row

_LAYOUTS: Layouts = [[1, 9, 5, 1, 16, 8], [23, 17]]


def prove_documents_isolated(
    model: PreTrainedModel, *, document_mask: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32
) -> float:
    """Prove that packed documents do not see each other and get their logits; returns the largest difference found.

    `dtype` is what training computes in (autocast). The allowed difference is relative to the largest logit: 1e-4 in
    fp32 on a CPU, 5e-3 in fp32 on a GPU (TF32), 5e-2 in half precision; tokens of other documents may move nothing
    beyond 1e-6 (1e-3 in half precision). With `document_mask` off, rows as wholes are compared instead. Raises
    PreflightError naming the model class and the difference; draws no random number from the global generators.
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = getattr(model.config, "unpadded_vocab_size", model.config.vocab_size)
    seq = min(sum(_LAYOUTS[0]), getattr(model.config, "max_position_embeddings", None) or sum(_LAYOUTS[0]))
    layouts, whole_rows = [_cut(layout, seq) for layout in _LAYOUTS], [[seq] for _ in _LAYOUTS]
    tokens = torch.randint(0, vocabulary, (len(layouts), seq), generator=generator)
    twin = _or_refuse(plain_twin, model)
    _or_refuse(head, model)
    with _evaluating(model, dtype):
        rows, rows_alone = _packed_logits(model, tokens, whole_rows), _separate_logits(twin, tokens, whole_rows)
        difference, moved = (rows - rows_alone).abs().max().item(), 0.0
        if document_mask:
            packed, alone = _packed_logits(model, tokens, layouts), _separate_logits(twin, tokens, layouts)
            difference = max(difference, (packed - alone).abs().max().item())
            moved = _leak(model, tokens, packed, layouts, generator, vocabulary)
    scale = max(1.0, rows_alone.abs().max().item())
    fp32 = dtype == torch.float32
    allowed = scale * ((1e-4 if rows.device.type == "cpu" else 5e-3) if fp32 else 5e-2)
    leak_allowed = scale * (1e-6 if fp32 else 1e-3)

    name = type(model).__name__
    if not moved <= leak_allowed:
        raise PreflightError(
            f"{name}: documents in one row see each other: other tokens in one of them move the logits of another by "
            f"{moved:.1e} (allowed {leak_allowed:.1e}). This model class cannot train on packed rows; take another, "
            "or set data.document_mask = false and accept it"
        )
    if not difference <= allowed:
        what = "packed documents get other logits than alone" if document_mask else "rows get wrong logits"
        raise PreflightError(
            f"{name}: {what}: they differ by {difference:.1e} (allowed {allowed:.1e}) from transformers' attention. "
            "This model class goes round the registered attention function, or does not use position_ids as given"
        )
    return difference


def prove_head(model: PreTrainedModel) -> float:
    """Prove that logits are what the output layer gives and nothing more; returns the largest relative difference.

    Its input is blown up until logits reach about 50, where a soft-cap would show. Raises PreflightError.
    """
    twin = _or_refuse(plain_twin, model)
    weight = _or_refuse(head, model).weight
    tokens = torch.arange(8, device=weight.device)[None] % model.config.vocab_size
    expected: list[Tensor] = []

    def enlarge(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor]:
        plain = F.linear(arguments[0], weight)
        factor = 50 / plain.abs().max().clamp_min(1e-6)
        expected.append(plain * factor)
        return (arguments[0] * factor,)

    with torch.no_grad():
        head(twin).register_forward_pre_hook(enlarge)
        logits = twin(input_ids=tokens, use_cache=False).logits
    difference = (logits.float() - expected[0].float()).abs().max().item() / 50
    if not difference <= (1e-3 if weight.dtype == torch.float32 else 2e-2):  # products of bf16 are off by 0.4 %
        raise PreflightError(
            f"{type(model).__name__}: its logits are not what its output layer gives (off by {difference:.0%}): "
            "it scales or caps them, which the loss here does not do; take a model class without that"
        )
    return difference


def _or_refuse(part: Callable[[PreTrainedModel], Any], model: PreTrainedModel) -> Any:
    try:
        return part(model)
    except CheaptrainError as error:
        raise PreflightError(str(error)) from error


def _packed_logits(model: PreTrainedModel, tokens: Tensor, layouts: Layouts) -> Tensor:
    """Logits `[rows, seq, vocab]` of packed rows, the way training computes them."""
    device = head(model).weight.device
    positions = torch.stack([torch.cat([torch.arange(n) for n in layout]) for layout in layouts])
    documents = torch.stack([torch.arange(len(la)).repeat_interleave(torch.tensor(la)) for la in layouts])
    inputs = attention_inputs(documents.to(torch.int32), True, device)
    output = decoder(model)(input_ids=tokens.to(device), position_ids=positions.to(device), **inputs)
    return head(model)(output.last_hidden_state).float()


def _separate_logits(twin: PreTrainedModel, tokens: Tensor, layouts: Layouts) -> Tensor:
    """The same logits, each document on its own, the way transformers computes them."""
    device = head(twin).weight.device
    rows = []
    for row, layout in zip(tokens.to(device), layouts, strict=True):
        parts = [twin(input_ids=part[None], use_cache=False).logits[0] for part in row.split(layout)]
        rows.append(torch.cat(parts))
    return torch.stack(rows).float()


def _leak(
    model: PreTrainedModel,
    tokens: Tensor,
    logits: Tensor,
    layouts: Layouts,
    generator: torch.Generator,
    vocabulary: int,
) -> float:
    """How far logits move when every second document gets other tokens, measured on the documents left alone."""
    poisoned = torch.stack([(torch.arange(len(la)) % 2 == 0).repeat_interleave(torch.tensor(la)) for la in layouts])
    shift = torch.randint(1, max(2, vocabulary), tokens.shape, generator=generator)
    changed = torch.where(poisoned, (tokens + shift) % vocabulary, tokens)
    moved = (_packed_logits(model, changed, layouts) - logits).abs()
    return moved[~poisoned.to(moved.device)].max().item()


def _cut(layout: list[int], seq: int) -> list[int]:
    """The first `seq` tokens of a row of documents of these lengths."""
    ends = [min(end, seq) for end in accumulate(layout)]
    return [end - start for start, end in zip([0, *ends], ends, strict=False) if end > start]


@contextmanager
def _evaluating(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """No dropout, no gradient, the precision of training; the model's mode is put back."""
    was_training = model.training
    device = head(model).weight.device.type
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device, dtype, enabled=dtype != torch.float32):
            yield
    except CheaptrainError as error:
        raise PreflightError(str(error)) from error
    finally:
        model.train(was_training)
