"""What a run *is*: the recipe without what may change between a run and its resumption.

A run that is resumed must be the same run. Operational keys (how often to log, how many rows fit the device, where the
folders are) may differ; anything else makes another run. The trap is comparing text: `tokens = "10B"` and
`tokens = 10_000_000_000` are one recipe, so values are compared as the schema reads them.
"""

import hashlib
import json
from collections.abc import Collection
from typing import Any, get_args

from cheaptrain.recipe.schema import Recipe, Section

# What a run may change when it goes on, if that is asked for: `resolve` decides it by the ledger of the checkpoint.
BATCH = ("train.global_batch_tokens",)
_PLAIN = (str, int, float, list, tuple)  # defaults that are written into an identity as they are


def identity(recipe: Recipe, without: Collection[str] = ()) -> dict[str, Any]:
    """Every key that is not operational, defaults included, as plain JSON values. Tables left empty are left out, and
    so are the dotted keys in `without` (none of them within a list of tables)."""
    kept: dict[str, Any] = json.loads(json.dumps(_identity(recipe)))  # tuples become lists, as they come from a file
    for name in without:
        *tables, key = name.split(".")
        table = kept
        for step in tables:
            table = table[step]
        del table[key]  # a name that is no key of a run's identity is a mistake of the caller
    return kept


def identity_hash(recipe: Recipe, without: Collection[str] = ()) -> str:
    """SHA-256 (hex) of the identity."""
    text = json.dumps(identity(recipe, without), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def identity_difference(old: dict[str, Any], new: dict[str, Any], without: Collection[str] = ()) -> list[str]:
    """What differs between two identities, a line a key: `train.lr: 0.0003 -> 0.0006`. Sources are matched by name.

    A key that is not there is at its default: a run that was started before the key existed is still the same run. The
    dotted keys in `without` are not compared.
    """
    before, after = leaves(old), leaves(new)
    lines = [
        f"{key}: {_shown(before.get(key))} -> {_shown(after.get(key))}"
        for key in dict.fromkeys([*_leaves(old), *_leaves(new)])
        if key not in without and _shown(before.get(key)) != _shown(after.get(key))
    ]
    first, then = _source_names(old), _source_names(new)
    if first != then and sorted(first) == sorted(then):
        lines.append(f"data.sources, in order: {', '.join(first)} -> {', '.join(then)}")
    return lines


def leaves(table: dict[str, Any]) -> dict[str, Any]:
    """Dotted key → value of an identity, perhaps of another version: defaults filled in, sources by name; what says
    nothing (null, {}) is left out."""
    return _leaves(_completed(Recipe, table))


def is_operational(section: type[Section], key: str) -> bool:
    """Whether the key may differ between a run and its resumption."""
    extra = section.model_fields[key].json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("operational"))


def _identity(value: Any) -> Any:
    if isinstance(value, Section):
        plain = value.model_dump(mode="json")
        kept = {}
        for key in type(value).model_fields:
            if is_operational(type(value), key):
                continue
            child = getattr(value, key)
            nested = isinstance(child, Section) or (isinstance(child, list) and child and isinstance(child[0], Section))
            inner = _identity(child) if nested else plain[key]
            if not isinstance(child, Section) or inner:
                kept[key] = inner
        return kept
    return [_identity(item) for item in value]


def _completed(section: type[Section], table: dict[str, Any]) -> dict[str, Any]:
    """`table`, perhaps of another version, and the defaults of the keys that it lacks, in the tables that it has."""
    whole = dict(table)
    for key, field in section.model_fields.items():
        inner, value = _section_in(field.annotation), table.get(key)
        if inner is not None and isinstance(value, dict):
            whole[key] = _completed(inner, value)
        elif inner is not None and isinstance(value, list):
            whole[key] = [_completed(inner, item) if isinstance(item, dict) else item for item in value]
        elif key not in table and not is_operational(section, key) and isinstance(field.default, _PLAIN):
            whole[key] = field.default
    return whole


def _section_in(annotation: Any) -> type[Section] | None:
    """The section that a key holds, alone or in a list, if it holds one."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _source_names(kept: dict[str, Any]) -> list[str]:
    """Names of the sources, in order. The identity may be another version's, so nothing is sure to be there."""
    sources = (kept.get("data") or {}).get("sources") or []
    return [str(source.get("name")) for source in sources]


def _leaves(table: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value. Named tables of a list go by their name; what says nothing (null, {}) is left out."""
    leaves: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
            value = {item["name"]: item for item in value}
        if isinstance(value, dict) and value:
            leaves |= _leaves(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            leaves[f"{prefix}{key}"] = value
    return leaves


def _shown(value: Any) -> str:
    return "not set" if value is None else json.dumps(value, ensure_ascii=False)
