"""A packed row as text, token by token, without losing a byte or a mark.

Every id is turned into its own bytes. Bytes that are only a part of a character are joined with the next tokens until
they make one, and written as \\xNN when they never do. The trap: decoding a whole row at once hides where tokens end,
drops what is no UTF-8, and shows nothing of end-of-text.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cheaptrain.data.rows import IGNORED, RowBatch
from cheaptrain.data.tokenizer import TextTokenizer

LINE_END, TAB = "↵", "⇥"
_LONGEST_CHARACTER = 4  # bytes in UTF-8, and so the most tokens that one character is spread over
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a row that are shown together: one, or the few that share a character.

    `document`: number in the row. `position`: position_id of the first token. `supervised`: whether it has a target.
    """

    text: str
    start: int
    stop: int
    document: int
    position: int
    supervised: bool
    end_of_text: bool


class TokenText:
    """The bytes of text of each id of a tokenizer."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self._hf = tokenizer.hf
        self.eot_id = tokenizer.eot_id
        self._added = {index: token.content for index, token in self._hf.added_tokens_decoder.items()}
        self.specials = frozenset(tokenizer.special_ids)
        backend = json.loads(self._hf.backend_tokenizer.to_str())
        byte_level = "ByteLevel" in json.dumps([backend["decoder"], backend["pre_tokenizer"]])
        self._byte_of = _byte_alphabet() if byte_level else None

    def bytes_of(self, index: int) -> bytes:
        """What `index` stands for; special tokens stand for their name."""
        if index in self._added:
            return self._added[index].encode()
        token = self._hf.convert_ids_to_tokens(index)
        if not isinstance(token, str):
            return f"<id {index}>".encode()
        if self._byte_of is not None:
            return bytes(self._byte_of[letter] for letter in token)
        if match := _BYTE_TOKEN.fullmatch(token):
            return bytes([int(match[1], 16)])
        return token.replace("▁", " ").encode()

    def of(self, ids: Sequence[int]) -> str:
        """The text of consecutive tokens; bytes that are no UTF-8 written as \\xNN."""
        return b"".join(map(self.bytes_of, ids)).decode(errors="backslashreplace")


def visible(text: str) -> str:
    """Line breaks and tabs as signs, other control characters as \\xNN."""
    shown = []
    for letter in text:
        if letter == "\n":
            shown.append(LINE_END + "\n")
        elif letter == "\t":
            shown.append(TAB)
        elif letter < " " or letter == "\x7f":
            shown.append(f"\\x{ord(letter):02x}")
        else:
            shown.append(letter)
    return "".join(shown)


def row_pieces(batch: RowBatch, row: int, text: TokenText) -> Iterator[Piece]:
    """The pieces of one row of a batch, in order; together they cover every token once."""
    ids, labels, positions, documents = (
        tensor[row].tolist() for tensor in (batch.input_ids, batch.labels, batch.position_ids, batch.document_ids)
    )
    marks = list(zip(documents, (label != IGNORED for label in labels), strict=True))
    start = 0
    while start < len(ids):
        # Tokens of another document, or with a target where this one has none, are never joined to it.
        limit = start + 1
        while limit < min(start + _LONGEST_CHARACTER, len(ids)) and marks[limit] == marks[start]:
            limit += 1
        stop, shown = _joined([text.bytes_of(index) for index in ids[start:limit]])
        stop += start
        yield Piece(shown, start, stop, documents[start], positions[start], marks[start][1], ids[start] == text.eot_id)
        start = stop


def _joined(pieces: Sequence[bytes]) -> tuple[int, str]:
    """How many of the pieces make whole characters, starting with the first, and their text."""
    for count in range(1, len(pieces) + 1):
        try:
            return count, b"".join(pieces[:count]).decode()
        except UnicodeDecodeError as error:
            if error.reason != "unexpected end of data":
                break  # no continuation makes a character of it
    return 1, pieces[0].decode(errors="backslashreplace")


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level vocabularies write each byte with, the other way round."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
