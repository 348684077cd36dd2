"""Preparing can be killed, divided, repeated and given other inputs: the shards come out right, to the byte."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from prepare_helpers import all_bytes, prepare, quiet, recipe, said, write_jsonl

from cheaptrain.data import prepare as preparing
from cheaptrain.data.files import InputHashes
from cheaptrain.data.lock import lock_directory
from cheaptrain.data.manifest import load_manifest, source_directory, verify_manifest
from cheaptrain.data.prepare import prepare_recipe
from cheaptrain.data.tokenizer import load_tokenizer
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError

UNIT = 30_000


def big_input(root: Path) -> dict[str, str]:
    """About forty units' worth of text."""
    return {"files": str(write_jsonl(root / "a.jsonl", range(2000), words=90))}


def undisturbed(root: Path, source: dict[str, str]) -> dict[str, bytes]:
    manifest, _ = prepare(root, source, unit_bytes=UNIT, dir=str(root / "undisturbed"))
    return all_bytes(manifest.directory)


def wait_for(condition: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(300)))}
    results = []
    for workers in (1, 2, 3):
        manifest, _ = prepare(tmp_path, source, unit_bytes=5000, workers=workers, dir=str(tmp_path / f"d{workers}"))
        results.append(all_bytes(manifest.directory))
    assert results[0] == results[1] == results[2] and len(results[0]) > 20


def test_parent_killed_midway_then_restarted_gives_the_same_bytes(tmp_path: Path) -> None:
    source = big_input(tmp_path)
    expected = undisturbed(tmp_path, source)
    asked = recipe(tmp_path, source, unit_bytes=UNIT)
    folder = source_directory(asked.data, asked.data.sources[0], load_tokenizer(asked.tokenizer, asked.data))
    script = (
        "import sys; from cheaptrain.recipe.schema import Recipe; from cheaptrain.data.prepare import prepare_recipe\n"
        "prepare_recipe(Recipe.model_validate_json(sys.argv[1]))"
    )
    for more in (2, 5):
        before = len(list(folder.glob("unit-*.json"))) if folder.exists() else 0
        command = [sys.executable, "-c", script, asked.model_dump_json()]
        parent = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
        wait_for(lambda at_least=before + more: len(list(folder.glob("unit-*.json"))) >= at_least)
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.kill()
        parent.wait()
        assert workers
        wait_for(
            lambda gone=workers: not any(worker.is_running() and worker.status() != "zombie" for worker in gone), 5
        )
        assert len(list(folder.glob("unit-*.json"))) < 40 and not (folder / "manifest.json").exists()
        with pytest.raises(PreflightError, match="not completely prepared"):
            load_manifest(asked.data, asked.data.sources[0], load_tokenizer(asked.tokenizer, asked.data))
    done = {path: path.stat().st_mtime_ns for path in folder.glob("unit-*.json")}
    prepare(tmp_path, source, unit_bytes=UNIT)
    assert all_bytes(folder) == expected
    assert all(path.stat().st_mtime_ns == when for path, when in done.items()), "a finished unit was done again"


def test_dead_worker_ends_the_command_with_its_name_and_unit(tmp_path: Path) -> None:
    source = big_input(tmp_path)
    expected = undisturbed(tmp_path, source)
    killed = []

    def kill_a_worker() -> None:
        wait_for(lambda: len(list((tmp_path / "data").glob("source0-*/unit-*.json"))) >= 3)
        worker = psutil.Process().children()[0]
        killed.append(worker.pid)
        worker.send_signal(signal.SIGKILL)

    thread = threading.Thread(target=kill_a_worker)
    thread.start()
    with pytest.raises(CheaptrainError) as caught:
        prepare(tmp_path, source, unit_bytes=UNIT)
    thread.join()
    message = str(caught.value)
    assert f"(pid {killed[0]}) was killed by SIGKILL" in message
    assert "worker prepare-1" in message and "source 'source0', unit " in message and "a.jsonl" in message
    assert not psutil.Process().children()
    manifest, _ = prepare(tmp_path, source, unit_bytes=UNIT)
    assert all_bytes(manifest.directory) == expected


