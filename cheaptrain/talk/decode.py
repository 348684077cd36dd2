"""Text from tokens as they come, so that the pieces put together are the text of all.

A token may end in the middle of a character, or lose its leading space when it is decoded first. So a token is decoded
together with those before it, back to the last place where a character ended; what is new is given out, and an end that
is broken is held back, because the next token may mend it. tokenizers' own DecodeStream does much the same, but raises
where the bytes of a byte-fallback tokenizer are no UTF-8, which a young model writes every day.
"""

from tokenizers import Tokenizer

_BROKEN = "\ufffd"  # what bytes that are no character decode to, one for each or one for several
_MENDABLE = 3  # a character has four bytes at most
_LONGEST_TOKENS = 64  # of broken text to decode again and again


class Decoder:
    """Takes one token after the other and gives back the text that is certain."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []  # a context, given out in full, and what came since
        self._context = 0  # how many of them are context
        self._given = 0  # characters of their text that were given out

    def step(self, token: int) -> str:
        """What `token` makes certain; empty while a character is unfinished."""
        self._tokens.append(token)
        text = self._text()
        end = text[-_MENDABLE:]
        held = len(end) - len(end.rstrip(_BROKEN))
        if held and len(self._tokens) < _LONGEST_TOKENS:
            return self._give(text, len(text) - held)
        piece = self._give(text, len(text))
        self._tokens = [] if held else self._tokens[self._context :]
        self._context = len(self._tokens)
        self._given = len(self._text())
        return piece

    def rest(self) -> str:
        """What is left at the end, an unfinished character as it is."""
        text = self._text()
        return self._give(text, len(text))

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._tokens, skip_special_tokens=False))

    def _give(self, text: str, end: int) -> str:
        piece = text[self._given : end]
        self._given = max(self._given, end)
        return piece
