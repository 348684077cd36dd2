"""No damaged checkpoint is ever loaded, whatever byte of it changed, and a good one behind it is found."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from fake_checkpoints import assert_is_step, save, unexpected

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import listed_files, newest_good, seal, verify_checkpoint, verify_init_from
from cheaptrain.errors import PreflightError


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def test_a_flipped_bit_in_any_file_is_noticed_and_the_file_named(run: RunDirectory) -> None:
    save(run, 100)
    folder = save(run, 200)
    files = listed_files(folder)
    assert {"model.safetensors", "recipe.json", "state/trainer.json", "state/process-00000-00000.safetensors"} < {
        *files
    }
    for name in files:
        original = (folder / name).read_bytes()
        flip(folder / name, random.Random(name).randrange(8 * len(original)))
        reports: list[str] = []
        assert_is_step(newest_good(run, reports.append), 100)
        assert len(reports) == 1
        assert "step-000200" in reports[0]
        assert name in reports[0]
        (folder / name).write_bytes(original)
    assert_is_step(newest_good(run, unexpected), 200)


def test_no_single_bit_of_the_manifest_can_change_what_it_says(run: RunDirectory) -> None:
    folder = save(run, 200)
    manifest = folder / "manifest.json"
    original = manifest.read_bytes()
    said = json.loads(original)
    rng = random.Random(5)
    for bit in rng.sample(range(8 * len(original)), 500):
        flip(manifest, bit)
        try:
            same = json.loads(manifest.read_bytes()) == said  # a changed blank between two tokens says the same
        except ValueError:
            same = False
        assert bool(verify_checkpoint(folder, hashes=False)) is not same, f"bit {bit}"
        manifest.write_bytes(original)


def test_two_hundred_random_damages_never_load(run: RunDirectory) -> None:
    good, folder = save(run, 100), save(run, 200)
    files = listed_files(folder)
    assert files == listed_files(good)
    rng = random.Random(11)
    seen = set()
    for _ in range(200):
        name, kind = rng.choice(files), rng.choice(["flip", "cut", "grow", "delete", "swap", "empty", "zero"])
        file, original = folder / name, (folder / name).read_bytes()
        if kind == "flip":
            flip(file, rng.randrange(8 * len(original)))
        elif kind == "cut":
            file.write_bytes(original[: rng.randrange(len(original))])
        elif kind == "grow":
            file.write_bytes(original + bytes([rng.randrange(33, 256)]))
        elif kind == "delete":
            file.unlink()
        elif kind == "swap":  # the file of the same name of another checkpoint
            file.write_bytes((good / name).read_bytes())
        elif kind == "empty":
            file.write_bytes(b"")
        elif kind == "zero":  # what some file systems leave after a power cut
            file.write_bytes(bytes(len(original)))
        changed = not file.exists() or file.read_bytes() != original
        if changed and not (name == "manifest.json" and _says_the_same(file, original)):
            seen.add((name, kind))
            reports: list[str] = []
            assert_is_step(newest_good(run, reports.append), 100)
            assert [("step-000200" in message, name in message) for message in reports] == [(True, True)]
        file.write_bytes(original)
    assert len(seen) > 30
    assert_is_step(newest_good(run, unexpected), 200)


def _says_the_same(file: Path, original: bytes) -> bool:
    try:
        return json.loads(file.read_bytes()) == json.loads(original)
    except (OSError, ValueError):
        return False


def test_what_is_wrong_is_said_missing_size_or_bytes(run: RunDirectory) -> None:
    folder = save(run, 200)
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_text("{} ")
    flip(folder / "model.safetensors", 8 * 100)
    problems = {problem.file: problem.what for problem in verify_checkpoint(folder)}
    assert problems == {
        "config.json": "missing",
        "tokenizer.json": "has 3 bytes instead of 2",
        "model.safetensors": "has other bytes than were written (SHA-256 differs)",
    }


def test_a_folder_copied_in_part_or_renamed_by_hand_is_no_checkpoint(run: RunDirectory) -> None:
    good = save(run, 100)
    half = run.step(200)
    half.mkdir()
    shutil.copy(good / "model.safetensors", half)  # manifest.json comes last
    shutil.copytree(good, run.step(300))  # says that it is of step 100
    run.step(400).mkdir()
    reports: list[str] = []
    assert_is_step(newest_good(run, reports.append), 100)
    assert [message.split(": ")[1].rpartition("/")[2] for message in reports] == [
        "step-000400",
        "step-000300",
        "step-000200",
    ]
    assert "is of step 100" in reports[1]


def test_half_made_folders_are_not_even_looked_at(run: RunDirectory) -> None:
    good = save(run, 100)
    for name in (
        ".writing-step-000200-77",
        ".deleting-step-000300-77",
        "step-000400.bad-1",
        "step-500",
        "step-0006000x",
    ):
        shutil.copytree(good, run.checkpoints / name)
    (run.checkpoints / "step-000900").write_text("a file")
    assert_is_step(newest_good(run, unexpected), 100)


def test_only_damaged_checkpoints_never_mean_starting_over(run: RunDirectory) -> None:
    for step in (100, 200):
        (save(run, step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(PreflightError, match=r"model\.safetensors") as caught:
        newest_good(run, lambda message: None)
    assert "step-000100" in str(caught.value)
    assert "step-000200" in str(caught.value)
    assert f"move {run.checkpoints} away" in str(caught.value)


def test_no_checkpoint_at_all_is_not_an_error(run: RunDirectory) -> None:
    assert newest_good(run, unexpected) is None


def test_a_stranger_in_state_is_refused_and_elsewhere_ignored(run: RunDirectory) -> None:
    folder = save(run, 100)
    (folder / "README.md").write_text("mine")
    (folder / "eval").mkdir()
    (folder / "eval" / "state.json").write_text("mine")
    assert verify_checkpoint(folder) == []
    shutil.copy(folder / "state" / "process-00000-00000.safetensors", folder / "state" / "model-00002.safetensors")
    (problem,) = verify_checkpoint(folder)
    assert problem.file == "state/model-00002.safetensors"


def test_a_later_format_is_named_and_not_guessed_at(run: RunDirectory) -> None:
    folder = save(run, 100)
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = {key: value for key, value in manifest.items() if key != "sha256"} | {"format_version": 3}
    (folder / "manifest.json").write_text(json.dumps(seal(changed)))
    (problem,) = verify_checkpoint(folder)
    assert "version 3" in str(problem)


def test_a_checkpoint_of_the_first_format_is_named_and_its_weights_can_be_started_from(run: RunDirectory) -> None:
    folder = save(run, 100)
    manifest = json.loads((folder / "manifest.json").read_text())
    changed = {key: value for key, value in manifest.items() if key != "sha256"} | {"format_version": 1}
    (folder / "manifest.json").write_text(json.dumps(seal(changed)))
    with pytest.raises(PreflightError, match=r"of format version 1, and a run goes on from version 2 only.*init_from"):
        newest_good(run, lambda message: None)
    assert verify_init_from(folder).step == 100
    flip(folder / "model.safetensors", 8 * 90)
    with pytest.raises(PreflightError, match=r"model\.safetensors: has other bytes"):
        verify_init_from(folder)


def test_a_new_stage_does_not_start_from_a_damaged_checkpoint(run: RunDirectory) -> None:
    folder = save(run, 100)
    origin = verify_init_from(folder)
    assert (origin.step, origin.tokens_seen) == (100, 1000)
    flip(folder / "state" / "trainer.json", 9)  # not read by a new stage
    assert verify_init_from(folder) == origin
    shutil.rmtree(folder / "state")  # nor needed
    assert verify_init_from(folder) == origin
    flip(folder / "model.safetensors", 8 * 90)
    with pytest.raises(PreflightError, match=r"model\.safetensors: has other bytes"):
        verify_init_from(folder)


def test_losing_the_manifest_does_not_make_a_checkpoint_a_foreign_folder(run: RunDirectory) -> None:
    folder = save(run, 100)
    os.unlink(folder / "manifest.json")
    with pytest.raises(PreflightError, match=r"manifest\.json: missing"):
        verify_init_from(folder)


def test_the_fingerprint_of_a_start_follows_the_weights_and_nothing_else(run: RunDirectory, tmp_path: Path) -> None:
    first = verify_init_from(save(run, 100))
    other = RunDirectory(tmp_path / "other")
    again = verify_init_from(save(other, 100, recipe={"seed": 7}, state_scalars={"step": 100, "loss": 0.0}))
    assert first.fingerprint == again.fingerprint
    assert first.manifest_sha256 != again.manifest_sha256
    assert verify_init_from(save(other, 200)).fingerprint != first.fingerprint


def test_a_foreign_folder_is_fingerprinted_and_pickled_weights_refused(run: RunDirectory, tmp_path: Path) -> None:
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    shutil.copy(save(run, 100) / "model.safetensors", foreign)
    (foreign / "config.json").write_text("{}")
    before = verify_init_from(foreign)
    assert before.manifest_sha256 is None
    (foreign / "config.json").write_text('{"a": 1}')
    assert verify_init_from(foreign).fingerprint != before.fingerprint
    (foreign / "model.safetensors").rename(foreign / "pytorch_model.bin")
    with pytest.raises(PreflightError, match=r"no \*\.safetensors weights"):
        verify_init_from(foreign)
    with pytest.raises(PreflightError, match="there is no folder"):
        verify_init_from(tmp_path / "nowhere")
