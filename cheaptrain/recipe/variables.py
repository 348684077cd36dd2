"""`[env]`: environment variables that a recipe sets for every process of its launch.

They are text: `NCCL_IB_DISABLE = "1"`. A number is refused rather than turned into text, because the two would part one
day (`0x10`, `1e3`, `007`). Names that tell the processes apart belong to the launcher; a recipe that set `RANK` would
start eight times the first process.
"""

import re
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, WithJsonSchema

HIDDEN = "(not shown)"
_SECRET = re.compile(r"key|token|secret|passw|credential|auth", re.IGNORECASE)
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LAUNCHERS = {
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
}
_LAUNCHERS_PREFIXES = ("ACCELERATE_", "TORCHELASTIC_", "PET_", "CHEAPTRAIN_")


def shown(name: str, value: Any) -> Any:
    """`value` of the variable `name` as it may stand in what is passed on: not at all where the name sounds secret."""
    return HIDDEN if _SECRET.search(name) else value


def _name(name: str) -> str:
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name of an environment variable: letters, digits and _, no digit first")
    if name in _LAUNCHERS or name.startswith(_LAUNCHERS_PREFIXES):
        raise ValueError("the launcher sets this one for each process; leave it out")
    return name


def _value(value: Any) -> Any:
    if not isinstance(value, str):
        text = str(value).lower() if isinstance(value, bool) else str(value)
        hint = "" if isinstance(value, dict | list) else f': write it in quotes, "{text}"'
        raise ValueError(f"the value of an environment variable is text{hint}")
    if "\0" in value:
        raise ValueError("the value of an environment variable cannot hold \\0")
    return value


Variables = Annotated[
    dict[Annotated[str, AfterValidator(_name)], Annotated[str, BeforeValidator(_value)]],
    WithJsonSchema(
        {
            "type": "object",
            "propertyNames": {"pattern": f"^{_NAME.pattern}$"},
            "additionalProperties": {"type": "string"},
            "examples": [{"NCCL_IB_DISABLE": "1"}],
        }
    ),
]
