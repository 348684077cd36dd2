"""Which column holds the text: the one named, or the one anybody would have named."""

from cheaptrain.errors import PreflightError

_USUAL = ("text", "content")


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