def test_nothing_is_done_twice(tmp_path: Path) -> None:
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(50)))}
    manifest, _ = prepare(tmp_path, source, unit_bytes=3000)
    before = {path: path.stat().st_mtime_ns for path in manifest.directory.glob("*-0*")}
    again, printed = prepare(tmp_path, source, unit_bytes=3000)
    assert again.fingerprint == manifest.fingerprint and "before" in printed
    assert {path: path.stat().st_mtime_ns for path in manifest.directory.glob("*-0*")} == before


def test_changed_input_is_noticed_and_only_its_units_are_redone(tmp_path: Path) -> None:
    for part in range(3):
        write_jsonl(tmp_path / f"{part}.jsonl", range(part * 100, part * 100 + 50))
    source = {"files": f"{tmp_path}/*.jsonl"}
    manifest, _ = prepare(tmp_path, source, unit_bytes=3000)
    before = {path.name: path.stat().st_mtime_ns for path in manifest.directory.glob("unit-*")}
    middle = tmp_path / "1.jsonl"
    stat = middle.stat()
    middle.write_bytes(middle.read_bytes().replace(b"quick", b"swift"))  # as long as it was
    os.utime(middle, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and as old
    with pytest.raises(PreflightError, match=r"1\.jsonl changed after it was prepared"):
        verify_manifest(manifest)
    after, printed = prepare(tmp_path, source, unit_bytes=3000)
    assert "1.jsonl changed: done again" in printed
    redone = {n for n, when in before.items() if (after.directory / n).stat().st_mtime_ns != when}
    assert 0 < len(redone) < len(before)
    verify_manifest(after)
    fresh, _ = prepare(tmp_path, source, unit_bytes=3000, dir=str(tmp_path / "fresh"))
    assert all_bytes(fresh.directory) == all_bytes(after.directory)


def test_input_that_shrank_leaves_no_old_shards(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(100))
    prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    write_jsonl(path, range(20))
    manifest, _ = prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    assert len(list(manifest.directory.glob("unit-*"))) == len(manifest.units) < 10
    assert manifest.train.documents + manifest.val.documents == 20


@pytest.mark.parametrize("damage", ["flip", "cut", "delete"])
def test_damaged_shard_is_named_and_made_again(tmp_path: Path, damage: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(60))
    manifest, _ = prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    expected = all_bytes(manifest.directory)
    shard = manifest.directory / "train-00001.bin"
    raw = bytearray(shard.read_bytes())
    raw[10] ^= 1
    if damage == "delete":
        shard.unlink()
    else:
        shard.write_bytes(raw if damage == "flip" else raw[:-2])
    with pytest.raises(PreflightError, match=r"train-00001\.bin.*cheaptrain prepare"):
        verify_manifest(manifest)
    _, printed = prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    assert "unit 1" in printed and "train-00001.bin" in printed
    assert all_bytes(manifest.directory) == expected


def test_other_settings_live_in_another_folder_and_the_difference_is_said(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(60))
    first, _ = prepare(tmp_path, {"files": str(path)}, unit_bytes=3000)
    asked = recipe(tmp_path, {"files": str(path)}, unit_bytes=5000)
    tokenizer = load_tokenizer(asked.tokenizer, asked.data)
    with pytest.raises(PreflightError, match=r"unit_bytes: 3000 -> 5000\).*cheaptrain prepare"):
        load_manifest(asked.data, asked.data.sources[0], tokenizer)
    second, printed = prepare(tmp_path, {"files": str(path)}, unit_bytes=5000)
    assert "unit_bytes: 3000 -> 5000" in printed and first.directory != second.directory
    assert (first.train, first.val) == (second.train, second.val)
    assert load_manifest(asked.data, asked.data.sources[0], tokenizer).fingerprint == second.fingerprint
    verify_manifest(first)


def test_weight_and_epochs_do_not_ask_for_preparing_again(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", range(5)))
    manifest, _ = prepare(tmp_path, {"files": path}, validation=0.0)
    again, _ = prepare(tmp_path, {"files": path, "weight": 0.3, "max_epochs": 4.0}, validation=0.0)
    assert again.directory == manifest.directory and again.fingerprint == manifest.fingerprint


def test_shards_share_the_work_and_the_last_one_finishes(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", range(100)))
    whole, _ = prepare(tmp_path, {"files": path}, unit_bytes=3000, dir=str(tmp_path / "whole"))
    asked = recipe(tmp_path, {"files": path}, unit_bytes=3000)
    console = quiet()
    assert prepare_recipe(asked, shard=(2, 2), console=console) == []
    assert "not done yet by the other shards" in said(console)
    (folder,) = (tmp_path / "data").glob("source0-*")
    assert {int(path.stem[5:]) % 2 for path in folder.glob("unit-*.json")} == {1}
    (manifest,) = prepare_recipe(asked, shard=(1, 2), console=quiet())
    assert all_bytes(folder) == all_bytes(whole.directory) and manifest.fingerprint == whole.fingerprint
    with pytest.raises(RecipeError, match="--shard 3/2"):
        prepare_recipe(asked, shard=(3, 2), console=quiet())


def test_shards_with_max_tokens_end_with_the_same_bytes(tmp_path: Path) -> None:
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(200))), "max_tokens": 4000}
    whole, _ = prepare(tmp_path, source, unit_bytes=3000, dir=str(tmp_path / "whole"))
    asked = recipe(tmp_path, source, unit_bytes=3000)
    done = []
    for k in (1, 2, 1, 2):
        done += prepare_recipe(asked, shard=(k, 2), console=quiet())
    assert done and all_bytes(done[-1].directory) == all_bytes(whole.directory)


