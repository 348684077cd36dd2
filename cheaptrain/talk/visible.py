"""Text of a model on somebody's terminal: what would move the cursor, change colours or turn lines around is shown by
its code instead. A model trained on raw web text writes such characters, and a terminal obeys them.
"""

import re

# C0 but tab and newline, DEL, C1; marks that reverse the reading direction; separators a terminal may break at.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """`text` with every character that a terminal would obey written as its code, e.g. `\\x1b`."""
    return _OBEYED.sub(lambda match: _code(ord(match.group())), text)


def _code(number: int) -> str:
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}"
