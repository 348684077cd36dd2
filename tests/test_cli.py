"""The commands: what they take for what, and the exit code of what they refuse."""

import json
from pathlib import Path

import pytest
from recipe_texts import MINIMAL
from rich.console import Console

from cheaptrain import cli, doctor, launching
from cheaptrain.errors import EXIT_RECIPE, RecipeError
from cheaptrain.recipe.load import LoadedRecipe


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `cheaptrain ARGUMENTS`; returns its exit code."""
    monkeypatch.setattr("sys.argv", ["cheaptrain", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.mark.parametrize(
    "arguments",
    [
        [], ["trian"], ["prepare"], ["plan", "train.lr=3"], ["plan", "nowhere.toml"], ["schema", "out.json"],
        ["inspect", "a.toml", "--rows", "0"], ["prepare", "--shards", "1/2", "a.toml"],
        ["launch"], ["launch", "train.lr=3"], ["launch", "nowhere.toml"], ["launch", "a.toml", "--processes", "0"],
        ["launch", "a.toml", "--nodes", "2"], ["launch", "a.toml", "--node-rank", "1"], ["doctor", "nowhere.toml"],
    ],
)  # fmt: skip
def test_wrong_usage_ends_with_another_code_than_2(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, *arguments) == EXIT_RECIPE


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "/", "a/b", "1/2/3", "-1/2", "²/3", "1.0/2", ""])
def test_a_shard_that_is_none_is_taken_for_one(shard: str) -> None:
    with pytest.raises(RecipeError, match="write k/n with 1 <= k <= n"):
        cli._parse_shard(shard)


def test_a_folder_with_an_equals_sign_is_taken_for_an_override(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=3e-4.toml").write_text(MINIMAL, encoding="utf-8")
    recipes, keys = ["sweep/lr=3e-4/a.toml", "lr=3e-4.toml"], ["train.lr=3e-4", "run.dir=a/b=c", "data.dir=/x"]
    assert cli._split([*recipes, *keys]) == (recipes, keys)


def test_line_100_is_printed_as_a_picture(capsys: pytest.CaptureFixture[str]) -> None:
    cli._console().print("recipe.toml:100: seed", markup=False)
    assert capsys.readouterr().out == "recipe.toml:100: seed\n"


def test_the_schema_is_written_to_the_file_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(monkeypatch, "schema", "--out", str(tmp_path / "schema.json")) == 0
    schema = json.loads((tmp_path / "schema.json").read_text(encoding="utf-8"))
    assert schema["$schema"].endswith("2020-12/schema") and "train" in schema["properties"]
    assert run(monkeypatch, "schema", "--out", str(tmp_path / "no" / "schema.json")) == 1


def test_what_another_recipe_will_write_is_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fetched: list[str | None] = []
    monkeypatch.setattr("cheaptrain.model.hub.fetch_model", lambda model: fetched.append(model.init_from))
    monkeypatch.setattr("cheaptrain.data.prepare.prepare_recipe", lambda *_, **__: [])
    Path("a.toml").write_text(MINIMAL.replace("outputs/x", "one"), encoding="utf-8")
    for name, start in (("b", "one/final"), ("c", "org/model")):
        text = f'extends = "a.toml"\nunset = ["model.preset"]\n[run]\ndir = "{name}"\n[model]\ninit_from = "{start}"\n'
        Path(f"{name}.toml").write_text(text, encoding="utf-8")
    assert run(monkeypatch, "prepare", "a.toml", "b.toml", "c.toml") == 0
    assert fetched == [None, "org/model"]
    fetched.clear()
    assert run(monkeypatch, "prepare", "b.toml") == 0
    assert fetched == ["one/final"]  # alone nobody can tell it from a hub id


def test_launch_starts_something_when_only_asked_what(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "supervise", lambda *_: pytest.fail("it started"))
    Path("a.toml").write_text(MINIMAL, encoding="utf-8")
    assert run(monkeypatch, "launch", "a.toml", "train.lr=1e-3", "--processes", "2", "--dry-run") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1 and "--multi_gpu --num_processes 2" in printed
    assert printed.rstrip().endswith("run.py a.toml train.lr=1e-3")


@pytest.mark.parametrize("code", [0, 1, 4, 75])
def test_launch_answers_another_code_than_the_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launching, "visible_gpus", lambda environment: 0)
    monkeypatch.setattr(launching, "supervise", lambda *_: code)
    Path("a.toml").write_text(MINIMAL, encoding="utf-8")
    assert run(monkeypatch, "launch", "a.toml") == code


def test_doctor_is_given_other_recipes_than_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], int | None]] = []

    def examine(recipes: list[LoadedRecipe], console: Console, *, processes: int | None) -> None:
        asked.append(([f"{loaded.name} {loaded.recipe.seed}" for loaded in recipes], processes))

    monkeypatch.setattr(doctor, "examine", examine)
    Path(tmp_path / "a.toml").write_text(MINIMAL, encoding="utf-8")
    assert run(monkeypatch, "doctor") == 0
    assert run(monkeypatch, "doctor", str(tmp_path / "a.toml"), "seed=5", "--processes", "3") == 0
    assert asked == [([], None), (["a 5"], 3)]
