"""kill -9 at any moment of saving, deleting or linking: what is left is whole, and no half-made folder is taken."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent

# One process that imports torch once and forks the trainers that are to be killed.
TRAINER = """
import os, random, shutil, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import fake_checkpoints as fake
from cheaptrain.checkpoint import rundir
from cheaptrain.checkpoint.retention import finish, prune
from cheaptrain.checkpoint.jsonl import JsonLines, read_records
from cheaptrain.checkpoint.paths import DELETING, WRITING
from cheaptrain.checkpoint.rundir import open_run
from cheaptrain.checkpoint.verify import newest_good, verify_checkpoint

STEPS, SIZE = 400, 20_000

def open_it(path, report=lambda message: None):
    what = {"recipe": {}, "provenance": {}, "identity": {"seed": 1}, "inputs": {}}
    return open_run(path, **what, steps=lambda checkpoint: STEPS, report=report)

def train(path, last=STEPS):
    # A run that saves every 10 steps, keeps two, and links its last checkpoint.
    with open_it(path) as opened:
        if opened.decision == "done":
            return
        run = opened.directory
        step = opened.checkpoint.step if opened.checkpoint else 0
        with JsonLines(run.metrics, opened.resumed_step) as metrics:
            while step < last:
                step += 10
                metrics.append({"step": step, "train/loss": step / 3})
                fake.save(run, step, SIZE)
                if step == STEPS:
                    finish(run, step)
                prune(run, keep_last=2, keeps=lambda step: False)

def kill_at_call(number):
    # Die just before the given one of the calls that changes the disk in a way a reader could see.
    count = 0
    def counted(module, name):
        real = getattr(module, name)
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        setattr(module, name, call)
    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "symlink"):
        counted(os, name)
    counted(shutil, "rmtree")

def in_child(do):
    pid = os.fork()
    if pid == 0:
        try:
            do()
        except BaseException:
            import traceback
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return pid

def check(path, least):
    # What a reader finds after the kill; returns the newest step.
    run = rundir.RunDirectory(path)
    for folder in run.steps():
        assert verify_checkpoint(folder) == [], (folder, verify_checkpoint(folder))
    newest = newest_good(run, fake.unexpected)
    if newest is None:
        assert least == 0
    else:
        assert newest.step >= least, "a finished checkpoint was lost"
        fake.assert_is_step(newest, newest.step, SIZE)
    if run.final.is_symlink():
        assert newest is not None and run.final.resolve() == newest.path.resolve()
    assert not [p for p in run.checkpoints.glob("*") if not p.name.startswith(("step-", WRITING, DELETING))]
    return newest.step if newest else 0

def check_resumed(path, last):
    with open_it(path, print) as opened:
        assert opened.directory.leftovers() == [], opened.directory.leftovers()
        assert {p.name for p in path.iterdir()} <= {"lock", "recipe.json", "metrics.jsonl", "checkpoints", "final"}
    assert [r["step"] for r in read_records(path / "metrics.jsonl")] == list(range(10, last + 1, 10))
"""


def trainer(script: str, *arguments: object) -> list[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", TRAINER + script, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout.splitlines()


RANDOM_MOMENTS = """
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
rng, killed, finished = random.Random(seed), 0, 0
began = time.perf_counter()
train(folder / "measured", 30)
pace = (time.perf_counter() - began) / 3
while killed < 20 or not finished:
    path, step = folder / f"run-{finished}", 0
    while True:
        child = in_child(lambda: train(path))
        if killed < 20 or step == 0:
            time.sleep(rng.random() * 2 * pace)
            os.kill(child, signal.SIGKILL)
        if os.waitpid(child, 0)[1] == 0:
            break  # done first, or no longer to be killed
        killed, before, step = killed + 1, step, check(path, step)
        pace *= 1.2 if step == before == 0 else 1  # the machine has become slower since the pace was taken
    assert check(path, STEPS) == STEPS
    assert open_it(path).decision == "done"
    finished += 1
print(killed)
"""


@pytest.mark.slow
def test_twenty_kills_at_random_moments_lose_no_checkpoint_and_leave_nothing_half_made(tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(10**6)
    (killed,) = trainer(RANDOM_MOMENTS, tmp_path, seed)
    assert int(killed) >= 20, f"seed {seed}"


EVERY_CALL = """
path = Path(sys.argv[1])
train(path, 380)  # then: save 390, prune, save 400, link, prune
dead = 0
for number in range(1, 1000):
    copy = path.with_name(f"copy-{number}")
    shutil.copytree(path, copy)
    def die():
        kill_at_call(number)
        train(copy)
    if os.waitpid(in_child(die), 0)[1] == 0:
        break
    dead += 1
    check(copy, 380)
    train(copy)
    assert check(copy, STEPS) == STEPS
    check_resumed(copy, STEPS)
    shutil.rmtree(copy)
print(dead)
"""


def test_a_kill_before_any_call_that_changes_the_disk_is_survived(tmp_path: Path) -> None:
    (line,) = trainer(EVERY_CALL, tmp_path / "run")
    assert int(line) > 60


ORPHAN = """
path = Path(sys.argv[1])
def parent():
    opened = open_it(path)
    if os.fork() == 0:
        time.sleep(60)  # a worker that outlives its trainer
        os._exit(0)
    print(opened.decision, flush=True)
    time.sleep(60)
read, write = os.pipe()
os.setpgid(0, 0)
child = in_child(parent)
time.sleep(0.5)
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
print(open_it(path).decision, flush=True)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.killpg(0, signal.SIGTERM)
"""


def test_a_worker_that_outlives_its_killed_trainer_does_not_keep_the_run_locked(tmp_path: Path) -> None:
    assert trainer(ORPHAN, tmp_path / "run") == ["fresh", "fresh"]
