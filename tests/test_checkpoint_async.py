"""Saving beside training: what is saved is the moment it was asked for, and whatever comes of it is heard of."""

import errno
import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
from fake_checkpoints import ALONE, assert_is_step, names, parts, unexpected
from ranks import end_ranks, run_ranks
from sharded_saves import LINEAGE, Trained, alone, laid_out, raised

from cheaptrain.checkpoint import write
from cheaptrain.checkpoint.jsonl import JsonLines, read_records
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.rundir import OpenedRun, open_run
from cheaptrain.checkpoint.saver import Saver
from cheaptrain.checkpoint.snapshot import Buffers
from cheaptrain.checkpoint.together import ProofFailed, SaveFailed
from cheaptrain.checkpoint.verify import newest_good, verify_checkpoint
from cheaptrain.checkpoint.weights import write_weights
from cheaptrain.recipe.layout import Layout
from cheaptrain.train.save import collect_save, poll_save, save

torch.set_num_threads(1)


class Held:
    """A save that stops before its first byte, until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writing, self.go = threading.Event(), threading.Event()

        def held(*given: Any) -> list[Path]:
            self.writing.set()
            assert self.go.wait(60)
            return write_weights(*given)

        monkeypatch.setattr(write, "write_weights", held)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Held]:
    held = Held(monkeypatch)
    yield held
    held.go.set()


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path / "run")


def saver_of(run: RunDirectory, *, asynchronous: bool = True, keep_last: int = 2) -> Saver:
    return Saver(run, ALONE, asynchronous=asynchronous, keep_last=keep_last, keeps=lambda step: False)


def test_training_goes_on_while_the_moment_of_the_save_is_written(run: RunDirectory, held: Held) -> None:
    saver, live = saver_of(run), parts(100)
    assert saver.start(100, live, final=False)
    assert held.writing.wait(60) and not saver.finished()
    for tensor in (*live.weights.values(), *(live.state_tensors or {}).values()):
        tensor.add_(1)  # the next step
    assert names(run.checkpoints) == {f".writing-step-000100-{os.getpid()}"}
    held.go.set()
    outcome = saver.wait()
    assert outcome is not None and outcome.path == run.step(100) and outcome.nbytes > 0
    assert outcome.seconds > 0 and outcome.stall_seconds > 0
    assert_is_step(newest_good(run, unexpected), 100)
    assert saver.wait() is None and saver.finished()


def test_one_save_at_a_time(run: RunDirectory, held: Held) -> None:
    saver = saver_of(run)
    saver.start(100, parts(100), final=False)
    with pytest.raises(RuntimeError, match="step 100 was not asked for"):
        saver.start(200, parts(200), final=False)
    held.go.set()
    saver.wait()
    saver.start(200, parts(200), final=False)
    saver.wait()
    assert_is_step(newest_good(run, unexpected), 200)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_retention_and_the_final_link_follow_each_save(run: RunDirectory, asynchronous: bool) -> None:
    saver = saver_of(run, asynchronous=asynchronous)
    for step in (100, 200, 300):
        assert saver.start(step, parts(step), final=step == 300)
        outcome = saver.wait()
        assert outcome is not None and outcome.reports == []
    assert names(run.checkpoints) == {"step-000200", "step-000300"}
    assert run.final.resolve() == run.step(300).resolve()


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_failure_in_the_background_waits_to_be_asked_for(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    saver = saver_of(run, asynchronous=asynchronous)
    with monkeypatch.context() as patch:
        patch.setattr(write, "write_state", refuse)
        assert saver.start(100, parts(100), final=False) is asynchronous
        outcome = saver.wait()
    assert outcome is not None and outcome.path is None and isinstance(outcome.failure, SaveFailed)
    assert names(run.checkpoints) == set()
    for error in (ProofFailed("other weights"), KeyError("a bug")):

        def prove(folder: Path, error: Exception = error) -> dict[str, Any]:
            raise error

        with pytest.raises(ProofFailed):
            saver.start(200, parts(200, prove=prove), final=False)
            saver.wait()
    saver.start(300, parts(300), final=False)
    assert saver.wait() is not None
    assert names(run.checkpoints) == {"step-000300"}


def test_copies_lie_in_the_same_memory_from_save_to_save() -> None:
    buffers, live = Buffers(), {"w": torch.zeros(1000), "t": torch.arange(12.0).reshape(3, 4).t()}
    first = buffers.copy(live)
    where = {name: block.data.data_ptr() for name, block in first.items()}
    live["w"].add_(7)
    second = buffers.copy(live)
    assert {name: block.data.data_ptr() for name, block in second.items()} == where
    assert second["w"].data.equal(torch.full((1000,), 7.0)) and second["t"].data.equal(live["t"])
    assert second["t"].data.is_contiguous() and where["w"] != live["w"].data_ptr()


def _resources() -> tuple[int, int, int]:
    process = psutil.Process()
    gc.collect()
    threads = process.num_threads()
    for _ in range(20):  # one that has done its work may still be on its way out
        time.sleep(0.005)
        threads = min(threads, process.num_threads())
    return process.memory_info().rss, process.num_fds(), threads


def _twenty_saves(rank: int, size: int, path: str) -> tuple[list[int], list[int], list[int]]:
    """Resources after each save of a model of 7 MB, moments of 14 MB, by all processes."""
    trained = laid_out(Layout(dp_shard=size), preset="tiny-llama")
    gc.collect()
    gc.freeze()  # as the loop does; what was imported is not to be gone through each time
    big = {"extra": torch.zeros(1_500_000)}
    saver = Saver(RunDirectory(Path(path)), trained.processes, asynchronous=True, keep_last=2, keeps=lambda step: False)
    seen = []
    for step in range(1, 24):
        trained.step()
        made = trained.parts(step)
        state = {**(made.state_tensors or {}), "optimizer/extra/a": big["extra"], "optimizer/extra/b": big["extra"]}
        made = trained.parts(step, state_tensors=state)
        assert saver.start(step, made, final=False)
        del made, state
        assert saver.wait() is not None
        seen.append(_resources())
    rss, files, threads = zip(*seen, strict=True)
    return list(rss), list(files), list(threads)


@pytest.mark.parametrize("size", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_memory_and_open_files_stay_flat_over_twenty_saves(tmp_path: Path, size: int) -> None:
    # Buffers of 6 MB each come and go, and the allocator keeps one or two of them or not. A copy that is not given back
    # would be 84 MB more in the end.
    slack = 14_000_000
    for rss, files, threads in run_ranks(_twenty_saves, size, str(tmp_path)):
        assert median(rss[-7:]) - median(rss[2:9]) < slack, rss
        assert max(files[3:]) <= max(files[:3]), files
        assert min(threads[-7:]) <= min(threads[:7]), threads


ENDS_WITH_AN_ERROR = """
import sys, time
from pathlib import Path
from fake_checkpoints import ALONE, parts
from cheaptrain.checkpoint import write
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.saver import Saver
plain = write.write_state
def slow(*given):
    time.sleep(1)
    return plain(*given)
