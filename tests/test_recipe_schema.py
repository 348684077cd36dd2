"""What is documented, completed in editors and shipped is what is read."""

import os
import re
from pathlib import Path
from typing import Any

import pytest
import tomli
from recipe_texts import MINIMAL, load_text

from cheaptrain.recipe.keys import keys
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.reference import with_tables
from cheaptrain.recipe.schema_json import json_schema

ROOT = Path(__file__).parent.parent
SHIPPED = sorted((ROOT / "recipes").rglob("*.toml"))
BASES = [path for path in SHIPPED if path.parent.name == "parts"]  # no recipes of their own: they lack what others add


def resolved(schema: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
    name = part.get("$ref", "").rpartition("/")[2]
    return schema["$defs"][name] if name else part


def keys_of(schema: dict[str, Any], part: dict[str, Any], prefix: str = "") -> set[str]:
    found = set()
    for name, inner in part["properties"].items():
        found.add(prefix + name)
        table = resolved(schema, inner.get("items", inner))
        if "properties" in table:
            assert table["additionalProperties"] is False, "an unknown key must be marked"
            found |= keys_of(schema, table, f"{prefix}{name}.")
    return found


def test_editors_know_every_key_and_no_other() -> None:
    schema = json_schema()
    assert keys_of(schema, schema) == set(keys()) | {"extends", "unset"}
    assert schema["additionalProperties"] is False
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_every_key_says_what_it_is() -> None:
    for key in keys().values():
        assert len(key.field.description or "") >= 5, key.name


def test_editors_do_not_offer_null_and_write_spans_as_text() -> None:
    schema = json_schema()
    assert "null" not in str(schema).replace("'nullable'", "")
    assert schema["$defs"]["Validation"]["properties"]["every"]["default"] == "10%"


def test_editors_accept_what_is_read_and_mark_what_is_not(tmp_path: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    validator.check_schema(json_schema())
    check = validator(json_schema())
    load_text(tmp_path, MINIMAL)
    assert not list(check.iter_errors(tomli.loads(MINIMAL)))
    part = 'extends = ["a.toml"]\nunset = "train.tokens"\n[train]\nwarmup = "1%"\nbetas = [0.9, 0.95]\nsteps = 5\n'
    part += (
        '[run]\nmax_time = "23h 45min"\n[parallel]\ndp_shard = "auto"\nstep_timeout = 60\n[env]\nNCCL_DEBUG = "INFO"\n'
    )
    assert not list(check.iter_errors(tomli.loads(part))), "a file that extends another need not be complete"
    for wrong in (
        "[train]\nlrr = 1",
        "[train]\nwarmup = 5",
        "[train]\nschedule = 'x'",
        "sources = []",
        "[run]\ndir = 1",
        "[run]\nmax_time = '5400'",
        "[run]\nmax_time = 0",
        "[parallel]\ntp = 0",
        "[parallel]\ndp_shard = 'all'",
        "[env]\nA = 1",
        "[env]\n'A B' = '1'",
    ):
        assert list(check.iter_errors(tomli.loads(wrong))), wrong


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_are_right_for_editors_too(path: Path) -> None:
    validator = pytest.importorskip("jsonschema").Draft202012Validator
    assert not list(validator(json_schema()).iter_errors(tomli.loads(path.read_text(encoding="utf-8"))))


@pytest.mark.parametrize("path", sorted({*SHIPPED} - {*BASES}), ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_recipes_load(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in re.findall(r"\$\{env:(\w+)\}", path.read_text(encoding="utf-8")):
        monkeypatch.setenv(variable, os.environ.get(variable, "/somewhere"))
    monkeypatch.chdir(ROOT)
    assert load_recipe(path.relative_to(ROOT)).name == path.stem


@pytest.mark.parametrize("base", BASES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_shipped_base_is_built_upon(base: Path) -> None:
    loaded = [load_recipe(path) for path in base.parents[1].rglob("*.toml") if path.parent.name != "parts"]
    assert any(Path(file).resolve() == base for recipe in loaded for file in recipe.files)


def test_the_reference_is_up_to_date() -> None:
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert with_tables(document) == document, "run: python -m cheaptrain.recipe.reference docs/recipes.md"


def test_the_recipe_in_the_reference_loads(tmp_path: Path) -> None:
    document = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    complete, child, variables = re.findall(r"```toml\n(.*?)```", document, re.DOTALL)
    assert load_text(tmp_path, complete, name="phase1.toml").recipe.train.tokens == 10_000_000_000
    recipe = load_text(tmp_path, child, name="child.toml").recipe
    assert recipe.train.steps == 1000
    assert [source.weight for source in recipe.data.sources] == [70, 50]
    assert load_text(tmp_path, complete + variables).recipe.env["NCCL_IB_DISABLE"] == "1"
