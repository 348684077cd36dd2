"""The tokenizer a recipe names: a hub id, a folder, a checkpoint, or one trained on the recipe's own text.

Everything prepared depends on the exact mapping from text to ids, so a tokenizer has a fingerprint: a hash of the
parts of its backend that decide ids, and of the ids that end and begin a document. The trap it avoids: truncation
settings, padding and the post-processor change from save to save without changing one id of a document; they stay out
of the hash.
"""

import copy
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cheaptrain.chat.foreign import ForeignTemplate
from cheaptrain.chat.rendering import ChatSpec, ChatTemplate
from cheaptrain.chat.templates import find_template
from cheaptrain.data.domain import tokens_of
from cheaptrain.data.encode import EncoderSpec, plain_text_backend
from cheaptrain.data.pieces import token_pieces
from cheaptrain.data.train_tokenizer import trained_folder
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

_OURS = "choose one of chatml, smollm2, llama3, plain"


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A transformers fast tokenizer and what preparing and training need to know of it.

    `size`: ids are below it; `eot_id` ends every document; `bos_id` begins one, if the tokenizer itself adds it.
    `template` renders the conversations of this recipe, `end_of_turn_id` ends their answers; `added` special tokens
    were put in for it, and `limits` is what the recipe says of what may be lost. `ordinary`: those of add_tokens.
    """

    hf: PreTrainedTokenizerBase
    fingerprint: str
    size: int
    eot_id: int
    bos_id: int | None
    template: ChatTemplate | None = None
    end_of_turn_id: int | None = None
    added: tuple[str, ...] = ()
    limits: schema.Chat | None = None
    ordinary: tuple[str, ...] = ()

    @cached_property
    def _backend(self) -> str:
        return str(self.hf.backend_tokenizer.to_str())

    @property
    def own_size(self) -> int:
        """Ids below it are the tokenizer's own; from there on there are only tokens that somebody added to it."""
        size, added = self.size, self.hf.backend_tokenizer.get_added_tokens_decoder()
        while size - 1 in added:
            size -= 1
        return size

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that no text may turn into: every special token but the one for unknown characters."""
        return tuple(sorted(_special_ids(self.hf, self.eot_id) - {self.hf.unk_token_id} | {self.eot_id}))

    @property
    def silent_ids(self) -> tuple[int, ...]:
        """Ids that stand for no text: every special token."""
        return tuple(sorted(_special_ids(self.hf, self.eot_id)))

    def encoder_spec(self) -> EncoderSpec:
        """What a worker needs to encode documents."""
        tokens = frozenset(self.hf.convert_ids_to_tokens(list(self.special_ids)))
        backend = plain_text_backend(self._backend, tokens)
        return EncoderSpec(backend, self.special_ids, self.eot_id, self.bos_id, self.size)

    def chat_spec(self, seq_len: int) -> ChatSpec | None:
        """What a worker needs to render conversations for rows of `seq_len` tokens."""
        if self.template is None:
            return None
        ids = sorted(_special_ids(self.hf, self.eot_id))
        return ChatSpec(self.template, dict(zip(self.hf.convert_ids_to_tokens(ids), ids, strict=True)), seq_len)

    def token_bytes(self) -> NDArray[np.int32]:
        """Bytes of text that each id stands for, int32 [size]; 0 for special tokens and ids that do not exist."""
        return np.fromiter(map(len, self.pieces()), np.int32, self.size)

    def pieces(self) -> list[bytes]:
        """The bytes of text that each id stands for, [size]; b"" for special tokens and ids that do not exist."""
        return token_pieces(self.hf.backend_tokenizer, self.size, self.silent_ids)


def load_tokenizer(spec: schema.Tokenizer, data: schema.Data, chat: schema.Chat | None = None) -> TextTokenizer:
    """The tokenizer of a recipe. A hub id is taken from the local cache when it is there: no network after preparing.

    It has the tokens of `add_tokens` and, with `chat`, that template and the special tokens of it. Raises
    PreflightError: not found, not trained yet, not a fast tokenizer, no end-of-text token, tokens that cannot be added,
    a template that cannot be used.
    """
    if spec.train is not None:
        tokenizer = open_tokenizer(str(trained_folder(spec.train, data)), origin="the trained tokenizer")
    else:
        assert spec.path is not None
        tokenizer = open_tokenizer(spec.path, spec.revision, spec.end_of_text)
    if spec.add_tokens is not None:
        tokenizer = with_tokens(tokenizer, tokens_of(spec.add_tokens))
    return tokenizer if chat is None else with_template(tokenizer, chat)


def with_tokens(tokenizer: TextTokenizer, tokens: Sequence[str]) -> TextTokenizer:
    """The same tokenizer with ordinary tokens added behind its own; those it was given before stay as they are.

    Raises PreflightError for what is a word of its vocabulary already (all text would be cut otherwise), a special
    token, or does not come back from its id as it was written.
    """
    hf, wrong = copy.deepcopy(tokenizer.hf), list[str]()
    vocabulary, there = hf.get_vocab(), {token.content: token for token in hf.added_tokens_decoder.values()}
    special = set(hf.convert_ids_to_tokens(list(tokenizer.silent_ids)))
    for token in tokens:
        if token in special:
            wrong.append(f"{token!r} is a special token of the tokenizer")
        elif token in vocabulary and (token not in there or there[token].normalized):
            wrong.append(f"{token!r} is in its vocabulary already, and text that holds it would be cut otherwise")
    if not wrong:
        hf.add_tokens([AddedToken(token, special=False, normalized=False) for token in tokens])
        wrong = [f"{token!r} does not come back as it was written" for token in tokens if not _comes_back(hf, token)]
    if wrong:
        more = f" (and {len(wrong) - 4} more)" if len(wrong) > 4 else ""
        raise PreflightError(
            f"tokenizer.add_tokens: {'; '.join(wrong[:4])}{more}; choose other forms, in rare brackets"
        )
    return replace(
        tokenizer, hf=hf, fingerprint=_fingerprint(hf, tokenizer.eot_id, tokenizer.bos_id),
        size=max(hf.get_vocab().values()) + 1, ordinary=tuple(tokens),
    )  # fmt: skip


def _comes_back(hf: PreTrainedTokenizerBase, token: str) -> bool:
    """Whether the token is one id between words, and its id the token. An alphabet of bytes reads some letters (`×`
    alone) as a byte of it, and a longer added token may swallow this one's neighbours."""
    text, index = f"a{token}{token} b", hf.convert_tokens_to_ids(token)
    ids = hf.encode(text, add_special_tokens=False)
    return ids.count(index) == 2 and hf.decode(ids) == text


