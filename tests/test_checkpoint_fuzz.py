"""Two hundred damages to real checkpoints, written by one process and by two: none is ever loaded as something else."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoints import ALONE
from ranks import run_ranks
from sharded_saves import Trained, alone, laid_out

from cheaptrain.checkpoint.load import load_state_into
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import listed_files, newest_good
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.layout import Layout

torch.set_num_threads(1)

OLD, NEW = 100, 200


def _write_two(rank: int, size: int, path: str) -> list[dict[str, str]]:
    trained = laid_out(Layout(dp_shard=size))
    hashes = []
    for step in (OLD, NEW):
        trained.step()
        trained.save(path, step)
        hashes.append(trained.hashes())
    return hashes


def _flip(run: RunDirectory, file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)


def _cut(run: RunDirectory, file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: draw.randrange(len(content))])


def _delete(run: RunDirectory, file: Path, draw: random.Random) -> None:
    file.unlink()


def _older(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """The file of the same name of the older checkpoint."""
    shutil.copy(run.step(OLD) / file.relative_to(run.step(NEW)), file)


def _exchange(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """Two files of the checkpoint, under each other's name."""
    other = run.step(NEW) / draw.choice(listed_files(run.step(NEW)))
    mine, theirs = file.read_bytes(), other.read_bytes()
    file.write_bytes(theirs), other.write_bytes(mine)


def _json_of(run: RunDirectory, draw: random.Random) -> Path:
    return draw.choice(sorted(run.step(NEW).rglob("*.json")))


def _edit(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """One value of a JSON file is another."""
    file = _json_of(run, draw)
    table = json.loads(file.read_text())
    node, places = table, []
    while isinstance(node, dict) and node:
        key = draw.choice(sorted(node))
        places.append((node, key))
        node = node[key]
    where, key = places[-1]
    where[key] = draw.choice([None, 0, 1e9, "x", [], {}, not where[key]])
    file.write_text(json.dumps(table))


def _twice(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """A key stands twice, with another value first."""
    file = _json_of(run, draw)
    table = json.loads(file.read_text())
    key = draw.choice(sorted(table))
    file.write_text("{" + f"{json.dumps(key)}: {draw.randrange(9)}, " + file.read_text().lstrip()[1:])


def _rename(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """The folder says another step."""
    run.step(NEW).rename(run.step(draw.choice([NEW + 1, 10 * NEW, 150])))


def _older_under_newer_name(run: RunDirectory, file: Path, draw: random.Random) -> None:
    shutil.rmtree(run.step(NEW))
    shutil.copytree(run.step(OLD), run.step(NEW))


def _stranger(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """A file more, with tensors of the older checkpoint."""
    source = draw.choice(sorted(run.step(OLD).rglob("*.safetensors")))
    place = run.step(NEW) / draw.choice([".", "state"])
    shutil.copy(source, place / f"{draw.choice(['model', 'process', 'x'])}-{draw.randrange(99):05d}.safetensors")


def _zero(run: RunDirectory, file: Path, draw: random.Random) -> None:
    """What some file systems leave after a power cut."""
    file.write_bytes(bytes(len(file.read_bytes())))


def _grow(run: RunDirectory, file: Path, draw: random.Random) -> None:
    with file.open("ab") as end:
        end.write(draw.randbytes(draw.randrange(1, 9)))


DAMAGES: list[Callable[[RunDirectory, Path, random.Random], None]] = [
    _flip, _cut, _delete, _older, _exchange, _edit, _twice, _rename, _older_under_newer_name, _stranger, _zero, _grow,
]  # fmt: skip


def _outcome(run: RunDirectory, trained: Trained) -> tuple[str, Any]:
    """How a resume ends: refused, passed over for the older one, or loaded; and with what."""
    reports: list[str] = []
    try:
        checkpoint = newest_good(run, reports.append)
        assert checkpoint is not None
        scalars = load_state_into(checkpoint, trained.model, trained.optimizers, ALONE)
    except PreflightError as error:
        return "refused", str(error)
    assert scalars["step"] == checkpoint.step
    return ("loaded" if not reports else "passed over", (checkpoint.step, trained.hashes(), reports))


@pytest.mark.parametrize("size", [1, 2])
def test_no_damage_makes_another_checkpoint_of_one(tmp_path: Path, size: int) -> None:
    old, new = run_ranks(_write_two, size, str(tmp_path / "whole"))[0]
    assert old != new
    trained, draw, seen = alone(), random.Random(size), dict[str, set[str]]()
    for number in range(100):
        run = RunDirectory(tmp_path / "run")
        shutil.copytree(tmp_path / "whole", run.path)
        damage = DAMAGES[number % len(DAMAGES)]
        file = run.step(NEW) / draw.choice(listed_files(run.step(NEW)))
        damage(run, file, draw)
        how, what = _outcome(run, trained)
        told = f"{damage.__name__} of {file.name} ({number} of {size}): {how}"
        if how == "refused":
            assert str(run.path) in what, told  # it says where
        else:
            step, hashes, reports = what
            assert (step, hashes) in ((NEW, new), (OLD, old)), told
            assert (step == OLD) is bool(reports), told
        seen.setdefault(how, set()).add(damage.__name__)
        shutil.rmtree(run.path)
    assert len(seen["passed over"]) >= 9 and seen["refused"] == {"_stranger"}
    assert seen["loaded"] <= {"_older", "_exchange", "_edit", "_stranger"}  # where the bytes or their sense stayed
