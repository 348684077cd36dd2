"""The JSON schema of a recipe, for editors: completion, key descriptions, and a red line under a slip of the finger.

It checks what a single file can be judged by: keys and the shape of values. Required keys are not required here, for a
file may inherit them from one it extends; that, and what goes together, is what reading the recipe checks.
"""

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from cheaptrain.recipe.quantities import Span
from cheaptrain.recipe.schema import Recipe

_TEXTS = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}


def json_schema() -> dict[str, Any]:
    """A JSON schema (draft 2020-12) of one recipe file, `extends` and `unset` included."""
    schema = Recipe.model_json_schema(schema_generator=_TomlSchema)
    for table in [schema, *schema["$defs"].values()]:
        table["required"] = [key for key in table.get("required", []) if key == "name"]
    own = {
        "extends": {
            **_TEXTS,
            "title": "Extends",
            "description": "recipes to start from, relative to this file; later ones win, and this file over all",
            "examples": ["base.toml"],
        },
        "unset": {
            **_TEXTS,
            "title": "Unset",
            "description": "inherited keys to drop, dotted; a source by its name",
            "examples": [["train.tokens", "data.sources.wiki"]],
        },
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "cheaptrain recipe",
        "properties": own | schema["properties"],
    }


class _TomlSchema(GenerateJsonSchema):
    """As pydantic does it, but TOML has no null, and a span is text."""

    def nullable_schema(self, schema: Any) -> dict[str, Any]:
        return self.generate_inner(schema["schema"])

    def default_schema(self, schema: Any) -> dict[str, Any]:
        if schema.get("default", ...) is None:
            return self.generate_inner(schema["schema"])
        return super().default_schema(schema)

    def encode_default(self, dft: Any) -> Any:
        return str(dft) if isinstance(dft, Span) else super().encode_default(dft)