def with_template(tokenizer: TextTokenizer, chat: schema.Chat) -> TextTokenizer:
    """The same tokenizer with a chat template, grown by the special tokens the template needs and it lacks.

    Raises PreflightError for a template that is not there or does not say what the model must produce.
    """
    hf = copy.deepcopy(tokenizer.hf)
    ours = find_template(chat.template, chat.system, str(hf.convert_ids_to_tokens(tokenizer.eot_id)))
    if ours is None:
        foreign = _foreign_template(hf, chat)
        hf.chat_template = foreign.jinja
        stop = hf.get_vocab()[foreign.end_of_turn()]
        return replace(tokenizer, hf=hf, template=foreign, end_of_turn_id=stop, limits=chat)
    known = hf.get_vocab()
    missing = tuple(marker for marker in ours.markers if marker not in known)
    markers = [AddedToken(marker, special=True, normalized=False) for marker in ours.markers]
    hf.add_tokens(markers, special_tokens=True)  # those that are there already become special
    hf.chat_template = ours.jinja
    size = max(hf.get_vocab().values()) + 1
    fingerprint = _fingerprint(hf, tokenizer.eot_id, tokenizer.bos_id)
    return replace(
        tokenizer, hf=hf, fingerprint=fingerprint, size=size, template=ours,
        end_of_turn_id=hf.get_vocab()[ours.end], added=missing, limits=chat,
    )  # fmt: skip