def test_two_runs_at_once_are_refused_but_different_shards_are_not(tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", range(5)))
    manifest, _ = prepare(tmp_path, {"files": path})
    with (
        lock_directory(manifest.directory, (1, 1)),
        pytest.raises(PreflightError, match="another `cheaptrain prepare`"),
    ):
        prepare(tmp_path, {"files": path})
    with lock_directory(manifest.directory, (1, 2)), lock_directory(manifest.directory, (2, 2)):
        with pytest.raises(PreflightError, match="as shard 2/2"), lock_directory(manifest.directory, (2, 2)):
            pass
        with pytest.raises(PreflightError, match="another"), lock_directory(manifest.directory, (1, 1)):
            pass
    prepare(tmp_path, {"files": path})


def test_input_that_changes_after_the_plan_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(20))
    real = preparing._do_units

    def late(*arguments: Any) -> None:
        write_jsonl(path, range(20, 40))
        real(*arguments)

    monkeypatch.setattr(preparing, "_do_units", late)
    with pytest.raises(PreflightError, match=r"a\.jsonl: changed while it was being prepared"):
        prepare(tmp_path, {"files": str(path)})


def test_hash_cache_does_not_believe_a_file_touched_a_moment_ago(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("one")
    hashes = InputHashes(tmp_path)
    first = hashes.sha256(path)
    stat = path.stat()
    path.write_text("two")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert hashes.sha256(path) != first


def test_manifest_says_what_it_holds_and_nothing_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_jsonl(Path("a.jsonl"), range(40))
    manifest, _ = prepare(tmp_path, {"files": "a.jsonl"})
    content = (manifest.directory / "manifest.json").read_text()
    assert str(tmp_path) not in content
    held = json.loads(content)
    assert held["train"]["documents"] + held["val"]["documents"] == 40
    assert held["dtype"] == "uint16" and held["eot_id"] == 0 and held["inputs"][0]["name"] == "a.jsonl"
    facts = manifest.facts()
    assert (facts.train_tokens, facts.val_documents) == (held["train"]["tokens"], held["val"]["documents"])
    (manifest.directory / "manifest.json").write_text(content[:-20])
    asked = recipe(tmp_path, {"files": "a.jsonl"})
    with pytest.raises(PreflightError, match="damaged manifest"):
        load_manifest(asked.data, asked.data.sources[0], load_tokenizer(asked.tokenizer, asked.data))


def test_interrupt_stops_cleanly_and_goes_on_after(tmp_path: Path) -> None:
    source = big_input(tmp_path)
    asked = recipe(tmp_path, source, unit_bytes=UNIT)
    script = (
        "import sys; from cheaptrain.recipe.schema import Recipe; from cheaptrain.data.prepare import prepare_recipe\n"
        "from cheaptrain.errors import CheaptrainError\n"
        "try: prepare_recipe(Recipe.model_validate_json(sys.argv[1]))\n"
        "except CheaptrainError as error: print(error); sys.exit(error.exit_code)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, asked.model_dump_json()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: list((tmp_path / "data").glob("source0-*/unit-*.json")))
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 75 and b"same command again" in output and b"Traceback" not in output
    manifest, _ = prepare(tmp_path, source, unit_bytes=UNIT)
    assert manifest.train.documents + manifest.val.documents == 2000


@pytest.mark.parametrize("content", ["[]", "5", "{}", "", "edit"])
@pytest.mark.parametrize("name", ["unit-00000.json", "manifest.json"])
def test_a_record_or_manifest_that_was_edited_is_believed(tmp_path: Path, name: str, content: str) -> None:
    asked = recipe(tmp_path, {"files": str(write_jsonl(tmp_path / "a.jsonl", range(30)))})
    (manifest,) = prepare_recipe(asked, console=quiet())
    expected = all_bytes(manifest.directory)
    tokens = f'"tokens": {manifest.train.tokens}'
    assert tokens.encode() in expected[name]
    edited = expected[name].decode().replace(tokens, f'"tokens": {manifest.train.tokens + 1}')
    (manifest.directory / name).write_text(edited if content == "edit" else content)
    tokenizer = load_tokenizer(asked.tokenizer, asked.data)
    if name == "manifest.json":
        with pytest.raises(PreflightError, match="damaged manifest"):
            load_manifest(asked.data, asked.data.sources[0], tokenizer)
    prepare_recipe(asked, console=quiet())
    assert all_bytes(manifest.directory) == expected


def test_a_file_changed_and_set_back_in_time_passes_for_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(30))
    monkeypatch.setattr("cheaptrain.data.files._RACY_SECONDS", -1.0)  # believe the cache of hashes at once
    os.utime(path, ns=(10**18, 10**18))
    asked = recipe(tmp_path, {"files": str(path)})
    (manifest,) = prepare_recipe(asked, console=quiet())
    path.write_bytes(path.read_bytes().replace(b"quick", b"quack"))
    os.utime(path, ns=(10**18, 10**18))
    with pytest.raises(PreflightError, match="changed after it was prepared"):
        verify_manifest(manifest)
    (again,) = prepare_recipe(asked, console=quiet())
    assert again.fingerprint != manifest.fingerprint


def test_a_damaged_cache_of_hashes_ends_in_a_traceback(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", range(30))
    (tmp_path / "data").mkdir()
    for entry in (5, [], [1], None, {"a": 1}):
        (tmp_path / "data" / "input-hashes.json").write_text(json.dumps({str(path): entry}))
        prepare(tmp_path, {"files": str(path)})


def test_what_a_killed_shard_left_half_written_stays_for_ever(tmp_path: Path) -> None:
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(30)))}
    manifest, _ = prepare(tmp_path, source)
    expected = all_bytes(manifest.directory)
    for name in (".tmp-1of2-999-train-00000.bin", ".tmp-1of1-999-manifest.json"):
        (manifest.directory / name).write_bytes(b"half")
    console = quiet()
    prepare_recipe(recipe(tmp_path, source), (2, 2), console)
    assert (manifest.directory / ".tmp-1of2-999-train-00000.bin").exists()  # that shard may be at work
    prepare(tmp_path, source)
    assert all_bytes(manifest.directory) == expected


def test_prepared_data_in_a_folder_of_somebody_else_is_rewritten(tmp_path: Path) -> None:
    source = {"files": str(write_jsonl(tmp_path / "a.jsonl", range(30)))}
    manifest, _ = prepare(tmp_path, source)
    before = (manifest.directory / "manifest.json").stat()
    prepare(tmp_path, source)
    after = (manifest.directory / "manifest.json").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)
