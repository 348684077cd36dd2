"""A run directory is started, gone on with, skipped or refused for the right reason; no two processes share one."""

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_checkpoints import ALONE, assert_is_step, names, parts, save, unexpected

from cheaptrain.checkpoint.jsonl import JsonLines, read_records
from cheaptrain.checkpoint.retention import finish
from cheaptrain.checkpoint.rundir import OpenedRun, open_run
from cheaptrain.checkpoint.verify import Report
from cheaptrain.checkpoint.write import save_checkpoint
from cheaptrain.errors import CheaptrainError, PreflightError

TESTS = Path(__file__).parent
STEPS = 300
IDENTITY: dict[str, Any] = {
    "seed": 1,
    "train": {"lr": 0.0003, "betas": [0.9, 0.95]},
    "data": {"sources": [{"name": "wiki", "weight": 0.7}, {"name": "code", "weight": 0.3}]},
}
INPUTS: dict[str, Any] = {"tokenizer": "1" * 64, "data": {"wiki": "2" * 64, "code": "3" * 64}}


def opened(path: Path, report: Report = unexpected, **changes: Any) -> OpenedRun:
    given: dict[str, Any] = {
        "recipe": IDENTITY | {"log": {"every": 1}},
        "provenance": {"train.lr": "recipes/x.toml:12", "seed": "default"},
        "identity": IDENTITY,
        "inputs": INPUTS,
        "steps": lambda checkpoint: STEPS,
        "report": report,
    }
    return open_run(path, **given | changes)


def refusal(path: Path, **changes: Any) -> str:
    """Why the run is refused; and that refusing it changed nothing."""
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in path.rglob("*") if p.name != "lock"}
    with pytest.raises(PreflightError) as caught:
        opened(path, **changes)
    assert before == {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in path.rglob("*") if p.name != "lock"}
    return str(caught.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "phase1"


def test_a_run_is_fresh_then_resumed_then_done(path: Path) -> None:
    with opened(path) as run:
        assert (run.decision, run.checkpoint, run.resumed_step) == ("fresh", None, None)
        assert json.loads(run.directory.recipe.read_text()) == run.recipe
    with opened(path) as run:
        assert run.decision == "fresh"  # nothing was saved yet
        for step in (100, 200):
            made = parts(step, recipe=run.recipe, lineage=run.lineage)
            save_checkpoint(run.directory, step=step, parts=made, processes=ALONE)
    with opened(path) as run:
        assert (run.decision, run.resumed_step) == ("resume", 200)
        assert_is_step(run.checkpoint, 200)
        save(run.directory, STEPS)
        finish(run.directory, STEPS)
    with opened(path) as run:
        assert (run.decision, run.resumed_step) == ("done", STEPS)


def test_a_run_killed_between_its_last_save_and_the_link_is_done(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, STEPS, state_tensors=None)  # could not be resumed from
    reports: list[str] = []
    with opened(path, reports.append) as run:
        assert run.decision == "done"
        assert run.directory.final.readlink() == Path("checkpoints/step-000300")
    assert "step-000300" in reports[0]


def test_a_finished_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, 200)
        save(run.directory, STEPS)
        finish(run.directory, STEPS)
    (path / "final" / "model.safetensors").write_bytes(b"gone")
    reports: list[str] = []
    with opened(path, reports.append) as run:
        assert (run.decision, run.resumed_step) == ("resume", 200)
        assert "model.safetensors" in reports[0]
        assert "step-000300.bad-1" in reports[1]
        save(run.directory, STEPS)
        finish(run.directory, STEPS)
    with opened(path) as run:
        assert run.decision == "done"


def test_damaged_newer_checkpoints_do_not_shield_themselves_from_retention(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, 100)
        save(run.directory, 200)
    (path / "checkpoints/step-000200/config.json").unlink()
    with opened(path, lambda message: None) as run:
        assert run.resumed_step == 100
        assert run.directory.steps() == [run.directory.step(100)]


def test_what_changed_is_listed_with_its_place_and_the_remedies(path: Path) -> None:
    opened(path).close()
    sources = [{"name": "wiki", "weight": 0.6}, {"name": "code", "weight": 0.3}]
    changed = {"seed": 1, "train": {"lr": 0.0006, "betas": [0.9, 0.95]}, "data": {"sources": sources}}
    said = refusal(path, identity=changed)
    assert "train.lr: 0.0003 -> 0.0006 (recipes/x.toml:12)" in said
    assert "data.sources.wiki.weight: 0.7 -> 0.6" in said
    assert "betas" not in said
    assert "run.dir" in said
    assert f'model.init_from = "{path}/final"' in said


