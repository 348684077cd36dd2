"""What an unknown key was meant to be.

Most wrong keys are one of three: a slip of the finger, a right key in the wrong table, or the name another trainer
uses. Each gets the name used here, so that nobody has to look it up.
"""

import difflib
from typing import NamedTuple

from cheaptrain.recipe.foreign import FOREIGN
from cheaptrain.recipe.keys import keys, place


class Suggestion(NamedTuple):
    """What to say about an unknown key, and the dotted key of ours that was probably meant."""

    message: str
    meant: str | None

    @property
    def home(self) -> str | None:
        """The table of ours in which the keys of an unknown table belong."""
        if self.meant is None or keys()[self.meant].section is not None:
            return self.meant
        return keys()[self.meant].table


def unknown_key(table: str, name: str, *, is_table: bool = False, home: str | None = None) -> Suggestion:
    """A complaint about `name` in `table` (dotted; empty at the top), which the schema does not have.

    `is_table`: a table was given. `home`: when `table` itself is unknown, the one of ours that was probably meant.
    """
    noun = "unknown table" if is_table else "unknown key"
    foreign = FOREIGN.get(f"{table}.{name}".lower()) or FOREIGN.get(name.lower().replace("-", "_"))
    if foreign:
        ours, hint = foreign
        told = f"; use {place(ours)}" if ours else " with no counterpart here"
        return Suggestion(noun + told + (f": {hint}" if hint else ""), ours)
    whole = f"{table}.{name}".lstrip(".")
    if "." in name and whole in keys():
        return Suggestion(f"{noun}: in quotes it is one name with a dot in it; write {whole} without quotes", whole)
    siblings = {key.leaf: key.name for key in keys().values() if key.table == (home or table)}
    if home and name in siblings:
        return Suggestion(f"{noun}; use {place(siblings[name])}", siblings[name])
    homes = [key for key in keys().values() if key.leaf == name]
    if any(key.name == "seed" for key in homes):
        return Suggestion(f"{noun} in this table; seed stands at the top, above the first [table]", "seed")
    if is_table and homes and all(key.section is None for key in homes):
        return Suggestion(f"{noun}; {homes[0].name} is a key, and what goes with it stands beside it", homes[0].name)
    if homes and len(homes) <= 4:
        told = " and ".join(place(key.name) for key in homes)
        return Suggestion(f"{noun} in this place; there is {told}", homes[0].name)
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.7)
    if near:
        return Suggestion(f"{noun}; did you mean {place(siblings[near[0]])}?", siblings[near[0]])
    leaves: dict[str, list[str]] = {}
    for key in keys().values():
        leaves.setdefault(key.leaf, []).append(key.name)
    near = difflib.get_close_matches(name, leaves, 1, cutoff=0.75)
    if near:
        told = " or ".join(map(place, leaves[near[0]][:4]))
        return Suggestion(f"{noun}; did you mean {told}?", leaves[near[0]][0])
    near = difflib.get_close_matches(name, siblings, 1, cutoff=0.5)
    guess = f"; the nearest is {place(siblings[near[0]])}" if near else ""
    listed = f"; there are {', '.join(siblings)}" if siblings else ""
    return Suggestion(noun + guess + listed, None)
