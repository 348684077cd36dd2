"""Line numbers in messages are right for any TOML."""

import string
from typing import Any

import pytest
import tomli
from hypothesis import given, settings
from hypothesis import strategies as st

from cheaptrain.recipe.toml_lines import Path, toml_lines

TEXT = '''\
# a comment with [table] and key = 1
seed = 1   # first
"quoted key" = "a # b"
a.b.c = 1
a.b."d.e" = 2

[train] # comment
text = """
[not.a.table]
key = "x" \\""" still
"""
raw = \'\'\'
[[no]]\'\'\'
list = [
  1, # one
  [ 2, 3 ],

  { x = 1, y = [ 4,
  5 ] },
]
empty = []
date = 1979-05-27 07:32:00Z
inline = { p = { q = 1 }, r.s = "}" }
quotes = """two ""quotes"""""

[[data.sources]]
name = "one"
[data.sources.drills]
documents = 3
[[data.sources.parts]]
x = 1
[[data.sources.parts]]
x = 2

[[data.sources]]
name = "two"

[data]
seq_len = 8
'''


def test_every_kind_of_toml() -> None:
    lines = toml_lines(TEXT)
    at = {line.strip(): number for number, line in enumerate(TEXT.split("\n"), 1)}
    expected: dict[Path, int] = {
        ("seed",): 2,
        ("quoted key",): 3,
        ("a",): 4,
        ("a", "b"): 4,
        ("a", "b", "c"): 4,
        ("a", "b", "d.e"): 5,
        ("train",): 7,
        ("train", "text"): 8,
        ("train", "raw"): at["raw = '''"],
        ("train", "list"): at["list = ["],
        ("train", "list", 0): at["1, # one"],
        ("train", "list", 1): at["[ 2, 3 ],"],
        ("train", "list", 1, 1): at["[ 2, 3 ],"],
        ("train", "list", 2): at["{ x = 1, y = [ 4,"],
        ("train", "list", 2, "y"): at["{ x = 1, y = [ 4,"],
        ("train", "list", 2, "y", 1): at["5 ] },"],
        ("train", "date"): at["date = 1979-05-27 07:32:00Z"],
        ("train", "inline", "r", "s"): at['inline = { p = { q = 1 }, r.s = "}" }'],
        ("train", "quotes"): at['quotes = """two ""quotes"""""'],
        ("data", "sources", 0): at['name = "one"'] - 1,
        ("data", "sources", 0, "drills"): at["[data.sources.drills]"],
        ("data", "sources", 0, "drills", "documents"): at["documents = 3"],
        ("data", "sources", 0, "parts", 1, "x"): at["x = 2"],
        ("data", "sources", 1, "name"): at['name = "two"'],
        ("data",): at["[data]"],
        ("data", "seq_len"): at["seq_len = 8"],
    }
    assert {path: lines[path] for path in expected} == expected
    assert set(lines) == set(paths(tomli.loads(TEXT)))


def test_windows_line_ends() -> None:
    assert toml_lines("[a]\r\nb = 1\r\n\r\nc = 2\r\n") == {("a",): 1, ("a", "b"): 2, ("a", "c"): 4}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment", "a=1", "[a]", "[[a]]", "a=[]", "a={}"])
def test_small_files(text: str) -> None:
    assert set(toml_lines(text)) == set(paths(tomli.loads(text)))


def paths(value: Any, path: Path = ()) -> list[Path]:
    """Every key and every list element."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for step, child in items for found in ((*path, step), *paths(child, (*path, step)))]


class Writer:
    """Writes random TOML and notes where it put each key."""

    def __init__(self, draw: Any) -> None:
        self.draw, self.text, self.lines = draw, "", dict[Path, int]()

    def line(self) -> int:
        return self.text.count("\n") + 1

    def pick(self, *options: str) -> str:
        return self.draw(st.sampled_from(options))

    def key(self, name: str) -> str:
        bare = all(c in string.ascii_letters + string.digits + "_-" for c in name)
        quoted = '"' + name.replace("\\", "\\\\").replace('"', '\\"') + '"'
        return quoted if not bare or self.draw(st.booleans()) else name

    def blanks(self) -> None:
        self.text += self.pick("", "\n", '  # [x] = "\n', "\n# y = 1\n\n", "\t", "\n") or ""
        if not self.text.endswith("\n"):
            self.text += "\n"

    def entries(self, table: dict[str, Any], path: Path) -> None:
        for name, value in table.items():
            self.lines[*path, name] = self.line()
            self.text += f"{self.key(name)}{self.pick(' = ', '=', '  =')}"
            self.value(value, (*path, name))
            self.blanks()

    def value(self, value: Any, path: Path) -> None:
        if isinstance(value, list):
            self.text += "["
            for index, item in enumerate(value):
                self.text += self.pick("", " ", "\n", '\n # c ] " ,\n')
                self.lines[*path, index] = self.line()
                self.value(item, (*path, index))
                self.text += self.pick(",", " ,", "\n,")
            self.text += self.pick("]", " ]", "\n]")
        elif isinstance(value, dict):
            self.text += "{ "
            for number, (name, inner) in enumerate(value.items()):
                self.text += ", " if number else ""
                self.lines[*path, name] = self.line()
                self.text += f"{self.key(name)} = "
                self.value(inner, (*path, name))
            self.text += " }"
        else:
            self.text += value


NAMES = st.text(alphabet='ab1_-. "\\é#', min_size=1, max_size=4)
SCALARS = st.sampled_from(
    [
        "1",
        "-0.5e3",
        "true",
        "inf",
        '""',
        '"a\\"b # ]"',
        "''",
        "'\\'",
        '"""a\n"b"\\\n  ]"""',
        "'''\n[x]\n'''",
        "12:30:00",
        '""""q""""',
        "''''q''''",
    ]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=6
)
TABLES = st.dictionaries(NAMES, VALUES, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_random_files(data: st.DataObject) -> None:
    writer = Writer(data.draw)
    names = data.draw(st.lists(NAMES, max_size=5, unique=True))
    top = {name: value for name, value in data.draw(TABLES).items() if name not in names}
    writer.blanks()
    writer.entries(top, ())
    for name in names:
        shape = data.draw(st.sampled_from(["table", "array", "nested"]))
        for number in range(1 if shape != "array" else data.draw(st.integers(1, 3))):
            path: Path = (name,)
            writer.lines.setdefault(path, writer.line())
            header = writer.key(name)
            if shape == "array":
                path = (name, number)
            if shape == "nested":
                path, header = (name, "in"), f"{header} . in"
            writer.lines[path] = writer.line()
            writer.text += f"[[{header}]]" if shape == "array" else f"[ {header} ]"
            writer.blanks()
            writer.entries(data.draw(TABLES), path)
    values = tomli.loads(writer.text)
    lines = toml_lines(writer.text)
    assert set(lines) == set(paths(values))
    assert lines == writer.lines
