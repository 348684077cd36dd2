"""A packed row of conversations as text: what the model must produce stands between ⟦ and ⟧, in another colour.

Tokens are shown where they stand; whether one must be produced is said by the label of the position before it, because
that is where training asks for it. The last token of a conversation is the target of its last position and an input
nowhere: it is shown where it is a target. The trap: shading the positions that have a target instead would show every
answer one token too early, its first token grey and the header before it bright.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from rich.text import Text

from cheaptrain.data.rows import IGNORED, RowBatch
from cheaptrain.report.row_text import TokenText, visible

PRODUCED, NOT_PRODUCED = "⟦", "⟧"
_STYLES = {True: "bold green", False: "dim"}


@dataclass(frozen=True)
class Stretch:
    """Tokens of a conversation shown together: a special token, or text. `produced`: by the model."""

    text: str
    special: bool
    produced: bool


def chat_row(batch: RowBatch, row: int, padding_from: int, text: TokenText) -> Text:
    """One row, a conversation after the other; padding, from position `padding_from` on, is only counted."""
    shown = Text()
    ids, labels, documents = (t[row].numpy() for t in (batch.input_ids, batch.labels, batch.document_ids))
    for document in np.unique(documents[:padding_from]).tolist():
        of_it = np.flatnonzero(documents == document)
        start, stop = int(of_it[0]), int(of_it[-1]) + 1
        supervised = int((labels[start:stop] != IGNORED).sum())
        shown.append(f"|conversation {document}: {stop - start} positions, {supervised} with a target|", "reverse")
        shown.append("\n")
        produced = False
        for stretch in stretches(ids[start:stop], labels[start:stop], text):
            if stretch.produced != produced:
                shown.append(PRODUCED if stretch.produced else NOT_PRODUCED, "bold yellow")
                produced = stretch.produced
            style = _STYLES[stretch.produced]
            shown.append(visible(stretch.text), f"{style} magenta" if stretch.special else style)
        shown.append(f"{NOT_PRODUCED}\n" if produced else "\n", "bold yellow")
    if padding_from < len(ids):
        shown.append(f"|padding: {len(ids) - padding_from} positions|", "reverse")
    return shown


def stretches(ids: np.ndarray, labels: np.ndarray, text: TokenText) -> Iterator[Stretch]:
    """The tokens of one conversation: its inputs [positions], and behind them the last target, if it is one."""
    tokens = ids.tolist()
    produced = [False, *(labels[:-1] != IGNORED).tolist()]
    if labels[-1] != IGNORED:
        tokens, produced = [*tokens, int(labels[-1])], [*produced, True]
    run: list[int] = []
    for number, (token, wanted) in enumerate(zip(tokens, produced, strict=True)):
        special = token in text.specials
        if run and (special or wanted != produced[number - 1]):
            yield Stretch(text.of(run), False, produced[number - 1])
            run = []
        if special:
            yield Stretch(text.of([token]), True, wanted)
        else:
            run.append(token)
    if run:
        yield Stretch(text.of(run), False, produced[-1])
