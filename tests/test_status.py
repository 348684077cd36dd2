"""`cheaptrain status`: what it says of runs that are done, running, killed, damaged, stale; and that it only reads."""

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_runs import at_step, in_child, prepare, recipe_table, run_child, tail, train, write_recipe, write_texts
from tiny_recipe import pipe

from cheaptrain.checkpoint.lock import RunLock, holder
from cheaptrain.errors import RecipeError
from cheaptrain.report.status import StageStatus, status_of
from cheaptrain.report.status_view import print_status
from cheaptrain.report.subjects import subjects_of

STEPS = 6


def _table(folder: Path, run: str, **model: Any) -> dict[str, Any]:
    table = recipe_table(folder, f"outputs/{run}")
    table["train"] |= {"steps": STEPS, "warmup": 0}
    table["checkpoint"] = {"every": "2 steps"}
    table["validation"] = {"every": "3 steps", "tokens": 64}
    return table | ({"model": model} if model else {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished stages, the second from the weights of the first, and the recipe of a third."""
    path = tmp_path_factory.mktemp("status")
    write_texts(path)
    one = write_recipe(path / "one.toml", _table(path, "one"))
    two = write_recipe(path / "two.toml", _table(path, "two", init_from=str(path / "outputs/one/final")))
    write_recipe(path / "three.toml", _table(path, "three", init_from=str(path / "outputs/two/final")))
    prepare(one)
    assert run_child(train(one, two), path / "made.log") == 0, tail(path / "made.log")
    return path


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """The same, and what a test did to the runs undone afterwards."""
    shutil.copytree(made / "outputs", made / "kept", symlinks=True)
    yield made
    shutil.rmtree(made / "outputs")
    os.rename(made / "kept", made / "outputs")


def _status(*what: object) -> dict[str, StageStatus]:
    return {stage.name: stage for stage in status_of(subjects_of([str(each) for each in what]))}


def _recipes(folder: Path) -> list[Path]:
    return [folder / f"{name}.toml" for name in ("one", "two", "three")]


def test_a_chain_shows_what_is_done_and_what_is_not_started_ancestors_first(folder: Path) -> None:
    backwards = list(reversed(_recipes(folder)))
    stages = _status(*backwards)
    assert list(stages) == ["one", "two", "three"]
    assert [stage.state for stage in stages.values()] == ["done", "done", "not started"]
    assert (stages["two"].step, stages["two"].steps, stages["two"].tokens) == (STEPS, STEPS, STEPS * 256)
    assert stages["two"].checkpoint == str(folder / "outputs/two/final")
    lines = (folder / "outputs/two/metrics.jsonl").read_text().splitlines()
    held_out = [json.loads(line)["val/loss"] for line in lines if "val/loss" in line]
    assert stages["two"].validation_loss == held_out[-1] and len(held_out) == 3
    assert stages["three"].step is None and stages["three"].steps == STEPS


def test_runs_are_found_below_a_folder_and_checkpoints_are_not_taken_for_runs(folder: Path) -> None:
    assert list(_status(folder / "outputs")) == ["one", "two"]
    assert list(_status(folder / "outputs/one")) == ["one"]
    assert list(_status(folder / "outputs/two")) == ["one", "two"]  # and where it came from
    with pytest.raises(RecipeError, match="no such recipe or folder"):
        _status(folder / "outputs/twoo")


def test_a_stage_without_prepared_data_is_not_prepared(folder: Path) -> None:
    table = _table(folder, "four")
    table["data"]["validation"] = 0.2
    recipe = write_recipe(folder / "four.toml", table)
    stage = _status(recipe)["four"]
    assert stage.state == "not prepared" and len(stage.notes) == 2
    assert "source 'prose' is not prepared" in stage.notes[0] and "cheaptrain prepare" in stage.notes[0]


def test_status_changes_no_byte_no_time_and_makes_no_file(folder: Path) -> None:
    def tree() -> dict[str, tuple[int, int, int]]:
        found = {}
        for place, folders, files in os.walk(folder):
            for name in (*folders, *files, "."):
                stat = (Path(place) / name).lstat()
                found[f"{place}/{name}"] = (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size)
        return found

    (folder / "outputs/two/final").unlink()  # something to put right, for whoever writes
    shutil.copytree(folder / "outputs/two/checkpoints/step-000004", folder / "outputs/two/checkpoints/.writing-x")
    before = tree()
    console, written = pipe()
    print_status([str(recipe) for recipe in _recipes(folder)], console, as_json=False)
    print_status([str(folder / "outputs")], console, as_json=True)
    assert tree() == before
    assert "not started" in written.getvalue()


def test_a_stage_whose_ancestor_was_trained_anew_is_stale_and_so_is_what_came_of_it(folder: Path) -> None:
    assert run_child(train(str(folder / "three.toml")), folder / "three.log") == 0, tail(folder / "three.log")
    os.rename(folder / "outputs/one", folder / "outputs/moved")
    assert run_child(train(str(folder / "one.toml"), "train.lr=1e-3"), folder / "anew.log") == 0
    stages = _status(folder / "three.toml")
    assert [(name, stage.state) for name, stage in stages.items()] == [
        ("one", "done"), ("two", "stale"), ("three", "stale"),
    ]  # fmt: skip
    assert "model.init_from" in stages["two"].notes[0] and "other weights" in stages["two"].notes[0]
    assert "stale itself" in stages["three"].notes[0]
    os.rename(folder / "outputs/two", folder / "away")
    gone = _status(folder / "three.toml")["three"]
    assert gone.state == "done" and "two/final' is not there any more" in gone.notes[0]
    asked = _status(folder / "two.toml", folder / "three.toml")  # a chain of both would refuse it
    assert (asked["two"].state, asked["three"].state) == ("not started", "stale")
    assert "is gone and would be trained anew" in asked["three"].notes[0]
    shutil.rmtree(folder / "away")


def test_a_run_shows_as_running_while_it_does_and_as_interrupted_after_kill_9(folder: Path) -> None:
    def work() -> None:
        at_step(5, lambda stage: time.sleep(60))
        train(str(folder / "three.toml"))()

    pid = in_child(work, folder / "killed.log")
    metrics = folder / "outputs/three/metrics.jsonl"
    deadline = time.monotonic() + 60
    saved = folder / "outputs/three/checkpoints/step-000004"
    while not (saved.exists() and metrics.exists() and '"step": 4' in metrics.read_text()):
        assert time.monotonic() < deadline, tail(folder / "killed.log")
        time.sleep(0.02)
    stage = _status(folder / "three.toml")["three"]
    assert stage.state == "running" and (stage.step, stage.steps) == (4, STEPS)
    assert f"process {pid} on " in stage.notes[0]
    seconds = [
        json.loads(line)["train/step_seconds"] for line in metrics.read_text().splitlines() if "step_sec" in line
    ]
    assert stage.seconds_left == pytest.approx(2 * sum(seconds) / len(seconds))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    stage = _status(folder / "three.toml")["three"]
    assert stage.state == "interrupted" and stage.seconds_left is None and "killed" in stage.notes[0]
    assert stage.checkpoint == str(saved)
    assert run_child(train(str(folder / "three.toml")), folder / "again.log") == 0, tail(folder / "again.log")
    assert _status(folder / "three.toml")["three"].state == "done"


def test_a_run_that_stopped_or_failed_says_why(folder: Path) -> None:
    def stop() -> None:
        at_step(3, lambda stage: os.kill(os.getpid(), signal.SIGTERM))
        train(str(folder / "three.toml"))()

    def fail() -> None:
        def broken(stage: Any) -> None:
            raise RuntimeError("the cable is out")

        at_step(5, broken)
        train(str(folder / "three.toml"))()

    assert run_child(stop, folder / "stop.log") == 75
    stage = _status(folder / "three.toml")["three"]
    assert stage.state == "stopped" and stage.step == 3 and "SIGTERM" in stage.notes[0]
    assert run_child(fail, folder / "fail.log") == 1
    stage = _status(folder / "three.toml")["three"]
    assert stage.state == "failed" and stage.step == 4 and "RuntimeError: the cable is out" in stage.notes[0]


def test_damaged_folders_are_told_and_never_stop_the_table(folder: Path) -> None:
    one, two = folder / "outputs/one", folder / "outputs/two"
    (one / "recipe.json").write_text('{"format_version": 1, "rec')
    (one / "launch.json").write_bytes(b"\xff\xfe")
    with (one / "metrics.jsonl").open("a") as file:
        file.write('oops "train/loss"\n{"step": 7, "train/lo')
    weights = two / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    empty = folder / "outputs" / "empty"
    (empty / "checkpoints" / "step-000002").mkdir(parents=True)
    stages = _status(folder / "outputs")
    assert stages["one"].state == "done" and stages["one"].loss is not None
    assert "recipe.json is damaged" in stages["one"].notes[0] and "launch.json" in stages["one"].notes[1]
    assert stages["two"].state == "damaged"
    assert "model.safetensors: has" in " ".join(stages["two"].notes)
    assert stages["two"].checkpoint == str(two / "checkpoints/step-000004")
    assert stages["empty"].state == "damaged" and stages["empty"].checkpoint is None


def test_another_recipe_for_the_same_folder_is_told(folder: Path) -> None:
    stage = _status(folder / "one.toml", "train.lr=1e-4")["one"]
    assert stage.state == "done" and "train.lr: 0.003 -> 0.0001" in stage.notes[0]


def test_asking_who_holds_a_lock_neither_takes_it_nor_gives_it_away(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    assert holder(lock) is None and not lock.exists()

    def hold() -> None:
        taken = RunLock(lock)
        assert holder(lock) is not None  # opening and closing the file would drop the lock
        (tmp_path / "ready").touch()
        time.sleep(60)
        taken.release()

    pid = in_child(hold, tmp_path / "log")
    deadline = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < deadline, tail(tmp_path / "log")
        time.sleep(0.01)
    assert (holder(lock) or "").startswith(f"process {pid} on ")
    assert (holder(lock) or "").startswith(f"process {pid} on ")
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holder(lock) is None
    RunLock(lock).release()


def test_json_is_whole_and_has_no_numbers_that_json_does_not_know(folder: Path) -> None:
    with (folder / "outputs/one/metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/loss": NaN}\n')
    console, written = pipe()
    print_status([str(folder / "outputs")], console, as_json=True)

    def refuse(text: str) -> None:
        raise ValueError(text)

    stages = json.loads(written.getvalue(), parse_constant=refuse)
    assert [stage["name"] for stage in stages] == ["one", "two"] and stages[0]["loss"] is None
    assert stages[1]["made_from"] == {"model.init_from": str(folder / "outputs/one/final")}