write.write_state = slow
saver = Saver(RunDirectory(Path(sys.argv[1])), ALONE, asynchronous=True, keep_last=2, keeps=lambda step: False)
saver.start(100, parts(100), final=False)
sys.exit(4)
"""


@pytest.mark.slow
def test_a_run_that_ends_with_an_error_does_not_drop_the_save_under_way(run: RunDirectory) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", ENDS_WITH_AN_ERROR, str(run.path)], env=environment, check=False)
    assert done.returncode == 4
    assert_is_step(newest_good(run, unexpected), 100)


EVENTS = [(os, "write"), (os, "fsync"), (os, "rename"), (os, "preadv"), (dist, "all_gather_object")]


def _count_events(at: int | None) -> list[int]:
    """Count the calls through which a save touches the disk or another process; die just before the given one."""
    count = [0]
    for module, name in EVENTS:
        plain = getattr(module, name)

        def counted(*given: Any, plain: Any = plain, **rest: Any) -> Any:
            count[0] += 1
            if count[0] == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*given, **rest)

        setattr(module, name, counted)
    return count


def _train_and_save(rank: int, size: int, path: str, who: int, at: int | None) -> int:
    trained = laid_out(Layout(dp_shard=2))
    run = RunDirectory(Path(path))
    saver = Saver(run, trained.processes, asynchronous=True, keep_last=2, keeps=lambda step: False)
    count = _count_events(at if rank == who else None)
    for step in range(1, 5):
        trained.step()
        saver.start(step, trained.parts(step), final=False)
        saver.wait()
    return count[0]


def test_a_process_killed_in_a_save_ends_the_others_and_leaves_nothing_half_made(tmp_path: Path) -> None:
    counts = run_ranks(_train_and_save, 2, str(tmp_path / "measured"), 0, None)
    seed = random.SystemRandom().randrange(10**6)
    draw = random.Random(seed)
    dead = 0
    for number in range(8):
        who = number % 2
        at = draw.randrange(counts[who] // 4, counts[who])  # after the first save
        path, told = tmp_path / f"run-{number}", f"seed {seed}: process {who} killed at call {at}"
        _opened(path).close()
        ended = end_ranks(_train_and_save, 2, str(path), who, at, folder=tmp_path / f"ended-{number}", timeout=60)
        if ended[who] == 0:  # its last calls are fewer than measured: another order of messages
            continue
        dead += 1
        assert ended == {who: -signal.SIGKILL, 1 - who: 1}, told
        error = (tmp_path / f"ended-{number}" / str(1 - who)).read_bytes().decode(errors="replace")
        assert "CheaptrainError" in error and "SaveFailed" not in error, told
        run = RunDirectory(path)
        assert all(verify_checkpoint(folder) == [] for folder in run.steps()), told
        assert newest_good(run, unexpected) is not None, told
        with _opened(path) as opened:
            assert opened.decision == "resume" and opened.directory.leftovers() == [], told
            assert set(opened.directory.steps()) == set(run.checkpoints.iterdir()), told
    assert dead >= 6


def _opened(path: Path) -> OpenedRun:
    given: dict[str, Any] = {"recipe": {}, "provenance": {}, "identity": {}, "inputs": {}}
    return open_run(path, **given, steps=lambda checkpoint: 10**6, report=lambda message: None)


def _heard_together(rank: int, size: int, path: str) -> list[Any]:
    trained = laid_out(Layout(dp_shard=2))
    run = RunDirectory(Path(path))
    saver = Saver(run, trained.processes, asynchronous=True, keep_last=2, keeps=lambda step: False)
    go = threading.Event()

    def prove(folder: Path) -> dict[str, Any]:  # on the main process only
        assert go.wait(60)
        raise ProofFailed("other weights")

    saver.start(1, trained.parts(1, prove=prove), final=False)
    before = saver.finished()
    go.set()
    told = raised(saver.wait)
    return [before, told, saver.finished()]


def test_every_process_hears_of_a_failed_proof_at_the_same_point(tmp_path: Path) -> None:
    first, second = run_ranks(_heard_together, 2, str(tmp_path))
    assert first == [False, "ProofFailed: other weights", True]
    assert second == [False, "ProofFailed: process 0: other weights", True]


class Said(list[str]):
    """A console."""

    def print(self, text: str, **_: Any) -> None:
        self.append(text)


@pytest.fixture(autouse=True)
def any_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model card says more of a stage than there is here."""
    monkeypatch.setattr("cheaptrain.train.save._card", lambda stage, weights: f"{len(weights)} tensors")


