"""What every table of a recipe is made of: unknown keys refused, strict scalars, frozen, and what clashes said at once.

Keys marked operational (how often to log, how many rows fit the device) may differ between a run and its resumption;
every other key is part of what the run *is*. Keys marked path take `${env:NAME}`.
"""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from cheaptrain.recipe.quantities import Count

Positive = Annotated[float, Field(gt=0)]
PositiveCount = Annotated[Count, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]


class Clash(NamedTuple):
    """Keys that are each right and do not go together. `keys` are dotted, counted from the section that noticed.

    The first is the one to drop; with `one_of`, any of them.
    """

    message: str
    keys: tuple[str, ...]
    one_of: bool = False


class Section(BaseModel):
    """A table of the recipe: unknown keys refused, strict scalars, finite numbers, frozen."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True, allow_inf_nan=False)

    def clashes(self) -> Iterator[Clash]:
        """What is wrong between keys of this section; each key by itself has been checked."""
        return iter(())

    @model_validator(mode="after")
    def _no_clash(self) -> Self:
        found = list(self.clashes())
        if found:
            message = "; ".join(clash.message for clash in found)
            raise PydanticCustomError("clash", "{message}", {"message": message, "clashes": found})
        return self

    def _given(self, *names: str) -> tuple[str, ...]:
        return tuple(name for name in names if getattr(self, name) is not None)

    def _exactly_one(self, *names: str) -> Iterator[Clash]:
        given = self._given(*names)
        if len(given) != 1:
            got = " and ".join(given) or "none"
            yield Clash(f"give exactly one of {', '.join(names)}; got {got}", given or names, one_of=True)


def operational(default: Any, description: str, *, path: bool = False, **constraints: Any) -> Any:
    """A key that may change between a run and its resumption: it says how, not what."""
    extra: Any = {"operational": True} | ({"path": True} if path else {})
    return Field(default, description=description, json_schema_extra=extra, **constraints)


def location(description: str) -> Any:
    """An optional key that names files, a folder or a hub id."""
    return Field(None, description=description, json_schema_extra={"path": True})