def test_changed_data_or_tokenizer_is_refused_by_name(path: Path) -> None:
    opened(path).close()
    said = refusal(path, inputs={"tokenizer": "9" * 64, "data": {"wiki": "2" * 64, "code": "8" * 64, "new": "7" * 64}})
    assert "input tokenizer: 111111111111 -> 999999999999" in said
    assert "input data.code: 333333333333 -> 888888888888" in said
    assert "input data.new: none -> 777777777777" in said
    assert "wiki" not in said


def test_a_finished_run_is_not_skipped_when_its_inputs_changed(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, STEPS)
        finish(run.directory, STEPS)
    assert "input tokenizer" in refusal(path, inputs=INPUTS | {"tokenizer": "9" * 64})


def test_operational_keys_may_change_and_are_kept_as_they_are_now(path: Path) -> None:
    opened(path).close()
    with opened(path, recipe=IDENTITY | {"log": {"every": 50}}):
        assert json.loads((path / "recipe.json").read_text())["recipe"]["log"] == {"every": 50}


def test_only_damaged_checkpoints_refuse_and_stay(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, 100)
    (path / "checkpoints/step-000100/config.json").write_text("{")
    assert "config.json" in refusal(path, report=lambda message: None)


def test_a_checkpoint_beyond_the_end_is_refused(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, STEPS + 100)
    assert "beyond step 300" in refusal(path)


def test_a_folder_with_other_things_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert "thesis.tex" in refusal(tmp_path)
    assert names(tmp_path) == {"thesis.tex"}
    assert "is a file" in refusal(tmp_path / "thesis.tex")


def test_a_lost_recipe_json_can_be_brought_back_from_a_checkpoint(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, 100, recipe=run.recipe)
    os.unlink(path / "recipe.json")
    source = path / "checkpoints/step-000100/recipe.json"
    assert f"copy {source}" in refusal(path)
    shutil.copy(source, path)
    with opened(path) as run:
        assert run.resumed_step == 100


def test_a_flipped_bit_in_recipe_json_is_damage_not_a_change(path: Path) -> None:
    opened(path).close()
    recipe = path / "recipe.json"
    original = recipe.read_bytes()
    for old, new in (
        (b"0.0003", b"0.0001"),
        (b"3" * 64, b"3" * 63 + b"2"),
        (b"{", b"["),
        (b"{", b"\xfb"),
        (original, b""),
    ):
        recipe.write_bytes(original.replace(old, new, 1))
        assert "recipe.json is damaged" in refusal(path)
    recipe.write_bytes(original)
    opened(path).close()


def test_leftovers_of_killed_processes_are_removed_and_said(path: Path) -> None:
    with opened(path) as run:
        save(run.directory, 100)
    shutil.copytree(path / "checkpoints/step-000100", path / "checkpoints/.writing-step-000200-4711")
    shutil.copytree(path / "checkpoints/step-000100", path / "checkpoints/.deleting-step-000050-4711")
    (path / ".metrics.jsonl-4711").write_text("{")
    (path / ".final-4711").symlink_to("checkpoints/step-000100")
    reports: list[str] = []
    with opened(path, reports.append) as run:
        assert_is_step(run.checkpoint, 100)
    assert len(reports) == 4
    assert names(path / "checkpoints") == {"step-000100"}
    assert names(path) == {"lock", "recipe.json", "checkpoints"}


OTHER_PROCESS = """
import sys
from pathlib import Path
from cheaptrain.errors import PreflightError
from cheaptrain.checkpoint.rundir import open_run
try:
    open_run(Path(sys.argv[1]), recipe={}, provenance={}, identity={}, inputs={}, steps=lambda c: 1, report=print)
except PreflightError as error:
    print(error)
"""


def test_a_second_process_on_the_same_run_is_refused_and_told_who_has_it(path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent)}
    command = [sys.executable, "-c", OTHER_PROCESS, str(path)]
    with opened(path) as run:
        save(run.directory, 100)
        writing = run.directory.checkpoints / ".writing-step-000200-1"
        writing.mkdir()
        said = subprocess.run(command, env=environment, capture_output=True, text=True).stdout
        assert f"process {os.getpid()} on {os.uname().nodename} is training this run" in said
        assert writing.is_dir()  # a save under way is not taken for a leftover
        with pytest.raises(PreflightError, match="this process is already training"):
            opened(path)


