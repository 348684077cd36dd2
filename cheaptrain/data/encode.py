"""Texts to token ids, as fast as the tokenizers library goes, with literal special tokens kept as text.

A web page that quotes `<|endoftext|>` must not end a document, so documents are encoded by a copy of the tokenizer in
which special tokens are never recognised in text. Added tokens that are not special (a vocabulary somebody extended)
are meant to be found in text and still are. The trap: tokenizers flag as special only what their author flagged, and a
Unigram model may hold `</s>` as an ordinary piece; so every id that means something to the trainer is forced special
in the copy, and ids that come out are checked once more. This module imports neither transformers nor torch: workers
start fast.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cheaptrain.errors import PreflightError


@dataclass(frozen=True)
class EncoderSpec:
    """What a worker needs to encode. `backend`: the tokenizer as JSON; `special_ids`: ids no text may turn into."""

    backend: str
    special_ids: tuple[int, ...]
    eot_id: int
    bos_id: int | None
    size: int

    @property
    def added(self) -> int:
        """Tokens that every document gets besides those of its text."""
        return 1 if self.bos_id is None else 2

    @property
    def dtype(self) -> "np.dtype[np.unsignedinteger]":
        """uint16 where every id fits, else uint32; little-endian on disk."""
        return np.dtype("<u2" if self.size <= 2**16 else "<u4")


def plain_text_backend(backend: str, special_tokens: frozenset[str]) -> str:
    """The tokenizer's JSON for encoding documents: `special_tokens` flagged special, no truncation, no padding."""
    content = json.loads(backend)
    content["truncation"] = content["padding"] = None
    for token in content["added_tokens"]:
        token["special"] = token["special"] or token["content"] in special_tokens
    return json.dumps(content, ensure_ascii=False)


class Encoder:
    """Encodes batches of documents into one array: [bos] ids end-of-text, [bos] ids end-of-text, ..."""

    def __init__(self, spec: EncoderSpec) -> None:
        self.spec = spec
        self._tokenizer = Tokenizer.from_str(spec.backend)
        self._tokenizer.encode_special_tokens = True
        self._special = np.zeros(spec.size, bool)
        self._special[list(spec.special_ids)] = True

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Token ids [tokens] of all texts end to end, and the tokens of each text [texts], added ones included.

        Raises PreflightError if the tokenizer turns text into a special token all the same.
        """
        ids, lengths = self.pieces(texts)
        ids = np.insert(ids, np.cumsum(lengths), self.spec.eot_id)
        lengths = lengths + 1
        if self.spec.bos_id is not None:
            ids = np.insert(ids, np.cumsum(lengths) - lengths, self.spec.bos_id)
            lengths += 1
        return ids, lengths

    def pieces(self, texts: Sequence[str]) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """As `encode`, with nothing added."""
        if not texts:
            return np.empty(0, self.spec.dtype), np.empty(0, np.int64)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        lengths = np.fromiter(map(len, encodings), np.int64, len(encodings))
        ends = np.cumsum(lengths)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), self.spec.dtype, int(ends[-1]))
        found = np.flatnonzero(self._special[ids])
        if len(found):
            text = texts[int(np.searchsorted(ends, found[0], side="right"))]
            token = self._tokenizer.id_to_token(int(ids[found[0]]))
            raise PreflightError(
                f"the tokenizer turns plain text into its special token {token!r}, in the document that begins "
                f"{text[:60]!r}; take that literal out of the text, or choose a tokenizer.path whose model lacks it"
            )
        return ids, lengths


class Encoded(NamedTuple):
    """Documents as they are written: `ids` end to end [tokens], the tokens of each document [documents] (0: left out),
    and, of conversations, the mask [tokens], which documents were cut and in how many a header would have merged with
    the answer, bool [documents]."""

    ids: NDArray[np.unsignedinteger]
    lengths: NDArray[np.int64]
    mask: NDArray[np.uint8] | None = None
    cut: NDArray[np.bool_] | None = None
    merging: NDArray[np.bool_] | None = None


def encode_texts(encoder: Encoder, texts: Sequence[str]) -> Encoded:
    """Texts as documents; those of which nothing is left (a tokenizer may make nothing of spaces) have no tokens."""
    ids, lengths = encoder.encode(texts)
    filled = lengths > encoder.spec.added
    if not filled.all():
        ids = ids[np.repeat(filled, lengths)]
        lengths = np.where(filled, lengths, 0)
    return Encoded(ids, lengths)
