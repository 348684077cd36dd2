"""Mean losses and greedy matches of many rows, in few forward passes.

Rows that share what comes before their scored tokens (the choices of a question) share its forward pass: the keys and
values of the prefix are computed once, then the endings read them. Rows are sorted by length and batched up to a number
of tokens, and logits are made only where they are compared: with a vocabulary of 50,000 and ten examples before every
question, logits at all positions would be most of the work.

The trap is the position: an ending counts on from the last token of its own prefix, not from the padding after it, so
positions are passed where there is padding before, never assumed.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from cheaptrain.evaluate.core.spans import Row

_LOGITS_AT_ONCE = 2**26  # values: 256 MiB in float32


@dataclass(frozen=True)
class Scored:
    """`loss`: mean over the scored tokens, in nats, NaN where there is none. `greedy`: each is the likeliest."""

    loss: float
    greedy: bool


@dataclass(frozen=True)
class _Group:
    """Endings after one prefix: `places[n]` are the rows that have `endings[n]`."""

    prefix: tuple[int, ...]
    endings: tuple[tuple[int, ...], ...]

    @property
    def read(self) -> int:
        """Tokens of the longest ending that the model reads: its last one is only compared."""
        return max(len(ending) for ending in self.endings) - 1


Key = tuple[tuple[int, ...], tuple[int, ...]]


def score_rows(model: PreTrainedModel, rows: Sequence[Row], tokens_at_once: int) -> list[Scored]:
    """Score rows that fit (`Row.fits`), each `[tokens]`; the result is in their order.

    `tokens_at_once`: padded tokens of a forward pass; a batch that does not fit into memory is halved. Raises
    torch.OutOfMemoryError when a single group of rows does not fit.
    """
    keys = [(row.tokens[: row.start], row.tokens[row.start :]) for row in rows]
    found: dict[Key, Scored] = {key: Scored(math.nan, True) for key in keys if not key[1]}
    for batch in _batches(_groups(keys), tokens_at_once, model.config.get_text_config().vocab_size):
        found |= _halved_if_too_large(model, batch)
    return [found[key] for key in keys]


def _groups(keys: Sequence[Key]) -> list[_Group]:
    endings: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for prefix, ending in keys:
        if ending:
            endings.setdefault(prefix, {})[ending] = None
    return [_Group(prefix, tuple(each)) for prefix, each in endings.items()]


def _batches(groups: list[_Group], tokens_at_once: int, vocabulary: int) -> Iterator[list[_Group]]:
    """Groups of one kind (one ending or several) and of like length together, the longest first."""
    groups.sort(key=lambda group: (len(group.endings) == 1, len(group.prefix), group.read), reverse=True)
    batch: list[_Group] = []
    for group in groups:
        grown = [*batch, group]
        alike = (len(group.endings) == 1) == (len(grown[0].endings) == 1)
        rows = sum(len(each.endings) for each in grown)
        longest = max(each.read for each in grown)
        read = len(grown) * max(len(each.prefix) for each in grown) + rows * longest
        if batch and not (alike and read <= tokens_at_once and rows * (longest + 1) * vocabulary <= _LOGITS_AT_ONCE):
            yield batch
            grown = [group]
        batch = grown
    if batch:
        yield batch


def _halved_if_too_large(model: PreTrainedModel, batch: list[_Group]) -> dict[Key, Scored]:
    try:
        return _scored(model, batch)
    except torch.OutOfMemoryError:
        if len(batch) == 1:
            raise
    half = len(batch) // 2  # outside the except: the error holds the tensors of the failed pass
    return _halved_if_too_large(model, batch[:half]) | _halved_if_too_large(model, batch[half:])


@torch.no_grad()
def _scored(model: PreTrainedModel, batch: list[_Group]) -> dict[Key, Scored]:
    """Score the groups of a batch: in one pass when each has one ending, else prefixes first, then endings."""
    rows = [(place, ending) for place, group in enumerate(batch) for ending in group.endings]
    if len(rows) == len(batch):
        losses, likeliest = _alone(model, batch)
    else:
        losses, likeliest = _shared(model, batch, rows)
    lengths = [len(ending) for _, ending in rows]
    each = zip(losses.cpu().split(lengths), likeliest.cpu().split(lengths), strict=True)
    scores = [Scored(loss.mean().item(), bool(match.all())) for loss, match in each]
    return {(batch[place].prefix, ending): score for (place, ending), score in zip(rows, scores, strict=True)}


def _alone(model: PreTrainedModel, batch: list[_Group]) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each ending token, and whether it is the likeliest, each `[all ending tokens]`, in one pass. Padded on
    the right: no token reads what comes after it, and there is nothing to mask."""
    sequences = [group.prefix + group.endings[0][:-1] for group in batch]
    longest = max(map(len, sequences))
    ids = torch.tensor([[*each, *[0] * (longest - len(each))] for each in sequences])
    column = torch.arange(longest)
    first = torch.tensor([len(group.prefix) - 1 for group in batch])[:, None]
    last = torch.tensor([len(each) - 1 for each in sequences])[:, None]
    logits = _logits_at(model, (column >= first) & (column <= last), input_ids=ids.to(model.device), use_cache=False)
    return _compared(logits, [token for group in batch for token in group.endings[0]])


