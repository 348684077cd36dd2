"""Which tokens of a prompt are scored: found by comparing the prompts of a question as tokens, not as text.

A beginning-of-text token stands before every prompt, whether or not the tokenizer would put one there. Then
    multiple_choice   what follows the tokens that all choices begin with
    schema            the tokens that all options end with
    language_modeling what follows the prompt without its continuation
A prompt longer than the context of the model loses tokens on the left, each prompt by itself; how many questions lost
some is counted, never silent. The trap is the split in text: `Answer:` and ` A` may meet in one token, and two choices
may begin with the same token, which tells nothing of either and would dilute the mean.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One prompt as the model reads it: `tokens[start:]` are scored. None are when `start` is the length; the row
    cannot be scored when `start` is below 1: the scored tokens do not fit with one before them."""

    tokens: tuple[int, ...]
    start: int
    cropped: int = 0

    @property
    def fits(self) -> bool:
        return self.start >= 1


def rows_of(kind: str, encoded: Sequence[Sequence[int]], beginning: int, context: int) -> list[Row]:
    """The rows of a question from its prompts, encoded without special tokens. `beginning`: the token before them;
    `context`: tokens the model can read."""
    sequences = [(beginning, *tokens) for tokens in encoded]
    if kind == "multiple_choice":
        common = _common(sequences)
        starts = [common] * len(sequences)
    elif kind == "schema":
        common = _common([sequence[::-1] for sequence in sequences])
        starts = [len(sequence) - common for sequence in sequences]
    else:
        # Where the tokenizer joins the end of the prompt with what follows, only what is common was surely there.
        starts = [_common(sequences)]
        sequences = sequences[1:]
    return [_cropped(sequence, start, context) for sequence, start in zip(sequences, starts, strict=True)]


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    count = 0
    for tokens in zip(*sequences, strict=False):
        if len(set(tokens)) > 1:
            break
        count += 1
    return count


def _cropped(tokens: tuple[int, ...], start: int, context: int) -> Row:
    cropped = max(0, len(tokens) - context)
    return Row(tokens[cropped:], start - cropped, cropped)
