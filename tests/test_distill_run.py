"""Whole distillation runs: a teacher trained for a moment, and students of it, killed, resumed and refused."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    final_state,
    final_weights,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train,
    train_until,
    write_recipe,
    write_texts,
)

STEPS = 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, prepared data, and a teacher of 60 steps with its first student, trained by one command."""
    path = tmp_path_factory.mktemp("distilled")
    write_texts(path)
    recipe = write_recipe(path / "teacher.toml", recipe_table(path, "teacher"))
    prepare(recipe)
    log = path / "both.log"
    assert run_child(train(recipe, _student(path, "student")), log) == 0, tail(log)
    return path


def _student(folder: Path, run: str, **distill: Any) -> str:
    table = recipe_table(folder, run)
    table["model"] = {"preset": "tiny-llama", "overrides": {"num_hidden_layers": 1}}
    table["train"] |= {"objective": "distill", "steps": STEPS}
    table["distill"] = {"teacher": str(folder / "teacher" / "final"), "alpha": 0.8, "temperature": 2.0, **distill}
    return write_recipe(folder / f"{run}.toml", table)


def _steps(run: Path) -> list[dict[str, Any]]:
    return [record for record in read_lines(run / "metrics.jsonl") if "train/loss" in record]


def test_a_student_comes_nearer_to_its_teacher_and_the_metrics_add_up(folder: Path) -> None:
    steps = _steps(folder / "student")
    assert len(steps) == STEPS
    for record in steps:
        mixed = 0.8 * record["kd/loss"] + 0.2 * record["train/cross_entropy"]
        assert record["train/loss"] == pytest.approx(mixed, rel=1e-5)
        assert 0 <= record["kd/agreement"] <= 1 and 0 <= record["train/accuracy"] <= 1
    first, last = steps[0], steps[-1]
    assert last["kd/loss"] < 0.5 * first["kd/loss"] and last["train/cross_entropy"] < first["train/cross_entropy"] - 1
    assert "kd/loss" not in _steps(folder / "teacher")[0]


def test_a_stopped_student_goes_on_as_the_one_never_stopped(folder: Path) -> None:
    recipe, log = _student(folder, "stopped"), folder / "stopped.log"

    assert run_child(train_until(recipe, 13), log) == 75, tail(log)
    assert run_child(train(recipe), log) == 0, tail(log)
    for of in (final_weights, final_state):
        ours, theirs = of(folder / "stopped"), of(folder / "student")
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    ours, theirs = _steps(folder / "stopped"), _steps(folder / "student")
    assert [record["kd/loss"] for record in ours] == [record["kd/loss"] for record in theirs]


def test_a_run_does_not_go_on_with_another_teacher(folder: Path) -> None:
    recipe, log = _student(folder, "other"), folder / "other.log"

    assert run_child(train_until(recipe, 6), log) == 75, tail(log)
    other = folder / "teacher" / "checkpoints" / "step-000055"
    assert run_child(train(_student(folder, "other", teacher=str(other))), log) == 3
    assert "teacher" in tail(log).splitlines()[-1]


def _run_refused(folder: Path, recipe: str, name: str) -> str:
    log = folder / f"{name}.log"
    assert run_child(train(recipe), log) == 3, tail(log)
    return " ".join(tail(log).split())


def test_a_teacher_with_another_tokenizer_is_refused_before_step_0(folder: Path) -> None:
    teacher = folder / "renamed"
    teacher.mkdir()
    for file in (folder / "teacher" / "final").resolve().iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "manifest.json":
            (teacher / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((teacher / "tokenizer.json").read_text(encoding="utf-8"))
    ids = tokenizer["model"]["vocab"]
    first, second = sorted(ids, key=ids.get)[300:302]
    ids[first], ids[second] = ids[second], ids[first]
    (teacher / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    said = _run_refused(folder, _student(folder, "renamed-run", teacher=str(teacher)), "renamed")
    assert re.search(r"2 of \d+ ids mean something else to the teacher", said)
    assert f"{ids[second]} is {first!r} here and {second!r} there" in said
    assert not (folder / "renamed-run" / "metrics.jsonl").exists()
    (teacher / "tokenizer.json").unlink()
    said = _run_refused(folder, _student(folder, "bare-run", teacher=str(teacher)), "bare")
    assert "holds no tokenizer.json that can be read" in said


def test_more_of_a_teacher_is_asked_than_it_has(folder: Path) -> None:
    log = folder / "more.log"
    assert run_child(train(_student(folder, "more-run", top_k=100_000)), log) == 2, tail(log)
    assert "distill.top_k = 100,000: the tokenizer has" in tail(log)


def test_a_teacher_too_short_for_the_rows_is_refused_before_step_0(folder: Path) -> None:
    teacher = folder / "short"
    teacher.mkdir()
    for file in (folder / "teacher" / "final").resolve().iterdir():
        if file.suffix in (".json", ".safetensors") and file.name != "manifest.json":
            (teacher / file.name).write_bytes(file.read_bytes())
    config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
    (teacher / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 63}), encoding="utf-8")
    said = _run_refused(folder, _student(folder, "short-run", teacher=str(teacher)), "short")
    assert "distill.teacher: it has 63 positions, and rows are 64 tokens long" in said
