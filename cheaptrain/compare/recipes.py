"""What two recipes mean differently, not what is written differently in them.

Recipes are compared as they were resolved: defaults filled in, `"10B"` and `10_000_000_000` one number, sources by
their names. Weights of sources are shares, so 60 to 40 is 3 to 2. What a run was made from is compared by its bytes:
another path to the same weights is no difference, and the same path to others is one. Seed, run folder and the names
that follow from them stand apart, with the runs.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from cheaptrain.checkpoint.launch_record import read_launch
from cheaptrain.compare.sides import Member, Side, leaves_of
from cheaptrain.recipe import variables
from cheaptrain.recipe.parents import PARENT_KEYS
from cheaptrain.recipe.schema import Recipe

_ALWAYS_OTHER = ("seed", "run.dir")
_MADE_FROM = {**PARENT_KEYS, "tokenizer": "tokenizer.path"}
_PLANNED = ("steps", "tokens", "processes")  # as the launch wrote down


@dataclass(frozen=True)
class Difference:
    """One key and its value on each side, as text. `kind`: "recipe" changes what is learned, "inputs" what it is made
    from, "reckoned" follows from the others, "how it is run" changes nothing in the result but time and memory."""

    key: str
    values: tuple[str, ...]
    kind: str


def differences(sides: Sequence[Side]) -> list[Difference]:
    """All that is not the same on every side; of a side with several runs the first whose recipe is there. A side
    without any recipe is left out of the comparison, with a dash in its place."""
    first = [next((member for member in side.members if member.kept), None) for side in sides]
    if sum(member is not None for member in first) < 2:
        return []
    found = []
    for kind, tables in (
        ("recipe", [_recipe(member) for member in first]),
        ("inputs", [_inputs(side) for side in sides]),
        ("reckoned", [_reckoned(member) for member in first]),
        ("how it is run", [_running(member) for member in first]),
    ):
        known = [table for table in tables if table is not None]
        for key in dict.fromkeys(key for table in known for key in table):
            if len({_meaning(table.get(key)) for table in known}) > 1:
                values = ("–" if table is None else _shown(table.get(key)) for table in tables)
                found.append(Difference(key, tuple(values), kind))
    return found


def _recipe(member: Member | None) -> dict[str, Any] | None:
    if member is None:
        return None
    found = _with_shares(leaves_of(member))
    inputs = (member.kept or {}).get("inputs", {})
    return {key: value for key, value in found.items() if not any(_MADE_FROM.get(name) == key for name in inputs)}


def _with_shares(recipe: dict[str, Any]) -> dict[str, Any]:
    """Weights of the sources as percentages of all of them."""
    keys = [k for k, v in recipe.items() if k.startswith("data.sources.") and k.endswith(".weight") and _is_number(v)]
    total = sum(recipe[key] for key in keys)
    return recipe | {key: f"{100 * recipe[key] / total:.4g} %" for key in keys} if total else recipe


def _inputs(side: Side) -> dict[str, Any] | None:
    """Key of the recipe → what lies there: its hash, of seeds all of theirs, and the path it was given by."""
    known = [member for member in side.members if member.kept]
    if not known:
        return None
    found: dict[str, Any] = {}
    for member in known:
        inputs, recipe = (member.kept or {}).get("inputs", {}), leaves_of(member)
        for name, digest in _flat(inputs).items():
            key = _MADE_FROM.get(name, name)
            entry = found.setdefault(key, {"path": recipe.get(key), "of": set()})
            entry["of"].add(str(digest)[:12])
    return {key: _Content(entry["path"], tuple(sorted(entry["of"]))) for key, entry in found.items()}


@dataclass(frozen=True)
class _Content:
    """A path, which is only shown, and the hashes of what lay there, which are compared."""

    path: str | None
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        return f"{f'{self.path}, ' if self.path else ''}{', '.join(self.hashes)}"


def _reckoned(member: Member | None) -> dict[str, Any] | None:
    if member is None or member.run is None:
        return None
    try:
        launch = read_launch(member.run)
    except (OSError, ValueError):
        return None  # it is damaged, and `cheaptrain status` says so
    return {key: f"{launch[key]:,}" for key in _PLANNED if isinstance(launch.get(key), int)} or None


def _running(member: Member | None) -> dict[str, Any] | None:
    """Keys that may change when a run goes on."""
    if member is None:
        return None
    kept = member.kept or {}
    recipe, what = kept.get("recipe", {}), _flat(kept.get("identity", {}))
    with contextlib.suppress(ValidationError):  # of another version: as it is written
        recipe = Recipe.model_validate(recipe).model_dump(mode="json")
    return {
        key: variables.shown(key, value) if key.startswith("env.") else value
        for key, value in _flat(recipe).items()
        if key not in what and key not in _ALWAYS_OTHER
    }


def _flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
            value = {item["name"]: item for item in value}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return flat


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _meaning(value: Any) -> Any:
    return value.hashes if isinstance(value, _Content) else _shown(value)


def _shown(value: Any) -> str:
    if isinstance(value, _Content):
        return str(value)
    if value is None or value in ({}, []):
        return "not set"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
