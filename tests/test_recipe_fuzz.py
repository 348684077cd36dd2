"""Whatever a recipe says, the answer is a recipe or a list of problems, never a traceback."""

import copy
from pathlib import Path
from typing import Any

import pytest
import tomli
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from recipe_texts import MINIMAL

from cheaptrain.recipe.errors import RecipeProblems
from cheaptrain.recipe.keys import keys
from cheaptrain.recipe.load import load_recipe

TEXT = (
    MINIMAL
    + """
[parallel]
dp_shard = 4
step_timeout = "5min"
[env]
NCCL_IB_DISABLE = "1"
"""
)
NAMES = st.sampled_from(
    sorted({key.leaf for key in keys().values()} | {"lrr", "a.b", "", "learning_rate", "optim", "NCCL_DEBUG", "RANK"})
)
SCALARS = st.sampled_from(
    [0, 1, -1, 2**70, 10**400, 0.5, float("inf"), True, "", "x", "1%", "10B", "2h", "${env:NO_SUCH}", "~", "unset"]
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3), max_leaves=5
)


def toml(value: Any) -> str:
    """Any value as inline TOML."""
    if isinstance(value, dict):
        return "{" + ", ".join(f'"{key}" = {toml(inner)}' for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else repr(value)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for step, child in inner for found in places(child, (*path, step)))]


def change(draw: Any, tree: Any) -> None:
    """Replace, add or remove something somewhere."""
    path = draw(st.sampled_from(places(tree)[1:]))
    for step in path[:-1]:
        tree = tree[step]
    action = draw(st.sampled_from(["replace", "remove", "add"]))
    if action == "replace":
        tree[path[-1]] = draw(VALUES)
    elif action == "remove":
        del tree[path[-1]]
    elif isinstance(tree, dict):
        tree[draw(NAMES)] = draw(VALUES)


def outcome(path: Path, *overrides: str) -> None:
    try:
        loaded = load_recipe(path, overrides)
    except RecipeProblems as problems:
        assert problems.problems
        assert all(str(problem) for problem in problems.problems)
    else:
        assert set(loaded.provenance.values())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_broken_recipe_never_ends_in_a_traceback(tmp_path: Path, data: st.DataObject) -> None:
    base, child = copy.deepcopy(tomli.loads(TEXT)), data.draw(st.dictionaries(NAMES, VALUES, max_size=3))
    for _ in range(data.draw(st.integers(0, 4))):
        if places(base)[1:]:
            change(data.draw, base)
    (tmp_path / "base.toml").write_text("".join(f'"{key}" = {toml(value)}\n' for key, value in base.items()))
    child |= {"extends": "base.toml"} | data.draw(st.sampled_from([{}, {"unset": ["train.lr"]}, {"unset": ["data"]}]))
    (tmp_path / "child.toml").write_text("".join(f'"{key}" = {toml(value)}\n' for key, value in child.items()))
    outcome(tmp_path / "base.toml")
    outcome(tmp_path / "child.toml")
    outcome(tmp_path / "child.toml", "data.sources.web.weight=3", "train.lr=1", "model.overrides.x=1")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(parts=st.lists(NAMES | st.sampled_from(["wiki", "web"]), max_size=4), value=SCALARS | VALUES)
def test_a_broken_override_never_ends_in_a_traceback(tmp_path: Path, parts: list[str], value: Any) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(TEXT)
    text = value if isinstance(value, str) else toml(value)
    outcome(path, f"{'.'.join(parts)}={text}")
    outcome(path, f"data.sources.wiki.{'.'.join(parts)}={text}")
    outcome(path, f"env.{'.'.join(parts)}={text}", f"parallel.{'.'.join(parts)}={text}")


@pytest.mark.parametrize(
    "text", ["=", "", "a", "=3", "...=3", "train..lr=3", "data.sources=3", "data.sources.=3", "a\n=3"]
)
def test_odd_overrides(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL)
    with pytest.raises(RecipeProblems):
        load_recipe(path, [text])
