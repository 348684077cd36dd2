"""The tokenizer a recipe names: a hub id, a folder, a checkpoint, or one trained on the recipe's own text.

Everything prepared depends on the exact mapping from text to ids, so a tokenizer has a fingerprint: a hash of the
parts of its backend that decide ids, and of the ids that end and begin a document. The trap it avoids: truncation
settings, padding and the post-processor change from save to save without changing one id of a document; they stay out
of the hash.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from cheaptrain.data.encode import EncoderSpec, plain_text_backend
from cheaptrain.data.train_tokenizer import trained_folder
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A transformers fast tokenizer and what preparing and training need to know of it.

    `size`: ids are below it; `eot_id` ends every document; `bos_id` begins one, if the tokenizer itself adds it.
    """

    hf: PreTrainedTokenizerBase
    fingerprint: str
    size: int
    eot_id: int
    bos_id: int | None

    @cached_property
    def _backend(self) -> str:
        return str(self.hf.backend_tokenizer.to_str())

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that no text may turn into: every special token but the one for unknown characters."""
        return tuple(sorted(_special_ids(self.hf, self.eot_id) - {self.hf.unk_token_id} | {self.eot_id}))

    def encoder_spec(self) -> EncoderSpec:
        """What a worker needs to encode documents."""
        tokens = frozenset(self.hf.convert_ids_to_tokens(list(self.special_ids)))
        backend = plain_text_backend(self._backend, tokens)
        return EncoderSpec(backend, self.special_ids, self.eot_id, self.bos_id, self.size)

    def token_bytes(self) -> NDArray[np.int32]:
        """Bytes of text that each id stands for, int32 [size]; 0 for special tokens and ids that do not exist."""
        backend = json.loads(self._backend)
        measure = _token_measure(backend)
        table = np.zeros(self.size, np.int32)
        for token, index in self.hf.backend_tokenizer.get_vocab(with_added_tokens=False).items():
            table[index] = measure(token)
        for added in backend["added_tokens"]:
            table[added["id"]] = len(added["content"].encode())  # stands in the text as it is written
        table[sorted(_special_ids(self.hf, self.eot_id))] = 0
        return table


def load_tokenizer(spec: schema.Tokenizer, data: schema.Data) -> TextTokenizer:
    """The tokenizer of a recipe. A hub id is taken from the local cache when it is there: no network after preparing.

    Raises PreflightError: not found, not trained yet, not a fast tokenizer, no end-of-text token.
    """
    if spec.train is not None:
        return open_tokenizer(str(trained_folder(spec.train, data)), origin="the trained tokenizer")
    assert spec.path is not None
    return open_tokenizer(spec.path, spec.revision, spec.end_of_text)


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


def _fingerprint(hf: PreTrainedTokenizerBase, eot_id: int, bos_id: int | None) -> str:
    backend = json.loads(hf.backend_tokenizer.to_str())
    model = backend["model"]
    if "merges" in model:  # older versions write "a b", newer ones ["a", "b"]
        model["merges"] = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    # What is special by tokenizer_config.json alone is not found in text either (`plain_text_backend`).
    special = _special_ids(hf, eot_id) - {hf.unk_token_id} | {eot_id}
    added = sorted(
        (token["id"], token["content"], token["special"] or token["id"] in special) for token in backend["added_tokens"]
    )
    parts = [backend["normalizer"], backend["pre_tokenizer"], backend["decoder"], model, added, eot_id, bos_id]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _special_ids(hf: PreTrainedTokenizerBase, eot_id: int) -> set[int]:
    flagged = {index for index, token in hf.backend_tokenizer.get_added_tokens_decoder().items() if token.special}
    return flagged | set(hf.all_special_ids) | {eot_id}


def _token_measure(backend: dict[str, Any]) -> Any:
    """A function from a token as the vocabulary spells it to the bytes of text it stands for."""
    kinds = _component_kinds(backend["decoder"]) | _component_kinds(backend["pre_tokenizer"])
    if "ByteLevel" in kinds:  # one printable character for each byte
        return len
    if backend["model"].get("byte_fallback") or kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece_bytes
    prefix = backend["model"].get("continuing_subword_prefix") or ""
    return lambda token: len(token.removeprefix(prefix).encode())


def _sentencepiece_bytes(token: str) -> int:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())


def _component_kinds(component: dict[str, Any] | None) -> set[str]:
    """Names of a backend component and of all components inside it."""
    if component is None:
        return set()
    kinds = {component["type"]}
    for inner in component.get("decoders", []) + component.get("pretokenizers", []):
        kinds |= _component_kinds(inner)
    return kinds
