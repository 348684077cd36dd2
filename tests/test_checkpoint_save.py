"""A save is all or nothing: a full disk, a disk error, a wrong export or a stop in the middle leaves no trace."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoints import ALONE, assert_is_step, names, save, unexpected
from torch import Tensor

from cheaptrain.checkpoint.load import load_state_into
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.retention import finish, prune
from cheaptrain.checkpoint.tensor_files import TensorFile
from cheaptrain.checkpoint.verify import newest_good, verify_checkpoint
from cheaptrain.checkpoint.write import ProofFailed, SaveFailed
from cheaptrain.errors import CheaptrainError

TESTS = Path(__file__).parent


def NONE(step: int) -> bool:
    """No checkpoint is kept for good."""
    return False


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 8 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def assert_untouched(run: RunDirectory, step: int = 100) -> None:
    """The checkpoint of `step` stands alone, whole, with nothing left of an attempt beside it."""
    assert names(run.checkpoints) == {f"step-{step:06d}"}
    assert_is_step(newest_good(run, unexpected), step)


def test_what_is_saved_is_what_is_loaded(run: RunDirectory) -> None:
    path = save(run, 100)
    assert path == run.step(100)
    assert_untouched(run)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["tokens_seen"] == 1000
    assert manifest["proof"] == {"max_abs_difference": 0.0}
    assert manifest["versions"]["torch"] == str(torch.__version__)
    assert json.loads((path / "recipe.json").read_text()) == {"train": {"steps": 1000}}


def test_no_file_of_a_checkpoint_is_pickled(run: RunDirectory) -> None:
    folder = save(run, 100)
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} == {".safetensors", ".json"}
    for file in files:
        if file.suffix == ".json":
            json.loads(file.read_text())
        else:
            header = int.from_bytes(file.read_bytes()[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + header])


def test_a_file_that_could_be_pickled_stops_the_run(run: RunDirectory) -> None:
    save(run, 100)
    with pytest.raises(ProofFailed, match=r"tokenizer\.pt"):
        save(run, 200, files={"tokenizer.pt": b"pickled"})
    assert_untouched(run)


def test_state_spread_over_several_files_comes_back_whole(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cheaptrain.checkpoint.state_files._BYTES_PER_FILE", 300)
    folder = save(run, 100)
    assert len(list((folder / "state").glob("*.safetensors"))) == 3
    assert_untouched(run)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("part", ["write.write_index", "state_files._write", "write.write_json", "write._proof"])
def test_a_disk_error_costs_one_checkpoint_and_no_more(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, part: str, number: int
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number))

    save(run, 100)
    with monkeypatch.context() as patch:
        patch.setattr(f"cheaptrain.checkpoint.{part}", refuse)
        with pytest.raises(SaveFailed, match=re.escape(os.strerror(number))) as caught:
            save(run, 200)
    assert "step 200" in str(caught.value)
    assert "intact" in str(caught.value)
    assert_untouched(run)


@pytest.mark.parametrize("name", ["os.fsync", "os.rename", "os.write", "os.preadv"])
def test_a_disk_error_behind_the_writers_back_costs_one_checkpoint(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save(run, 100)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(name, refuse)
        with pytest.raises(SaveFailed, match="Input/output error"):
            save(run, 200)
    assert_untouched(run)


def test_an_error_of_a_library_in_rust_counts_as_a_disk_error(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # as tokenizers says it

    save(run, 100)
    with monkeypatch.context() as patch, pytest.raises(SaveFailed, match="No space left"):
        patch.setattr("cheaptrain.checkpoint.write.write_state", refuse)
        save(run, 200)
    assert_untouched(run)


def test_a_bug_is_not_taken_for_a_full_disk(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise KeyError("lm_head.weight")

    save(run, 100)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr("cheaptrain.checkpoint.write.write_state", broken)
        save(run, 200)
    assert_untouched(run)


def test_a_wrong_export_stops_the_run_and_is_not_kept(run: RunDirectory) -> None:
    save(run, 100)
    with pytest.raises(ProofFailed, match="differs by"):
        save(run, 200, weights={"w": torch.ones(64)})
    assert_untouched(run)


@pytest.mark.parametrize("what", ["w", "optimizer/w/exp_avg"])
def test_bytes_that_change_on_their_way_to_the_disk_stop_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    plain = TensorFile.write

    def wrong(self: TensorFile, name: str, data: Tensor) -> None:
        plain(
            self, name, data.where(torch.arange(64) != 17, 0.5) if name in (what, {"weights": "w"}.get(what)) else data
        )

    save(run, 100)
    with monkeypatch.context() as patch, pytest.raises(ProofFailed, match="not written as it is"):
        patch.setattr(TensorFile, "write", wrong)
        save(run, 200, prove=lambda folder: {})
    assert_untouched(run)


def test_a_small_file_that_is_not_what_was_written_stops_the_run(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Path.write_bytes

    def wrong(self: Path, content: bytes) -> int:
        return plain(self, content.replace(b"fake", b"fate"))

    with monkeypatch.context() as patch, pytest.raises(ProofFailed, match=r"config\.json"):
        patch.setattr(Path, "write_bytes", wrong)
        save(run, 100)
    assert names(run.checkpoints) == set()


@pytest.mark.parametrize("error", [ValueError("no such class"), OSError("no file named model.safetensors")])
def test_weights_that_cannot_be_loaded_again_stop_the_run(run: RunDirectory, error: Exception) -> None:
    def cannot_load(folder: Path) -> dict[str, Any]:
        raise error

    with pytest.raises(ProofFailed, match="cannot be loaded again"):
        save(run, 100, prove=cannot_load)
    assert names(run.checkpoints) == set()


def test_a_proof_that_is_not_finite_is_no_proof(run: RunDirectory) -> None:
    with pytest.raises(ProofFailed, match="max_abs_difference"):
        save(run, 100, prove=lambda folder: {"max_abs_difference": float("nan")})
    assert names(run.checkpoints) == set()


def test_ctrl_c_in_the_middle_of_a_save_leaves_nothing_half_made(run: RunDirectory) -> None:
    def interrupted(folder: Path) -> None:
        raise KeyboardInterrupt

    save(run, 100)
    with pytest.raises(KeyboardInterrupt):
        save(run, 200, prove=interrupted)
    assert_untouched(run)


def test_too_little_space_is_seen_before_anything_is_written(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(run, 100, size=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))

    def written(*_: Any) -> None:
        raise AssertionError("written without the space for it")

    monkeypatch.setattr("cheaptrain.checkpoint.write.write_weights", written)
    with pytest.raises(SaveFailed, match=r"0\.001 GB free, and it takes about 0\.003 GB"):
        save(run, 200, size=100_000)
    with pytest.raises(SaveFailed, match=r"takes about 5\.001 GB"):
        save(run, 200, estimated_bytes=5 * 10**9)
    assert names(run.checkpoints) == {"step-000100"}


def test_a_disk_that_fills_at_half_of_a_save_leaves_the_old_one(small_disk: Path) -> None:
    run = RunDirectory(small_disk / "run")
    size = 200_000  # 3.2 MB a checkpoint, of 8 MiB
    save(run, 100, size=size)
    with (small_disk / "other").open("wb") as file:
        file.write(bytes(3_000_000))
    for attempt in range(2):
        with pytest.raises(SaveFailed, match=r"No space left|free, and it takes") as caught:
            # The first attempt meets the end of the disk in the middle, the second sees it coming.
            save(run, 200, size=size, estimated_bytes=1 if attempt == 0 else None)
        assert ("No space left" in str(caught.value)) is (attempt == 0)
        assert names(run.checkpoints) == {"step-000100"}
        assert_is_step(newest_good(run, unexpected), 100, size)
    (small_disk / "other").unlink()
    save(run, 200, size=size)
    assert_is_step(newest_good(run, unexpected), 200, size)


def test_a_disk_that_fills_at_any_point_of_a_save_leaves_the_old_one(small_disk: Path) -> None:
    run, size = RunDirectory(small_disk / "run"), 100_000  # 1.6 MB a checkpoint
    save(run, 100, size=size)
    failed = 0
    for room in range(0, 1_700_000, 130_000):
        usage = shutil.disk_usage(small_disk)
        (small_disk / "other").write_bytes(bytes(max(0, usage.free - room)))
        try:
            save(run, 200, size=size, estimated_bytes=1)
        except SaveFailed:
            failed += 1
            assert names(run.checkpoints) == {"step-000100"}
        (small_disk / "other").unlink()
        assert_is_step(newest_good(run, unexpected), 200 if run.step(200).exists() else 100, size)
    assert failed >= 10


FILE_LIMIT = """
import resource, sys
from fake_checkpoints import save, assert_is_step, unexpected
from cheaptrain.checkpoint.write import SaveFailed
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.tensor_files import TensorFile
from cheaptrain.checkpoint.verify import newest_good
from pathlib import Path
run = RunDirectory(Path(sys.argv[1]))
save(run, 100, size=50_000)
for limit in (1_000, 100_000, 300_000):  # within the weights twice, then within the state
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save(run, 200, size=50_000)
    except SaveFailed as error:
        print("SaveFailed", "File too large" in str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert [folder.name for folder in run.checkpoints.iterdir()] == ["step-000100"]
    assert_is_step(newest_good(run, unexpected), 100, 50_000)
save(run, 200, size=50_000)
print("trained on")
"""


def test_files_cut_short_by_a_limit_leave_the_old_checkpoint(run: RunDirectory) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FILE_LIMIT, str(run.path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.splitlines() == ["SaveFailed True"] * 3 + ["trained on"], done.stderr


def test_a_folder_that_cannot_be_written_is_a_failed_save_not_a_crash(tmp_path: Path, small_disk: Path) -> None:
    run = RunDirectory(small_disk / "run")
    save(run, 100)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(SaveFailed, match="Read-only file system"):
        save(run, 200)
    assert_untouched(run)


def test_a_good_checkpoint_of_the_same_step_is_never_written_into(run: RunDirectory) -> None:
    folder = save(run, 100)
    before = {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*")}
    reports: list[str] = []
    assert save(run, 100, report=reports.append) == folder
    assert ["kept" in message for message in reports] == [True]
    with pytest.raises(SaveFailed, match="something else"):
        save(run, 100, tokens_seen=999)
    assert before == {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in folder.rglob("*")}
    assert_untouched(run)


def test_a_damaged_checkpoint_in_the_way_is_set_aside_not_deleted(run: RunDirectory) -> None:
    save(run, 100)
    for number in (1, 2):
        (run.step(100) / "model.safetensors").write_bytes(b"damaged %d" % number)
        reports: list[str] = []
        save(run, 100, report=reports.append)
        assert "model.safetensors" in reports[0]
        assert f"step-000100.bad-{number}" in reports[1]
        assert (
            run.checkpoints / f"step-000100.bad-{number}" / "model.safetensors"
        ).read_bytes() == b"damaged %d" % number
        assert_is_step(newest_good(run, unexpected), 100)


def test_retention_keeps_what_the_recipe_says_and_the_final_one(run: RunDirectory) -> None:
    for step in range(100, 1100, 100):
        save(run, step)
    finish(run, 200)
    deleted = prune(run, keep_last=2, keeps=lambda step: step % 500 == 0, report=unexpected)
    assert [folder.name for folder in deleted] == [f"step-000{n}00" for n in (1, 3, 4, 6, 7, 8)]
    assert names(run.checkpoints) == {"step-000200", "step-000500", "step-000900", "step-001000"}
    assert prune(run, keep_last=2, keeps=lambda step: step % 500 == 0, report=unexpected) == []
    prune(run, keep_last=1, keeps=NONE, report=unexpected)
    assert names(run.checkpoints) == {"step-000200", "step-001000"}
    assert_is_step(newest_good(run, unexpected), 1000)


def test_retention_deletes_nothing_behind_a_damaged_newest_one(run: RunDirectory) -> None:
    for step in (100, 200, 300):
        save(run, step)
    (run.step(300) / "config.json").unlink()
    reports: list[str] = []
    assert prune(run, keep_last=1, keeps=NONE, report=reports.append) == []
    assert "config.json" in reports[0]
    assert names(run.checkpoints) == {"step-000100", "step-000200", "step-000300"}


def test_deletion_that_is_cut_off_leaves_nothing_named_like_a_checkpoint(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (100, 200):
        save(run, step)

    def cut_off(folder: Path, **_: Any) -> None:
        (folder / "config.json").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", cut_off)
    with pytest.raises(KeyboardInterrupt):
        prune(run, keep_last=1, keeps=NONE, report=unexpected)
    assert run.steps() == [run.step(200)]
    assert [path.name.partition("-step")[0] for path in run.leftovers()] == [".deleting"]


def test_final_is_always_a_link_to_a_whole_checkpoint(run: RunDirectory) -> None:
    save(run, 100)
    save(run, 200)
    assert finish(run, 100).readlink() == Path("checkpoints/step-000100")
    seen, stop = set(), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            seen.add(os.readlink(run.final))  # raises when the link is gone for a moment

    watcher = threading.Thread(target=watch)
    watcher.start()
    for number in range(100):
        finish(run, (100, 200)[number % 2])
    stop.set()
    watcher.join()
    assert seen == {"checkpoints/step-000100", "checkpoints/step-000200"}
    assert verify_checkpoint(run.final) == []
    with pytest.raises(CheaptrainError, match="step-000300"):
        finish(run, 300)
    assert names(run.path) == {"checkpoints", "final"}


def test_a_real_folder_called_final_is_not_replaced(run: RunDirectory) -> None:
    save(run, 100)
    run.final.mkdir()
    (run.final / "mine").write_text("precious")
    with pytest.raises(CheaptrainError, match="can be used by its path"):
        finish(run, 100)
    assert names(run.path) == {"checkpoints", "final"}
    assert names(run.final) == {"mine"}


def test_saving_without_state_is_said_when_resuming_from_it(run: RunDirectory) -> None:
    save(run, 100, state_tensors=None)
    checkpoint = newest_good(run, unexpected)
    assert checkpoint is not None
    assert not checkpoint.has_state
    with pytest.raises(CheaptrainError, match="state_in_final"):
        load_state_into(checkpoint, torch.nn.Linear(1, 1), [], ALONE)
