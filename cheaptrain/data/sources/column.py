"""Which column holds the text, or the conversation: the one named, or the one anybody would have named; and the
document of a row."""

from collections.abc import Mapping
from typing import Any

from cheaptrain.chat.conversation import Malformed, choose_columns, from_row
from cheaptrain.data.sources import Bad, Document
from cheaptrain.errors import PreflightError
from cheaptrain.recipe import schema

Taken = str | dict[str, str]  # the text column, or what each column of a conversation is
_USUAL = ("text", "content")


def choose(columns: dict[str, bool], source: schema.Source, before: Taken | None, where: str) -> Taken:
    """What to take of the rows of `where`, whose `columns` are name → holds text. `before`: what another file of the
    source was found to have, which this one must have too. Raises PreflightError listing the columns there are."""
    if source.format == "text":
        return choose_column(columns, before if isinstance(before, str) else source.column, where, source.name)
    # A system turn or tools need not be in every file: what is not there is not given.
    found = choose_columns(columns, _named(source), where, source.name)
    merged = {**(before if isinstance(before, dict) else {}), **found}
    if len({"messages", "conversations", "prompt"} & set(merged)) > 1:
        raise PreflightError(f"source {source.name!r}: {where} has other columns than the files before it: set columns")
    return merged


def named(source: schema.Source, taken: Taken | None, there: set[str]) -> list[str]:
    """Notes for the user: which columns were chosen, and, of conversations, which are not read."""
    if taken is None:
        return []
    if isinstance(taken, str):
        return [f"text column: {taken}"] if source.column is None else []
    rest = sorted(there - set(taken.values()))
    listed = ", ".join(role if role == name else f"{role} = {name}" for role, name in sorted(taken.items()))
    return [f"columns: {listed}" + (f"; not read: {', '.join(rest)}" if rest else "")]


def taken_columns(piece: Mapping[str, Any]) -> Taken:
    """What a piece of a plan says is to be taken of its rows."""
    found: Taken = piece["columns"] if "columns" in piece else piece["column"]
    return found


def take(record: Mapping[str, Any], taken: Taken, where: str) -> Document | Bad:
    """The document of a row, or what is wrong with it."""
    if isinstance(taken, str):
        return text_value(record.get(taken), taken, where)
    try:
        return from_row(record, taken)
    except Malformed as error:
        return Bad(where, str(error))


def choose_column(columns: dict[str, bool], wanted: str | None, where: str, source: str) -> str:
    """The text column among `columns` (name → holds text).

    Raises PreflightError listing the columns there are.
    """
    texts = [name for name, holds_text in columns.items() if holds_text]
    there = f"{where} has {', '.join(columns)}" + (f" (text: {', '.join(texts)})" if texts else " (none holds text)")
    if wanted is not None:
        if wanted not in columns:
            raise PreflightError(f"source {source!r}: no column {wanted!r}; {there}: set column to one of these")
        if wanted not in texts:
            raise PreflightError(f"source {source!r}: column {wanted!r} does not hold text; {there}")
        return wanted
    for name in _USUAL:
        if name in texts:
            return name
    if len(texts) == 1:
        return texts[0]
    raise PreflightError(f"source {source!r}: cannot tell which column holds the text; {there}: set column")


def _named(source: schema.Source) -> dict[str, str]:
    return {str(role): name for role, name in (source.columns or {}).items()}


def text_value(value: Any, column: str, where: str) -> str | Bad:
    """`value` if it is text that can be encoded, else what is wrong with it."""
    if value is None:
        return Bad(where, f"no value in column {column!r}")
    if not isinstance(value, str):
        return Bad(where, f"column {column!r} holds a {type(value).__name__}, not text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            return Bad(where, f"half a surrogate pair at character {error.start}: not text that UTF-8 can write")
    return value
