"""Scoring tasks while training changes what is trained, hangs, or is forgotten at a stop."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    final_state,
    final_weights,
    on_call,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train,
    train_together,
    write_recipe,
    write_texts,
)
from task_folders import write_tasks

from cheaptrain.evaluate import harness, suite  # here, so that no child has to
from cheaptrain.train import chain

STEPS = 4
LIGHT = {"light": ["nature", "rivers"], "every": "2 steps", "batch_size": 4}


def _table(folder: Path, run: str, examined: dict[str, Any] | None = None) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": STEPS, "warmup": "1 steps"}
    table["model"] |= {"overrides": {"attention_dropout": 0.3}}  # so that random numbers are drawn in every step
    table["checkpoint"] = {"every": "2 steps", "keep_last": 9}
    table["validation"]["every"] = "3 steps"
    if examined:
        table["eval"] = {"task_folder": str(folder / "tasks"), **examined}
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examined")
    write_texts(path, 80)
    write_tasks(path)
    recipe = write_recipe(path / "plain.toml", _table(path, "plain"))
    prepare(recipe)
    assert run_child(_trained(recipe), path / "plain.log") == 0, tail(path / "plain.log")
    light = write_recipe(path / "light.toml", _table(path, "light", {**LIGHT, "tasks": ["nature", "rivers"]}))
    assert run_child(_trained(light), path / "light.log") == 0, tail(path / "light.log")
    return path


def _trained(recipe: str) -> Callable[[], None]:
    """Work for a child: train, without a plan, which takes longer than the run."""

    def work() -> None:
        chain.print_plan = lambda *_: None  # type: ignore[assignment]
        train(recipe)()

    return work


def _kept(run: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((run / "eval" / "step-000004" / "eval.json").read_text(encoding="utf-8"))
    return kept


def _without_eval(run: Path) -> list[dict[str, Any]]:
    """What the run recorded but times and scores of tasks."""
    records = []
    for record in read_lines(run / "metrics.jsonl"):
        if "eval/seconds" in record or "checkpoint/step" in record:
            continue
        keep = {key: value for key, value in record.items() if "second" not in key and not key.startswith("system/")}
        records.append(keep)
    return records


def _scores(run: Path) -> dict[int, dict[str, Any]]:
    records = [record for record in read_lines(run / "metrics.jsonl") if "eval/seconds" in record]
    return {record.pop("step"): {k: v for k, v in record.items() if k != "eval/seconds"} for record in records}


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_scoring_while_training_changes_what_is_trained(folder: Path) -> None:
    _same(final_weights(folder / "plain"), final_weights(folder / "light"))
    _same(final_state(folder / "plain"), final_state(folder / "light"))
    assert _without_eval(folder / "plain") == _without_eval(folder / "light")
    scores = _scores(folder / "light")
    assert list(scores) == [0, 2, 4]
    assert scores[4]["eval/stones/n"] == 12 and scores[4]["eval/pebbles/n"] == 7
    mean = (scores[4]["eval/stones"] + scores[4]["eval/pebbles"]) / 2
    assert scores[4]["eval/nature"] == pytest.approx(mean) and scores[4]["eval/nature/n"] == 19
    assert "eval/stones/stderr" in scores[4] and "eval/rivers" in scores[4]


def test_the_last_light_scores_are_not_those_of_the_checkpoint_on_disk(folder: Path) -> None:
    kept, last = _kept(folder / "light"), _scores(folder / "light")[4]
    assert {result["task"] for result in kept["results"]} == {"stones", "pebbles", "rivers", "nature"}
    for result in kept["results"]:
        main = result["metrics"][0]
        assert last[f"eval/{result['task']}"] == main["value"]
        assert last.get(f"eval/{result['task']}/stderr") == main["stderr"]
        assert last[f"eval/{result['task']}/n"] == result["n"]
    assert (kept["checkpoint"]["step"], kept["checkpoint"]["tokens"]) == (4, 4 * 256)
    assert "light in tasks" in (folder / "light.log").read_text()


def test_processes_that_share_a_model_score_it_otherwise_than_one(folder: Path) -> None:
    table = _table(folder, "shared", {**LIGHT, "tasks": ["nature", "rivers"]})
    table["parallel"] = {"dp_shard": 2}
    both, log = write_recipe(folder / "shared.toml", table), folder / "shared.log"
    assert train_together(2, [both], log) == {0: 0, 1: 0}, tail(log)
    first, second = _scores(folder / "light"), _scores(folder / "shared")
    # The weights differ in their last bits once trained by two; at step 0 they are the same.
    assert list(first) == list(second) and first[0] == second[0]
    results = _kept(folder / "shared")["results"]
    assert {result["task"] for result in results} == {"stones", "pebbles", "rivers", "nature"}


def test_a_stop_while_tasks_are_scored_leaves_half_a_record_or_none_later(folder: Path) -> None:
    recipe, log = write_recipe(folder / "stopped.toml", _table(folder, "stopped", LIGHT)), folder / "stopped.log"

    def stopped_in_the_second() -> None:
        on_call(harness.lm_eval, "evaluate", 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        _trained(recipe)()

    assert run_child(stopped_in_the_second, log) == 75, tail(log)
    assert list(_scores(folder / "stopped")) == [0]
    assert run_child(_trained(recipe), log) == 0, tail(log)
    assert _scores(folder / "stopped") == _scores(folder / "light")
    _same(final_weights(folder / "plain"), final_weights(folder / "stopped"))


def test_a_task_that_fails_ends_the_run(folder: Path) -> None:
    table = _table(folder, "failing", LIGHT | {"tasks": ["stones", "rivers"]})
    recipe, log = write_recipe(folder / "failing.toml", table), folder / "failing.log"

    def failing() -> None:
        def broken(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("no rivers")

        harness.HFLM.generate_until = broken  # type: ignore[method-assign,assignment]
        _trained(recipe)()

    assert run_child(failing, log) == 1, tail(log)
    assert "rivers" in tail(log) and "no rivers" in tail(log)
    _same(final_weights(folder / "plain"), final_weights(folder / "failing"))
    assert [score["eval/failed"] for score in _scores(folder / "failing").values()] == [1, 1, 1]
    # What failed is scored when the finished run is asked for once more; what stands is not scored again.
    before = _kept(folder / "failing")["results"]
    assert run_child(_trained(recipe), log) == 0, tail(log)
    kept = _kept(folder / "failing")
    assert {result["task"] for result in kept["results"]} == {"stones", "rivers"}
    assert [r for r in kept["results"] if r["task"] == "stones"] == before


def test_a_name_mistyped_is_found_at_the_end_of_the_run(folder: Path) -> None:
    recipe = write_recipe(folder / "typo.toml", _table(folder, "typo", {"tasks": ["stonse"]}))
    log = folder / "typo.log"
    assert run_child(_without_lm_evals_own(recipe), log) == 3, tail(log)
    assert "did you mean stones" in tail(log) and not (folder / "typo" / "checkpoints").exists()


def test_another_choice_of_tasks_makes_another_run(folder: Path) -> None:
    recipe = write_recipe(folder / "plain-2.toml", _table(folder, "plain", {"tasks": ["stones"], "limit": 4}))
    log = folder / "plain-2.log"
    assert run_child(_trained(recipe), log) == 0, tail(log)
    kept = _kept(folder / "plain")
    assert [(result["task"], result["n"]) for result in kept["results"]] == [("stones", 4)]


def _without_lm_evals_own(recipe: str) -> Callable[[], None]:
    """Train in a child that lists lm-eval's own tasks as none, which saves half a minute."""

    def work() -> None:
        plain = suite.TaskManager
        suite.TaskManager = lambda **options: plain(**{**options, "include_defaults": False})  # type: ignore[misc,assignment]
        _trained(recipe)()

    return work