def stage_of(trained: Trained, run: RunDirectory, asynchronous: bool) -> Any:
    """As much of a stage as saving needs."""
    saver = Saver(run, trained.processes, asynchronous=asynchronous, keep_last=2, keeps=lambda step: False)
    run.path.mkdir(parents=True, exist_ok=True)
    records = JsonLines(run.metrics, None)
    return SimpleNamespace(
        processes=trained.processes,
        model=trained.model,
        root=trained.root,
        optimizers=trained.optimizers,
        saving=SimpleNamespace(saver=saver, form=trained.form),
        compute=SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32),
        proof_ids=torch.arange(16)[None],
        recipe=SimpleNamespace(
            checkpoint=SimpleNamespace(state_in_final=False), parallel=SimpleNamespace(start_timeout=60.0)
        ),
        ledger=SimpleNamespace(step=5, tokens_seen=50, failed_saves=0, to_json=lambda: {"step": 5}),
        lineage=LINEAGE,
        saved_recipe={},
        run_id="a",
        checkpoint_bytes=1,
        watch=SimpleNamespace(beat=lambda phase, step, **_: None),
        stop=SimpleNamespace(note_save=lambda seconds: None),
        console=Said(),
        samples=SimpleNamespace(sync=lambda: None),
        metrics=SimpleNamespace(file=records, write=lambda step, values: records.append({"step": step, **values})),
    )


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_stage_saves_counts_what_fails_and_proves_to_the_last_bit(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    trained = alone()
    stage = stage_of(trained, run, asynchronous)
    trained.step()
    assert save(stage, final=False)
    trained.step()  # beside the save
    stage.ledger.step = 6
    assert collect_save(stage) and collect_save(stage)
    manifest = json.loads((run.step(5) / "manifest.json").read_text())
    assert manifest["proof"] == {"max_abs_difference": 0.0, "tokens": 16}
    (saved,) = read_records(run.metrics)
    assert saved["checkpoint/step"] == 5 and saved["step"] == (6 if asynchronous else 5)
    assert saved["checkpoint/bytes"] == sum(f.stat().st_size for f in run.step(5).rglob("*") if f.is_file())
    assert saved["checkpoint/seconds"] > 0 and saved["checkpoint/stall_seconds"] > 0

    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_weights", refuse)
        assert save(stage, final=False) is asynchronous
        poll_save(stage)
        assert collect_save(stage) is not asynchronous or stage.ledger.failed_saves == 1
        assert stage.ledger.failed_saves == 1 and "training goes on" in stage.console[-1]
        assert read_records(run.metrics)[-1]["checkpoint/failed"] == 1
        with pytest.raises(SaveFailed):
            save(stage, final=True)
    assert save(stage, final=True)
    assert run.final.resolve() == run.step(6).resolve() and not (run.step(6) / "state").exists()
    stage.metrics.file.close()


def test_a_save_that_was_not_heard_of_is_heard_of_before_the_next(run: RunDirectory) -> None:
    trained = alone()
    stage = stage_of(trained, run, True)
    for step in (5, 10, 15):
        stage.ledger.step = stage.ledger.tokens_seen = step
        assert save(stage, final=False)
    assert collect_save(stage)
    assert [r["checkpoint/step"] for r in read_records(run.metrics)] == [5, 10, 15]
    assert names(run.checkpoints) == {"step-000010", "step-000015"}
    stage.metrics.file.close()


def test_weights_that_change_between_the_copy_and_the_live_logits_are_no_checkpoint(run: RunDirectory) -> None:
    """What the proof compares is the files with the moment of the save, not with the copies they were made from."""
    trained = alone()
    stage = stage_of(trained, run, True)
    plain = stage.saving.saver.start

    def start(step: int, made: Any, **rest: Any) -> bool:
        with torch.no_grad():
            trained.model.get_parameter("model.norm.weight").mul_(1.001)
        return bool(plain(step, made, **rest))

    stage.saving.saver.start = start
    save(stage, final=False)
    with pytest.raises(ProofFailed, match="logits from the files differ"):
        collect_save(stage)
    assert names(run.checkpoints) == set()
    stage.metrics.file.close()
