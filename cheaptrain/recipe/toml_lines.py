"""On which line each key and each list element of a TOML text stands.

tomli checks the text and gives the values, without positions; this scanner gives the positions, without the values. It
runs after tomli has accepted the text, so it may trust it and only has to find its way: tables, arrays of tables,
dotted and quoted keys, inline tables, arrays and strings over several lines.
"""

import re

import tomli

Path = tuple[str | int, ...]

_BLANK = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_SPACE = re.compile(r"[ \t]*")
_SCALAR = re.compile(r"[^,\]}#\r\n]+")
_BARE_KEY = re.compile(r"[^\s.=\[\]\"'#,{}]+")
# Longest quotes first; a string over several lines may end in up to two quotes of its own.
_STRING = re.compile(r'"""(?:\\.|[^\\])*?"""+|\'\'\'.*?\'\'\'+|"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'', re.DOTALL)


def toml_lines(text: str) -> dict[Path, int]:
    """Path (keys, and indices within lists) → line, from 1, of its key, its `[header]` or its list element.

    A table without a header of its own has the line where it is first mentioned. `text` must be valid TOML.
    """
    return _Scanner(text).scan()


class _Scanner:
    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0
        self.lines: dict[Path, int] = {}
        self.lengths: dict[Path, int] = {}  # of arrays of tables
        self._counted = (0, 1)  # a position and its line

    def scan(self) -> dict[Path, int]:
        table: Path = ()
        self._skip(_BLANK)
        while self.at < len(self.text):
            if self.text[self.at] == "[":
                table = self._header()
            else:
                self._entry(table)
            self._skip(_BLANK)
        return self.lines

    def _header(self) -> Path:
        line, array = self._line(), self.text.startswith("[[", self.at)
        self.at += 2 if array else 1
        keys = self._keys()
        self.at += 2 if array else 1
        path: Path = ()
        for depth, key in enumerate(keys):
            last = depth == len(keys) - 1
            path = (*path, key)
            if last and array:
                self.lines.setdefault(path, line)
                self.lengths[path] = self.lengths.get(path, 0) + 1
            elif last:
                self.lines[path] = line
            else:
                self.lines.setdefault(path, line)
            if path in self.lengths:  # what follows belongs to the newest element
                path = (*path, self.lengths[path] - 1)
                self.lines.setdefault(path, line)
        return path

    def _entry(self, table: Path) -> None:
        """`key = value`, the key perhaps dotted."""
        line, path = self._line(), table
        for key in self._keys():
            path = (*path, key)
            self.lines.setdefault(path, line)
        self.at += 1  # =
        self._skip(_SPACE)
        self._value(path)

    def _keys(self) -> list[str]:
        keys = []
        while True:
            self._skip(_SPACE)
            if self.text[self.at] in "\"'":
                keys.append(tomli.loads(f"key = {self._match(_STRING)}")["key"])
            else:
                keys.append(self._match(_BARE_KEY))
            self._skip(_SPACE)
            if not self.text.startswith(".", self.at):
                return keys
            self.at += 1

    def _value(self, path: Path) -> None:
        opening = self.text[self.at]
        if opening in "\"'":
            self._match(_STRING)
        elif opening in "[{":
            self.at += 1
            self._items(path, "]" if opening == "[" else "}")
        else:
            self._match(_SCALAR)

    def _items(self, path: Path, closing: str) -> None:
        """Elements of an array or entries of an inline table, up to its closing bracket."""
        index = 0
        while True:
            self._skip(_BLANK)
            if self.text[self.at] == closing:
                self.at += 1
                return
            if self.text[self.at] == ",":
                self.at += 1
            elif closing == "}":
                self._entry(path)
            else:
                self.lines[*path, index] = self._line()
                self._value((*path, index))
                index += 1

    def _line(self) -> int:
        start, line = self._counted
        self._counted = (self.at, line + self.text.count("\n", start, self.at))
        return self._counted[1]

    def _skip(self, pattern: re.Pattern[str]) -> None:
        self._match(pattern)

    def _match(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match, f"not TOML at character {self.at}"
        self.at = match.end()
        return match[0]