def test_a_refused_run_gives_the_lock_back(path: Path) -> None:
    opened(path).close()
    refusal(path, identity=IDENTITY | {"seed": 2})
    opened(path).close()


def test_a_file_system_without_locks_is_said_and_nothing_removed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    opened(path).close()
    (path / "checkpoints" / ".writing-step-000200-1").mkdir(parents=True)
    monkeypatch.setattr(fcntl, "lockf", no_locks)
    reports: list[str] = []
    opened(path, reports.append).close()
    assert "knows no locks" in reports[0]
    assert "delete it when" in reports[1]
    assert names(path / "checkpoints") == {".writing-step-000200-1"}


def test_a_place_that_cannot_be_written_is_named_before_training(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        place = Path("/proc/cheaptrain-run")  # nobody can write here, not even root
    else:
        place = tmp_path / "locked" / "run"
        place.parent.mkdir(mode=0o500)
    with pytest.raises(PreflightError, match=f"run.dir {place} cannot be used"):
        opened(place)


def write_lines(path: Path, *lines: str) -> None:
    path.write_text("".join(lines))


def test_resumed_metrics_hold_every_step_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with JsonLines(file, None, unexpected) as metrics:
        for step in range(1, 8):
            metrics.append({"step": step, "train/loss": 1 / step, "first": True})
    kept = file.read_bytes().splitlines(keepends=True)[:4]
    with JsonLines(file, 4, unexpected) as metrics:
        assert file.read_bytes().splitlines(keepends=True) == kept
        for step in range(5, 8):
            metrics.append({"step": step, "train/loss": 1 / step})
    assert [(record["step"], "first" in record) for record in read_records(file)] == [(n, n < 5) for n in range(1, 8)]


def test_metrics_of_a_run_that_starts_over_are_empty(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_lines(file, '{"step": 0}\n', '{"step": 1}\n')
    JsonLines(file, None, unexpected).close()
    assert file.read_bytes() == b""
    assert read_records(tmp_path / "none.jsonl") == []


def test_a_torn_or_broken_line_is_dropped_and_counted(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_lines(
        file, '{"step": 1}\n', '{"st\x00\n', "[2]\n", '{"loss": 1}\n', '{"step": 2}\n', '{"step": 3, "loss": 0.'
    )
    assert read_records_or_error(file) == "JSONDecodeError"
    reports: list[str] = []
    with JsonLines(file, 3, reports.append) as metrics:
        metrics.append({"step": 4})
    assert [record["step"] for record in read_records(file)] == [1, 2, 4]
    assert "4 broken lines dropped" in reports[0]


def read_records_or_error(file: Path) -> str:
    try:
        return str(read_records(file))
    except ValueError as error:
        return type(error).__name__


def test_a_reader_never_meets_half_a_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    write_lines(file, '{"step": 1}\n', '{"step": 2, "lo')
    assert read_records(file) == [{"step": 1}]


def test_a_loss_that_is_not_finite_is_valid_json(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    with JsonLines(file, None, unexpected) as metrics:
        metrics.append({"step": 1, "train/loss": float("nan"), "deep": {"x": [float("inf"), 1.5]}, "text": "é\n"})
        with pytest.raises(ValueError, match="integer step"):
            metrics.append({"train/loss": 1.0})
    assert file.read_bytes().count(b"\n") == 1
    assert json.loads(file.read_bytes(), parse_constant=pytest.fail) == {
        "step": 1, "train/loss": None, "deep": {"x": [None, 1.5]}, "text": "é\n"
    }  # fmt: skip


def test_a_full_disk_delays_lines_and_tears_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, room = os.write, 25

    def limited(handle: int, content: bytes) -> int:
        nonlocal room
        if room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = real(handle, content[:room])
        room -= written
        return written

    file = tmp_path / "metrics.jsonl"
    reports: list[str] = []
    metrics = JsonLines(file, None, reports.append)
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", limited)
        for step in range(1, 6):
            metrics.append({"step": step, "x": 1})
        assert len(reports) == 1
        assert "No space left" in reports[0]
        with pytest.raises(CheaptrainError, match="could not be written"):
            metrics.sync()
    metrics.append({"step": 6})
    metrics.close()
    assert [record["step"] for record in read_records(file)] == [1, 2, 3, 4, 5, 6]
