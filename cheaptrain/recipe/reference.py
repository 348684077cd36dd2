"""The tables of keys in `docs/recipes.md`, written from the schema: what is documented is what is read.

python -m cheaptrain.recipe.reference docs/recipes.md
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any

from cheaptrain.recipe.keys import Key, expected, is_free, keys
from cheaptrain.recipe.quantities import Span
from cheaptrain.recipe.schema import Recipe, Section

BEGIN = "<!-- The tables below are written by: python -m cheaptrain.recipe.reference docs/recipes.md -->"
END = "<!-- End of the written tables. -->"


def with_tables(text: str) -> str:
    """The document with its tables renewed."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{_tables()}\n\n{END}{after}"


def _tables() -> str:
    """One table of keys for each table of the recipe."""
    parts = [_table("", Recipe, "At the top, above the first table")]
    for key in keys().values():
        if key.section is not None:
            parts.append(_table(key.name, key.section, f"`[[{key.name}]]`" if key.listed else f"`[{key.name}]`"))
    return "\n\n".join(parts)


def _table(name: str, section: type[Section], title: str) -> str:
    rows = ["| key | takes | default | meaning |", "|---|---|---|---|"]
    for key in keys().values():
        if key.table == name and key.section is None:
            star = "\\*" if key.operational else ""
            leaf = f"[{key.leaf}]" if is_free(key) and not name else key.leaf
            cells = [f"`{leaf}`{star}", expected(key), _default(key), key.field.description or ""]
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return f"### {title}\n\n{inspect.getdoc(section)}\n\n" + "\n".join(rows)


def _default(key: Key) -> str:
    default: Any = key.field.default
    if key.field.is_required():
        return "required"
    if default is None:
        return ""
    return f"`{json.dumps(str(default) if isinstance(default, Span) else default)}`"


if __name__ == "__main__":
    document = Path(sys.argv[1])
    document.write_text(with_tables(document.read_text(encoding="utf-8")), encoding="utf-8")
