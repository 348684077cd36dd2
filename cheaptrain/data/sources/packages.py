"""Text that every machine with Python has: the code or the docstrings of installed packages and modules.

Nothing is imported: a package is located by name, its .py files are read as text, and docstrings are taken from the
syntax tree. One file is one document; as docstrings, a module reads like a page of its reference manual. As
conversations, every documented thing is a question and an answer of its own (`questions.py`). The trap:
importing a package to find it runs its code, and `find_spec("a.b")` imports `a`; so only the first name is looked up
and the rest is walked on disk.
"""

import ast
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import io
import sys
import tokenize
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from cheaptrain.data.files import InputHashes, cannot_read
from cheaptrain.data.sources import Bad, Document, Input, Plan, Unit, check_unchanged, file_stamp, make_unit
from cheaptrain.data.sources.questions import about
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def plan(source: schema.Source, unit_bytes: int, hashes: InputHashes) -> Plan:
    """Units over all .py files. Raises PreflightError for a name that is not installed, with the nearest one."""
    assert source.packages is not None
    names = [source.packages] if isinstance(source.packages, str) else source.packages
    files: dict[str, Path] = {}
    for name in names:
        files |= _python_files(name, source.name)
    ordered = sorted(files.items())
    stamps = [file_stamp(path) for _, path in ordered]
    inputs = [
        Input(name, fingerprint, path.stat().st_size)
        for (name, path), fingerprint in zip(ordered, hashes.of(path for _, path in ordered), strict=True)
    ]
    units: list[Unit] = []
    group: list[tuple[Input, dict[str, Any]]] = []
    size = 0
    for index, ((name, path), item) in enumerate(zip(ordered, inputs, strict=True)):
        group.append((item, {"name": name, "path": str(path), "stamp": stamps[index]}))
        size += item.size
        if size >= unit_bytes or index + 1 == len(ordered):
            label = group[0][0].name if len(group) == 1 else f"{group[0][0].name} to {group[-1][0].name}"
            entries, pieces = [entry for entry, _ in group], [piece for _, piece in group]
            decides: dict[str, Any] = {"content": source.content, "on_bad_line": source.on_bad_line}
            decides |= {"format": "chat"} if source.format == "chat" else {}
            units.append(make_unit(len(units), label, entries, pieces, size, **decides))
            group, size = [], 0
    return Plan(tuple(units), (f"{len(ordered):,} Python files",))


def documents(source: schema.Source, unit: Unit) -> Iterator[Document | Bad]:
    """One document a file: its code, or its docstrings; or questions and answers about what it documents. A module
    without docstrings is an empty document, or none."""
    for piece in unit.pieces:
        try:
            raw = Path(piece["path"]).read_bytes()
        except OSError as error:
            raise PreflightError(cannot_read(piece["path"], error)) from error
        check_unchanged(piece)
        code = _decoded(raw, piece["path"])
        if source.content == "code" or isinstance(code, Bad):
            yield code
            continue
        sections = _sections_of(code, piece)
        if isinstance(sections, Bad):
            yield sections
        elif source.format == "chat":
            for heading, docstring in sections:
                yield from about(heading, docstring)
        else:
            yield "\n\n".join(f"{heading}\n\n{docstring}" for heading, docstring in sections)


def _python_files(name: str, source: str) -> dict[str, Path]:
    """Files of a package, module or distribution: name relative to where it is installed → path."""
    first, *rest = name.split(".")
    spec = importlib.machinery.PathFinder.find_spec(first, sys.path)
    if spec is None or not (spec.submodule_search_locations or (spec.origin or "").endswith(".py")):
        spec = _installed_otherwise(first)
    if spec is not None and spec.submodule_search_locations:
        for root in map(Path, spec.submodule_search_locations):
            place = root.joinpath(*rest)
            module = place.with_suffix(".py")
            found = sorted(place.rglob("*.py")) if place.is_dir() else [module] if rest and module.is_file() else []
            if found:
                return {path.relative_to(root.parent).as_posix(): path for path in found}
    elif spec is not None and spec.origin and spec.origin.endswith(".py") and not rest:
        return {Path(spec.origin).name: Path(spec.origin)}
    try:
        listed = importlib.metadata.distribution(name).files or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        listed = []
    files = {str(file): Path(str(file.locate())) for file in listed if file.suffix == ".py" and ".." not in file.parts}
    if files:
        return {key: path for key, path in files.items() if path.is_file()}
    known = {*importlib.metadata.packages_distributions(), *sys.stdlib_module_names}
    known |= {distribution.name for distribution in importlib.metadata.distributions() if distribution.name}
    if name in known:
        raise PreflightError(f"source {source!r}: packages: {name!r} has no Python code to read, only a compiled part")
    near = get_close_matches(name, sorted(known), n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"install it (pip install {first or '...'})"
    raise PreflightError(f"source {source!r}: packages: no Python code called {name!r} on this machine; {hint}")


def _installed_otherwise(name: str) -> importlib.machinery.ModuleSpec | None:
    """A package that an import hook provides, as editable installs do. Looking up a top-level name imports nothing."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    return spec if spec is not None and spec.origin not in ("built-in", "frozen") else None


def _decoded(raw: bytes, path: str) -> str | Bad:
    try:
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        return raw.decode(encoding)
    except (SyntaxError, UnicodeDecodeError, LookupError) as error:
        return Bad(path, f"not in the encoding it declares ({error})")


def _sections_of(code: str, piece: dict[str, Any]) -> list[tuple[str, str]] | Bad:
    """All docstrings of a module, each behind the heading for it."""
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError) as error:
        return Bad(piece["path"], f"not Python that this interpreter parses ({error})")
    parts = piece["name"].removesuffix(".py").removesuffix("/__init__").split("/")
    # "\ud800" in a docstring is no text; keep it as written
    written = [
        text.encode(errors="backslashreplace").decode() for pair in _sections(tree, ".".join(parts)) for text in pair
    ]
    return list(zip(written[::2], written[1::2], strict=True))


def _sections(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
    text = ast.get_docstring(node, clean=False)
    if text and (cleaned := inspect.cleandoc(text).strip()):
        yield _heading(node, name), cleaned
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _sections(child, f"{name}.{child.name}")


def _heading(node: _Documented, name: str) -> str:
    """`module email.message`, `class email.message.Message`, `email.message.Message.attach(self, payload)`."""
    if isinstance(node, ast.Module):
        return f"module {name}"
    if isinstance(node, ast.ClassDef):
        return f"class {name}"
    given = node.args
    names = [argument.arg for argument in given.posonlyargs + given.args]
    names += [f"*{given.vararg.arg}"] if given.vararg else []
    names += [argument.arg for argument in given.kwonlyargs]
    names += [f"**{given.kwarg.arg}"] if given.kwarg else []
    return f"{name}({', '.join(names)})"
