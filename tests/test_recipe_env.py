"""`[env]`: what a recipe sets for its processes is text, under names that are free to be set."""

from pathlib import Path

import pytest
from recipe_texts import MINIMAL, line_of, load_text

from cheaptrain.recipe.errors import RecipeProblems
from cheaptrain.recipe.load import LoadedRecipe, load_recipe


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def with_env(*lines: str, name: str = "recipe.toml") -> LoadedRecipe:
    return load_text(Path(), MINIMAL + "\n[env]\n" + "\n".join(lines) + "\n", name=name)


def problem(*lines: str) -> str:
    with pytest.raises(RecipeProblems) as caught:
        with_env(*lines)
    (found,) = caught.value.problems
    return str(found)


def test_a_number_becomes_text_that_nobody_wrote() -> None:
    where = f"recipe.toml:{line_of(MINIMAL, 'lr = 3e-4') + 3}: env.A: the value of an environment variable is text"
    assert problem("A = 1") == f'{where}: write it in quotes, "1"'
    assert problem("A = 1.5").endswith('write it in quotes, "1.5"')
    assert problem("A = true").endswith('write it in quotes, "true"')
    assert problem("A = 2026-01-01").endswith('write it in quotes, "2026-01-01"')
    assert problem("A = [1]") == problem("A = { B = 1 }") == where
    assert with_env('A = "007"').recipe.env == {"A": "007"}


@pytest.mark.parametrize("name", ["A-B", "1A", "A B", "A=B", "", "ÄB", "A.B", "A\\nB"])
def test_a_name_that_no_environment_takes_is_set(name: str) -> None:
    assert "is no name of an environment variable" in problem(f'"{name}" = "x"')


@pytest.mark.parametrize(
    "name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "ACCELERATE_USE_FSDP", "TORCHELASTIC_X"]
)
def test_a_recipe_makes_every_process_the_first(name: str) -> None:
    assert "the launcher sets this one" in problem(f'{name} = "0"')


def test_every_wrong_variable_is_shown_at_once() -> None:
    with pytest.raises(RecipeProblems) as caught:
        with_env("A = 1", '"B C" = "x"', 'RANK = "0"', 'GOOD = "1"', r'D = "a\u0000b"')
    assert [found.key for found in caught.value.problems] == ["env.A", "env.B C", "env.RANK", "env.D"]


def test_a_variable_is_expanded_or_inherited_values_are_lost() -> None:
    assert "expanded in paths only" in problem('A = "${env:HOME}/x"')
    with_env('A = "1"', 'B = "2"', name="base.toml")
    Path("child.toml").write_text('extends = "base.toml"\nunset = ["env.A"]\n[env]\nB = "3"\nC = "4"\n')
    loaded = load_recipe("child.toml", ["env.C=unset", "env.D=5"])
    assert loaded.recipe.env == {"B": "3", "D": "5"}
    assert loaded.provenance["env.B"] == "child.toml:4"
    assert loaded.provenance["env.D"] == "command line"
