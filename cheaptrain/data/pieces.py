"""The bytes of text that each token stands for.

A vocabulary spells its tokens in an alphabet of its own: one printable character for each byte, or `▁` for a space and
`<0x0A>` for a byte. Decoding a single token with the library loses what matters here: a token may be a part of a
character, and comes back as a question mark. So tokens are read as they are spelt, and `refuse_lost_text` holds the
result against a text with everything in it that a tokenizer may drop.
"""

import json
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import Tokenizer

from cheaptrain.errors import PreflightError

# Capitals, runs of spaces, a tab, line ends, letters of two bytes and of three, one of four.
_PROBE = "The End:  one\ttwo\n\n    three, Füße 语言 🙂 42%."
# Bytes that the alphabet of byte-level tokenizers shows as the character of that number; the others follow from 256 on.
_SHOWN = (*range(33, 127), *range(161, 173), *range(174, 256))


def token_pieces(tokenizer: Tokenizer, size: int, silent_ids: Iterable[int]) -> list[bytes]:
    """The bytes of each id below `size`; b"" for those of `silent_ids` and those that nobody uses."""
    content = json.loads(tokenizer.to_str())
    read = _reader(content)
    pieces = [b""] * size
    for token, index in tokenizer.get_vocab(with_added_tokens=False).items():
        pieces[index] = read(token)
    for added in content["added_tokens"]:
        pieces[added["id"]] = added["content"].encode()  # stands in the text as it is written
    for index in silent_ids:
        pieces[index] = b""
    return pieces


def refuse_lost_text(encoder: Tokenizer, pieces: list[bytes], name: str) -> None:
    """Raise PreflightError when the tokens of a text do not add up to it, a space before it aside; `name` says whose
    tokenizer it is."""
    ids = encoder.encode(_PROBE, add_special_tokens=False).ids
    said, meant = b"".join(pieces[index] for index in ids), _PROBE.encode()
    if said not in (meant, b" " + meant):
        raise PreflightError(
            f"{name}: its tokens do not add up to the text they were made from ({_PROBE!r} becomes "
            f"{said.decode(errors='replace')!r}), so nothing can be aligned with it; tokenizers that keep every byte "
            "can (byte-level BPE, sentencepiece)"
        )


def _reader(backend: dict[str, Any]) -> Callable[[str], bytes]:
    """A function from a token as the vocabulary spells it to the bytes of text it stands for."""
    kinds = _component_kinds(backend["decoder"]) | _component_kinds(backend["pre_tokenizer"])
    if "ByteLevel" in kinds:
        return _byte_level
    if backend["model"].get("byte_fallback") or kinds & {"Metaspace", "ByteFallback"}:
        return _sentencepiece
    prefix = backend["model"].get("continuing_subword_prefix") or ""
    return lambda token: token.removeprefix(prefix).encode()


def _byte_level(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:  # not spelt in the alphabet
        return token.encode()


def _sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode()


def _alphabet() -> dict[str, int]:
    hidden = [byte for byte in range(256) if byte not in _SHOWN]
    return {chr(byte): byte for byte in _SHOWN} | {chr(256 + number): byte for number, byte in enumerate(hidden)}


_BYTE_OF = _alphabet()


def _component_kinds(component: dict[str, Any] | None) -> set[str]:
    """Names of a backend component and of all components inside it."""
    if component is None:
        return set()
    kinds = {component["type"]}
    for inner in component.get("decoders", []) + component.get("pretokenizers", []):
        kinds |= _component_kinds(inner)
    return kinds
