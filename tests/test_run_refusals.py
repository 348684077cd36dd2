"""What a launch refuses before its first step, instead of training on it or failing hours later."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_runs import prepare, recipe_table, run_child, tail, train, write_recipe, write_texts
from tokenizers import Tokenizer

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data and one finished stage, `first`."""
    path = tmp_path_factory.mktemp("refusals")
    write_texts(path)
    recipe = write_recipe(path / "first.toml", _table(path, "first"))
    prepare(recipe)
    assert run_child(train(recipe), path / "first.log") == 0, tail(path / "first.log")
    return path


def _table(folder: Path, run: str, **model: Any) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": STEPS, "warmup": 0}
    table["checkpoint"] = {"every": "2 steps"}
    return table | ({"model": model} if model else {})


def test_two_recipes_for_one_folder_are_refused_before_either_trains(folder: Path) -> None:
    table = _table(folder, "shared")
    one = write_recipe(folder / "one.toml", table)
    table["train"]["lr"] = 1e-3
    other = write_recipe(folder / "other.toml", table)
    assert run_child(train(one, other), folder / "shared.log") == 2
    assert "one.toml" in tail(folder / "shared.log") and "another run.dir" in tail(folder / "shared.log")
    assert not (folder / "shared").exists()


def test_a_stage_named_before_the_one_it_starts_from_is_told_the_order(folder: Path) -> None:
    early = write_recipe(folder / "early.toml", _table(folder, "early"))
    late = write_recipe(folder / "late.toml", _table(folder, "late", init_from=str(folder / "early" / "final")))
    assert run_child(train(late, early), folder / "order.log") == 2
    assert f"name {early} first" in tail(folder / "order.log")
    assert not (folder / "early").exists()


def test_weights_trained_with_another_tokenizer_of_the_same_size_are_refused(folder: Path) -> None:
    table = _table(folder, "noise", init_from=str(folder / "first" / "final"))
    table["tokenizer"]["train"]["sources"] = ["notes"]
    recipe = write_recipe(folder / "noise.toml", table)
    prepare(recipe)
    assert run_child(train(recipe), folder / "noise.log") == 2
    assert "another tokenizer" in tail(folder / "noise.log") and 'Set tokenizer.path = "' in tail(folder / "noise.log")
    assert not (folder / "noise").exists()


def test_special_tokens_may_be_renamed_between_stages(folder: Path) -> None:
    renamed = folder / "renamed"
    shutil.copytree(folder / "first" / "final", renamed, ignore=shutil.ignore_patterns("state", "manifest.json"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (renamed / name).read_text(encoding="utf-8").replace("<|reserved_0|>", "<|think|>")
        (renamed / name).write_text(text, encoding="utf-8")
    assert Tokenizer.from_file(str(renamed / "tokenizer.json")).token_to_id("<|think|>") is not None
    table = _table(folder, "thinks", init_from=str(folder / "first" / "final"))
    table["tokenizer"] = {"path": str(renamed)}
    recipe = write_recipe(folder / "thinks.toml", table)
    prepare(recipe)
    assert run_child(train(recipe), folder / "thinks.log") == 0, tail(folder / "thinks.log")


def test_a_changed_config_json_is_not_taken_for_the_finished_run(folder: Path) -> None:
    shape = folder / "shape"
    shape.mkdir()
    config = json.loads((folder / "first" / "final" / "config.json").read_text())
    (shape / "config.json").write_text(json.dumps(config))
    recipe = write_recipe(folder / "shaped.toml", _table(folder, "shaped", config=str(shape)))
    assert run_child(train(recipe), folder / "shaped.log") == 0, tail(folder / "shaped.log")
    (shape / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert run_child(train(recipe), folder / "shaped.log") == 3
    assert "input config: " in tail(folder / "shaped.log")


def test_a_tokenizer_that_no_checkpoint_could_carry_is_refused_before_the_first_step(folder: Path) -> None:
    """An ordinary word as end-of-text comes back from a saved folder as a special token: other ids for the same
    text."""
    vocabulary = Tokenizer.from_file(str(folder / "first" / "final" / "tokenizer.json")).get_vocab()
    texts = "".join((folder / f"{name}.jsonl").read_text() for name in ("prose", "notes"))
    word = next(token for token in sorted(vocabulary) if len(token) == 1 and token.isascii() and token not in texts)
    table = _table(folder, "word")
    table["tokenizer"] = {"path": str(folder / "first" / "final"), "end_of_text": word}
    recipe = write_recipe(folder / "word.toml", table)
    prepare(recipe)
    assert run_child(train(recipe), folder / "word.log") == 3
    assert "tokenizer.end_of_text" in tail(folder / "word.log")
    assert not (folder / "word").exists()


def test_prompts_of_the_second_stage_are_checked_before_the_first_trains(folder: Path) -> None:
    table = _table(folder, "talks", init_from=str(folder / "quiet" / "final"))
    table["samples"] = {"prompts": ["river " * 300]}
    quiet = write_recipe(folder / "quiet.toml", _table(folder, "quiet"))
    talks = write_recipe(folder / "talks.toml", table)
    assert run_child(train(quiet, talks), folder / "talks.log") == 3
    assert "talks.toml: samples.prompts" in tail(folder / "talks.log")
    assert not (folder / "quiet").exists()


@pytest.mark.parametrize("name, value", [("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR"), ("ACCELERATE_USE_FSDP", "true")])
def test_what_the_launcher_asks_for_is_not_dropped_silently(folder: Path, name: str, value: str) -> None:
    def work() -> None:
        os.environ[name] = value
        train(str(folder / "first.toml"))()

    assert run_child(work, folder / f"{name}.log") == 3
    assert f"{name} = {value}" in tail(folder / f"{name}.log")
