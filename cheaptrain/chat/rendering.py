"""Conversations to token ids and mask, together, part by part.

Markers go in by id; all other text is encoded with special tokens off, so a literal `<|im_end|>` in a question stays
text. A supervised part is encoded by itself, because the model meets it behind a finished header: where text as a whole
would merge header and answer into one token, the parts are what generation sees (such conversations are counted).

A conversation longer than a row loses whole turns from its end, so that it still ends with an answer; when not even its
first exchange fits, it is left out. Both are counted. This module imports neither transformers nor torch (a foreign
template does, when it is used): workers start fast.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from cheaptrain.chat.conversation import Conversation
from cheaptrain.chat.templates import Part
from cheaptrain.data.encode import Encoded, Encoder

VERSION = 1  # of how conversations become tokens; another one is another folder of prepared tokens
_HEADER_CHARACTERS, _BOUNDARY_CHARACTERS = 16, 64  # that are looked at for whether a header and its answer merge


class ChatTemplate(Protocol):
    """What rendering needs of a template."""

    def parts(self, conversation: Conversation) -> list[Part]: ...

    def refusal(self, conversation: Conversation) -> str | None: ...

    @property
    def jinja(self) -> str: ...


@dataclass(frozen=True)
class ChatSpec:
    """What a worker needs to render. `marker_ids`: id of each special token. `seq_len`: tokens a row."""

    template: ChatTemplate
    marker_ids: dict[str, int]
    seq_len: int


class Renderer:
    """Renders batches of conversations."""

    def __init__(self, encoder: Encoder, spec: ChatSpec) -> None:
        self._encoder, self._spec = encoder, spec
        self._merging: dict[tuple[str, str], bool] = {}  # whether a header merges with an ordinary answer
        self._longest = spec.seq_len + 1  # inputs of a whole row, and the last target

    def refusal(self, conversation: Conversation) -> str | None:
        """Why this conversation cannot be rendered, if it cannot."""
        return self._spec.template.refusal(conversation)

    def encode(self, conversations: Sequence[Conversation]) -> Encoded:
        """All conversations, cut to what fits a row; what cannot be cut to fit has no tokens."""
        whole, merging = self._assembled(conversations)
        lengths, cut = whole.lengths, np.zeros(len(conversations), bool)
        too_long = np.flatnonzero(lengths > self._longest)
        if not len(too_long):
            return whole._replace(cut=cut, merging=merging)
        assert whole.mask is not None
        ends = np.cumsum(lengths)
        pieces = [
            (whole.ids[stop - length : stop], whole.mask[stop - length : stop])
            for stop, length in zip(ends, lengths, strict=True)
        ]
        for index in too_long.tolist():
            shorter = self._shortened(conversations[index])
            cut[index] = shorter is not None
            pieces[index] = shorter or (whole.ids[:0], whole.mask[:0])
            lengths[index] = len(pieces[index][0])
        ids, mask = (np.concatenate(column) for column in zip(*pieces, strict=True))
        return Encoded(ids, lengths, mask, cut, merging & (lengths > 0))

    def _shortened(self, conversation: Conversation) -> tuple[NDArray[np.unsignedinteger], NDArray[np.uint8]] | None:
        """The most turns from the beginning that fit and end with an answer; None when there are none."""
        turns = conversation.turns
        ends = [number for number, turn in enumerate(turns, 1) if turn.role == "assistant"]
        found, low, high = None, 0, len(ends)  # ends[:low] fit, ends[high:] do not
        while low < high:
            middle = (low + high) // 2
            rendered, _ = self._assembled([Conversation(turns[: ends[middle]], conversation.tools)])
            if len(rendered.ids) <= self._longest:
                assert rendered.mask is not None
                found, low = (rendered.ids, rendered.mask), middle + 1
            else:
                high = middle
        return found

    def _assembled(self, conversations: Iterable[Conversation]) -> tuple[Encoded, NDArray[np.bool_]]:
        """Conversations as they are, however long; and in which of them an answer would merge with its header."""
        rendered = [self._spec.template.parts(conversation) for conversation in conversations]
        parts = [part for of_one in rendered for part in of_one]
        is_marker = np.array([part.marker for part in parts], bool)
        supervised = np.array([part.supervised for part in parts], bool)
        texts, text_lengths = self._encoder.pieces([part.text for part in parts if not part.marker])
        lengths = np.ones(len(parts), np.int64)
        lengths[~is_marker] = text_lengths
        of_marker = np.repeat(is_marker, lengths)
        ids = np.empty(len(of_marker), texts.dtype)
        ids[~of_marker] = texts
        ids[of_marker] = [self._spec.marker_ids[part.text] for part in parts if part.marker]
        owner = np.repeat(np.arange(len(rendered)), [len(of_one) for of_one in rendered])
        tokens = np.bincount(owner, lengths, len(rendered)).astype(np.int64)
        mask = np.repeat(supervised, lengths).astype(np.uint8)
        return Encoded(ids, tokens, mask), np.array([self._merges(of_one) for of_one in rendered], bool)

    def _merges(self, parts: list[Part]) -> bool:
        """Whether text as a whole would have other tokens where an answer begins."""
        for before, part in pairwise(parts):
            if part.supervised and not (part.marker or before.marker):
                header, answer = before.text[-_HEADER_CHARACTERS:], part.text[:_BOUNDARY_CHARACTERS]
                ordinary = " A" if answer.startswith(" ") else "A"
                if (header, ordinary) not in self._merging:
                    self._merging[header, ordinary] = self._differ(header, ordinary)
                if self._merging[header, ordinary] or (
                    answer[:2].strip() != answer[:2] and self._differ(header, answer)
                ):
                    return True
        return False

    def _differ(self, before: str, after: str) -> bool:
        whole, _ = self._encoder.pieces([before + after])
        apart, _ = self._encoder.pieces([before, after])
        return not np.array_equal(whole, apart)
