"""A checkpoint whose vocabulary is smaller than the tokenizer: rows for the tokens that were added.

Special tokens of a chat template are added behind the tokens a model knows. Padded rows of its embeddings are used
first; when there are not enough of them, embeddings and output layer grow to the next multiple. A new row begins as the
mean of the rows that mean something: a row of noise, or of the zeros of padding, would give a new token logits far from
those of any other. The trap: rows are new once. A checkpoint says how many tokens it was trained with
(`unpadded_vocab_size`), so a resumed run, or a later stage with the same tokenizer, finds nothing to do.
"""

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from cheaptrain.errors import PreflightError, RecipeError


@dataclass(frozen=True)
class Growth:
    """`known` rows mean something, ids up to `tokens` are wanted, of `rows_before` rows there become `rows_after`."""

    known: int
    tokens: int
    rows_before: int
    rows_after: int

    def __str__(self) -> str:
        padded = min(self.tokens, self.rows_before) - self.known
        grown = f"{self.rows_before:,} -> {self.rows_after:,} rows" if self.grows else f"{self.rows_before:,} rows stay"
        return (
            f"vocabulary: {self.tokens - self.known:,} new tokens from id {self.known:,} on, {padded:,} of them in "
            f"padded rows ({grown}); each begins as the mean of the {self.known:,} others"
        )

    @property
    def grows(self) -> bool:
        """Are there not enough padded rows?"""
        return self.rows_after > self.rows_before


def plan_growth(fields: dict[str, Any], tokenizer_size: int | None, tokens: int, multiple: int) -> Growth | None:
    """What a checkpoint needs for a tokenizer of `tokens`; None: nothing.

    `fields` of its config.json; `tokenizer_size`: of the tokenizer that lies with it, if one does.
    """
    rows = fields.get("vocab_size")
    if rows is None:  # the default of its class
        return None
    known = min(fields.get("unpadded_vocab_size") or tokenizer_size or rows, rows)
    if known >= tokens:
        return None
    return Growth(known, tokens, rows, rows if tokens <= rows else -(-tokens // multiple) * multiple)


def size_of_tokenizer(path: str) -> int | None:
    """Ids of the tokenizer.json at `path`, None when there is none that can be read."""
    try:
        return max(Tokenizer.from_file(path).get_vocab().values()) + 1
    except Exception:  # tokenizers raises Exception itself; who needs this tokenizer says what is wrong with it
        return None


def grow(model: PreTrainedModel, growth: Growth) -> None:
    """Make and fill the new rows, in place. Raises RecipeError when the model has no embeddings that can grow."""
    if growth.grows:
        try:
            model.resize_token_embeddings(growth.rows_after, mean_resizing=False)
        except (NotImplementedError, AttributeError, ValueError) as error:
            raise RecipeError(f"model: the vocabulary of {type(model).__name__} cannot grow: {error}") from error
    model.config.vocabulary_growth = {"new_tokens": growth.tokens - growth.known, "from_id": growth.known}
    stop = growth.rows_after if growth.grows else growth.tokens
    done: set[int] = set()
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        for parameter in module.parameters() if module is not None else ():
            if id(parameter) in done:
                continue  # tied
            done.add(id(parameter))
            if parameter.shape[0] != growth.rows_after:
                raise PreflightError(f"model: {type(model).__name__} has {parameter.shape[0]:,} rows after growing")
            with torch.no_grad():
                parameter[growth.known : stop] = parameter[: growth.known].mean(dim=0)