def _foreign_template(hf: PreTrainedTokenizerBase, chat: schema.Chat) -> ForeignTemplate:
    if chat.template == "tokenizer":
        jinja = hf.chat_template
        if not isinstance(jinja, str):
            raise PreflightError(f"chat.template: the tokenizer has no template of its own; {_OURS}")
    else:
        try:
            jinja = Path(chat.template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PreflightError(f"chat.template: {chat.template}: cannot be read ({error}); {_OURS}") from error
    variables = {key: str(value) for key, value in hf.special_tokens_map.items() if isinstance(value, str)}
    specials = tuple(token.content for token in hf.added_tokens_decoder.values() if token.special)
    template = ForeignTemplate(jinja, variables, specials, hf.bos_token)
    if problems := template.problems():
        raise PreflightError(f"chat.template {chat.template!r}: {'; '.join(problems)}; mend it, or {_OURS}")
    return template


def open_tokenizer(
    path: str, revision: str | None = None, end_of_text: str | None = None, origin: str | None = None
) -> TextTokenizer:
    """Load `path` (hub id or folder) and find its end of text and, if it adds one, its beginning of text."""
    name = f"{origin or 'tokenizer.path'} {path!r}"
    hf = _from_pretrained(path, revision, name)
    if not getattr(hf, "is_fast", False):
        raise PreflightError(
            f"{name} is a slow (pure Python) tokenizer ({type(hf).__name__}); documents are encoded by the tokenizers "
            "library: choose a tokenizer that comes with a tokenizer.json"
        )
    eot_id = _end_of_text(hf, end_of_text, name)
    if end_of_text is not None:
        hf.eos_token = end_of_text  # so that a saved copy, and whoever generates with it, ends there too
    bos_id = _added_beginning(hf)
    size = max(hf.get_vocab().values()) + 1
    return TextTokenizer(hf, _fingerprint(hf, eot_id, bos_id), size, eot_id, bos_id)


def _from_pretrained(path: str, revision: str | None, name: str) -> PreTrainedTokenizerBase:
    local = Path(path).is_dir()
    if not local and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise PreflightError(f"{name}: no such folder; check the path, or give a hub id such as openai-community/gpt2")
    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, local_files_only=True)
    except Exception as error:
        problem: Exception = error
    if not local:
        try:
            return AutoTokenizer.from_pretrained(path, revision=revision)
        except Exception as error:
            problem = error
    reason = " ".join(str(problem).split())
    remedy = "it needs tokenizer.json and tokenizer_config.json" if local else "check the id, the network and the login"
    raise PreflightError(f"{name} cannot be loaded: {remedy} ({type(problem).__name__}: {reason[:300]})") from problem


def _end_of_text(hf: PreTrainedTokenizerBase, wanted: str | None, name: str) -> int:
    vocabulary = hf.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            near = ", ".join(repr(token) for token in hf.all_special_tokens[:8]) or "none"
            raise PreflightError(
                f"tokenizer.end_of_text = {wanted!r} is not one token of {name}; its special tokens: {near}"
            )
        return vocabulary[wanted]
    if hf.eos_token_id is None:
        raise PreflightError(
            f"{name} has no end-of-text token (eos_token): say which token ends a document with tokenizer.end_of_text"
        )
    return int(hf.eos_token_id)


def _added_beginning(hf: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-text id, only if the tokenizer puts it before a text by itself."""
    with_added = hf("a")["input_ids"]
    if hf.bos_token_id is not None and with_added[:1] == [hf.bos_token_id]:
        return int(hf.bos_token_id)
    return None


def extends(longer: TextTokenizer, shorter: TextTokenizer) -> bool:
    """Whether `longer` is `shorter` with special tokens or tokens of add_tokens added, or the very same."""
    parts, added = _decisive(longer.hf, longer.eot_id, longer.bos_id)
    parts_before, added_before = _decisive(shorter.hf, shorter.eot_id, shorter.bos_id)
    names = {index: (content, special) for index, content, special in added}
    before = {index: content for index, content, _ in added_before}
    kept = all(index in names and names[index][0] == content for index, content in before.items())
    new = [names[index] for index in names.keys() - before.keys()]
    return parts == parts_before and kept and all(special or token in longer.ordinary for token, special in new)


def _fingerprint(hf: PreTrainedTokenizerBase, eot_id: int, bos_id: int | None) -> str:
    (normalizer, pre_tokenizer, decoder, model, eot_id, bos_id), added = _decisive(hf, eot_id, bos_id)
    parts = [normalizer, pre_tokenizer, decoder, model, added, eot_id, bos_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _decisive(
    hf: PreTrainedTokenizerBase, eot_id: int, bos_id: int | None
) -> tuple[tuple[Any, ...], list[tuple[int, str, bool]]]:
    """What decides the ids of a document: parts of the backend and what begins and ends it; and the added tokens, each
    (id, content, whether special)."""
    backend = json.loads(hf.backend_tokenizer.to_str())
    model = backend["model"]
    if "merges" in model:  # older versions write "a b", newer ones ["a", "b"]
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # What is special by tokenizer_config.json alone is not found in text either (`plain_text_backend`).
    special = _special_ids(hf, eot_id) - {hf.unk_token_id} | {eot_id}
    added = sorted(
        (token["id"], token["content"], token["special"] or token["id"] in special) for token in backend["added_tokens"]
    )
    return (backend["normalizer"], backend["pre_tokenizer"], backend["decoder"], model, eot_id, bos_id), added


def _special_ids(hf: PreTrainedTokenizerBase, eot_id: int) -> set[int]:
    flagged = {index for index, token in hf.backend_tokenizer.get_added_tokens_decoder().items() if token.special}
    return flagged | set(hf.all_special_ids) | {eot_id}