def _shared(
    model: PreTrainedModel, batch: list[_Group], rows: list[tuple[int, tuple[int, ...]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_alone`: the first token of each ending from a pass of the prefixes, the others from a pass of the endings
    over the keys and values of their prefixes.

    Prefixes are padded on the right, which needs no mask in their own pass and is masked in that of the endings. Only a
    model of which a layer sees a window must have each ending right after its prefix: there they are padded on the
    left.
    """
    windowed = getattr(model.config.get_text_config(), "sliding_window", None) is not None
    longest = max(len(group.prefix) for group in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask, last = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for row, group in enumerate(batch):
        start = longest - len(group.prefix) if windowed else 0
        columns = slice(start, start + len(group.prefix))
        ids[row, columns], mask[row, columns] = torch.tensor(group.prefix), 1
        last[row, columns.stop - 1] = True
    mask = mask.to(model.device)
    cache = DynamicCache(config=model.config)
    needed = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if windowed else {}
    logits = _logits_at(
        model, last, input_ids=ids.to(model.device), past_key_values=cache, use_cache=True, **needed
    )  # [groups, vocabulary]
    places = torch.tensor([place for place, _ in rows], device=model.device)
    losses, likeliest = _compared(logits, [ending[0] for _, ending in rows], places)
    read = max(len(ending) for _, ending in rows) - 1
    if read == 0:
        return losses, likeliest

    tokens = torch.tensor([[*ending[:-1], *[0] * (read + 1 - len(ending))] for _, ending in rows])
    lengths = torch.tensor([len(ending) - 1 for _, ending in rows])
    cache.batch_select_indices(places)
    before = mask[places]
    logits = _logits_at(
        model,
        torch.arange(read) < lengths[:, None],
        input_ids=tokens.to(model.device),
        attention_mask=torch.cat([before, before.new_ones(len(rows), read)], dim=1),
        position_ids=before.sum(1, keepdim=True) + torch.arange(read, device=model.device),
        past_key_values=cache,
        use_cache=True,
    )
    more, likeliest_of_more = _compared(logits, [token for _, ending in rows for token in ending[1:]])
    # The first tokens, each before the others of its ending.
    counts = lengths.to(losses.device)
    number = torch.arange(len(rows), device=losses.device)
    order = torch.cat([number, number.repeat_interleave(counts)]).argsort(stable=True)
    return torch.cat([losses, more])[order], torch.cat([likeliest, likeliest_of_more])[order]


def _logits_at(model: PreTrainedModel, wanted: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Logits `[positions, vocabulary]` at the positions where `wanted` `[rows, columns]`, row by row. The head is given
    those positions alone; what a model does to its logits after the head, it does to each."""
    head = model.get_output_embeddings()
    if head is None:
        logits: torch.Tensor = model(**inputs).logits
        return logits[wanted.to(logits.device)]

    def select(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return given[0][wanted.to(given[0].device)].unsqueeze(0), *given[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        return model(**inputs).logits[0]  # type: ignore[no-any-return]
    finally:
        handle.remove()


def _compared(
    logits: torch.Tensor, targets: Sequence[int], places: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each target and whether it is the likeliest. `places`: which row of logits each is compared with; by
    default its own."""
    wanted = torch.tensor(targets, device=logits.device)
    rows = torch.arange(len(wanted), device=logits.device) if places is None else places.to(logits.device)
    chosen = logits.float()[rows, wanted]
    return logits.float().logsumexp(-1)[rows] - chosen, logits.argmax(-1)[rows] == wanted
