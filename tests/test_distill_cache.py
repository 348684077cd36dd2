"""A cached teacher says what the teacher at hand says, of the same rows, or is refused."""

import json
import os
import signal
import time
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runs import (
    final_weights,
    in_child,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    signal_at_step,
    tail,
    train,
    train_together,
    write_recipe,
    write_texts,
)

from cheaptrain.data import topk_cache
from cheaptrain.data.topk_cache import CacheSpec, Said, begin_cache, finish_cache, open_cache, write_shard
from cheaptrain.errors import PreflightError
from cheaptrain.recipe.load import load_recipe

STEPS, K = 12, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, a teacher, a student that had it at hand, and the cache of the same run."""
    path = tmp_path_factory.mktemp("cached")
    write_texts(path)
    table = recipe_table(path, "teacher")
    table["train"]["steps"] = 20
    teacher = write_recipe(path / "teacher.toml", table)
    prepare(teacher)
    log = path / "first.log"
    assert run_child(train(teacher, _student(path, "online", cached=False)), log) == 0, tail(log)
    assert run_child(_fill(_student(path, "cached")), log) == 0, tail(log)
    return path


def _student(folder: Path, run: str, cached: bool = True, **distill: Any) -> str:
    table = recipe_table(folder, run)
    table["model"] = {"preset": "tiny-llama", "overrides": {"num_hidden_layers": 1}}
    table["train"] |= {"objective": "distill", "steps": STEPS}
    table["distill"] = {"teacher": str(folder / "teacher" / "final"), "alpha": 0.8, "temperature": 2.0, "top_k": K}
    table["distill"] |= ({"cache": str(folder / "cache")} if cached else {}) | distill
    return write_recipe(folder / f"{run}.toml", table)


def _fill(recipe: str, *overrides: str, part: tuple[int, int] | None = None, small: bool = False) -> Any:
    """Work for a child. `small`: shards of 4 rows."""

    def work() -> None:
        from cheaptrain.train import cached_teacher
        from cheaptrain.train.distill_cache import fill_cache

        if small:
            cached_teacher.rows_per_shard = lambda *_: 4
        fill_cache(load_recipe(recipe, overrides), part, Console(emoji=False))

    return work


def _steps(run: Path) -> list[tuple[float, ...]]:
    keys = ("train/loss", "kd/loss", "kd/agreement", "train/cross_entropy", "train/accuracy", "train/grad_norm")
    records = [record for record in read_lines(run / "metrics.jsonl") if "train/loss" in record]
    return [tuple(record[key] for key in keys) for record in records]


def test_training_from_the_cache_is_training_with_top_k_of_the_teacher(folder: Path) -> None:
    log = folder / "cached.log"
    away = (folder / "teacher").rename(folder / "teacher-away")  # nobody may need it
    try:
        assert run_child(train(_student(folder, "cached")), log) == 0, tail(log)
    finally:
        away.rename(folder / "teacher")
    assert _steps(folder / "cached") == _steps(folder / "online") and len(_steps(folder / "online")) == STEPS
    ours, theirs = final_weights(folder / "cached"), final_weights(folder / "online")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("layout", [("parallel.dp_shard=2",), pytest.param(("parallel.cp=2",), marks=pytest.mark.slow)])
def test_any_processes_read_the_same_of_the_cache(folder: Path, layout: tuple[str, ...]) -> None:
    name, log = f"together-{len(layout[0])}", folder / "together.log"
    recipe = _student(folder, name)
    arguments = [recipe, *layout, "train.micro_batch_size=1"]
    if "cp" in layout[0]:
        arguments.append("model.overrides.num_key_value_heads=2")
        with_heads = _student(folder, "heads", cached=False)
        assert run_child(train(with_heads, "model.overrides.num_key_value_heads=2"), log) == 0, tail(log)
    assert train_together(2, arguments, log) == {0: 0, 1: 0}, tail(log)
    wanted = _steps(folder / ("heads" if "cp" in layout[0] else "online"))
    for ours, theirs in zip(_steps(folder / name), wanted, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_a_run_goes_on_from_the_cache_that_began_without_it(folder: Path) -> None:
    log = folder / "changing.log"

    def stopped() -> None:
        signal_at_step(5)
        train(_student(folder, "changing", cached=False))()

    assert run_child(stopped, log) == 75, tail(log)
    assert run_child(train(_student(folder, "changing")), log) == 0, tail(log)
    ours, theirs = final_weights(folder / "changing"), final_weights(folder / "online")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _files(cache: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in cache.iterdir()}


def test_a_killed_writer_goes_on_and_parts_make_the_same_cache(folder: Path) -> None:
    recipe, log = _student(folder, "parts"), folder / "parts.log"
    whole, killed, shared = (folder / name for name in ("whole", "killed", "shared"))
    assert run_child(_fill(recipe, f"distill.cache={whole}", small=True), log) == 0, tail(log)
    assert len(list(whole.glob("*.safetensors"))) == STEPS
    child = in_child(_fill(recipe, f"distill.cache={killed}", small=True), log)
    deadline = time.monotonic() + 60
    while len(list(killed.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    there = {name: content for name, content in _files(killed).items() if name.startswith("rows-")}
    assert "manifest.json" not in _files(killed)
    with pytest.raises(PreflightError, match=r"has \d+ of 12 shards; run: cheaptrain distill-cache"):
        open_cache(killed)
    assert run_child(_fill(recipe, f"distill.cache={killed}", small=True), log) == 0, tail(log)
    assert _files(killed) == _files(whole) and there.items() <= _files(killed).items()
    for part in ((2, 2), (1, 2)):
        assert run_child(_fill(recipe, f"distill.cache={shared}", small=True, part=part), log) == 0, tail(log)
    assert _files(shared) == _files(whole)


def test_a_cache_the_disk_has_no_room_for_is_refused_before_the_teacher_is_asked(folder: Path) -> None:
    cache, log = folder / "room", folder / "room.log"
    fill = _fill(_student(folder, "room"), f"distill.cache={cache}")

    def work() -> None:
        with patch("shutil.disk_usage", return_value=SimpleNamespace(free=1000)):
            fill()

    assert run_child(work, log) == 3, tail(log)
    assert "room: 123 kB to come, 1 kB free" in " ".join(tail(log).split())
    assert [file.name for file in cache.iterdir()] == ["cache.json"]


def _refused(recipe: str, log: Path, *overrides: str) -> str:
    assert run_child(train(recipe, *overrides), log) == 3, tail(log)
    return " ".join(tail(log).split())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("distill.temperature=1.0", "temperature: 2.0 there, 1.0 wanted"),
        ("distill.top_k=5", "top_k: 6 there, 5 wanted"),
        ("seed=12", "seed: 11 there, 12 wanted"),
        ("train.steps=13", "rows: 48 there, 52 wanted"),
        ("data.seq_len=32", "seq_len: 64 there, 32 wanted"),
        ("data.sources.notes.weight=2", "weights.notes: 1.0 there, 2.0 wanted"),
        ("distill.precision=bf16", "precision: auto there, bf16 wanted"),
    ],
)
def test_the_cache_of_something_else_is_refused_before_step_0(folder: Path, change: str, said: str) -> None:
    recipe = _student(folder, "else")
    assert said in _refused(recipe, folder / "else.log", change)
    assert not (folder / "else" / "metrics.jsonl").exists()


def test_the_cache_of_another_teacher_is_refused(folder: Path) -> None:
    other = folder / "teacher" / "checkpoints" / "step-000015"
    said = _refused(_student(folder, "another", teacher=str(other)), folder / "another.log")
    assert "is the cache of something else (teacher: " in said


def test_a_changed_byte_in_the_cache_is_found_before_step_0(folder: Path) -> None:
    (shard,) = (folder / "cache").glob("*.safetensors")
    kept = shard.read_bytes()
    shard.write_bytes(kept[:-5] + bytes([kept[-5] ^ 1]) + kept[-4:])
    try:
        said = _refused(_student(folder, "byte"), folder / "byte.log")
    finally:
        shard.write_bytes(kept)
    assert "its content changed (SHA-256 differs); remove it, and run: cheaptrain distill-cache" in said


def test_what_is_read_is_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = np.random.default_rng(0)
    for vocab, kind in ((300, np.uint16), (100_000, np.int32)):
        cache = tmp_path / str(vocab)
        spec = begin_cache(cache, CacheSpec({"teacher": "x"}, 7, 5, 3, vocab, 3))
        assert spec.shards == 3 and spec.id_dtype == kind
        said = Said(
            draw.integers(0, vocab, (7, 5, 3)).astype(np.int32),
            draw.random((7, 5, 3), np.float32),
            draw.random((7, 5), np.float32),
        )
        for number in range(3):
            rows = spec.shard_rows(number)
            part = slice(rows.start, rows.stop)
            write_shard(cache, spec, number, Said(said.ids[part], said.log_probabilities[part], said.log_rest[part]))
        assert finish_cache(cache, spec) == []
        read = open_cache(cache)
        read.verify()
        rows = np.array([6, 0, 2, 3])
        again = read.read(rows)
        assert again.ids.dtype == kind and np.array_equal(again.ids, said.ids[rows])
        assert np.array_equal(again.log_probabilities, said.log_probabilities[rows])
        assert np.array_equal(again.log_rest, said.log_rest[rows])
        with pytest.raises(PreflightError, match="holds 7 rows, and row 7 is asked for"):
            read.read(np.array([7]))
        size = sum(file.stat().st_size for file in cache.glob("*.safetensors"))
        assert 0 < size - 7 * spec.row_bytes < 3 * 500  # the plan's figure, and the heads of the files
    monkeypatch.setattr(topk_cache, "_SHARD_BYTES", 1000)
    assert topk_cache.rows_per_shard(100, 3) == 9 and topk_cache.rows_per_shard(2000, 3) == 3


def test_the_plan_shows_the_disk_of_the_cache_and_what_it_spares(folder: Path) -> None:
    from cheaptrain.report.plan import print_plans

    out = StringIO()
    print_plans([load_recipe(_student(folder, "planned"), [])], Console(file=out, width=100))
    text = out.getvalue()
    assert f"read from {folder / 'cache'}" in text.replace("\n", "")
    assert "the cache spares" in text and "% of all computing" in text
    assert "teacher      " in text and "6 tokens a position, 2.56 kB a row" in text
    content = json.loads((folder / "cache" / "cache.json").read_text(encoding="utf-8"))
    assert content["rows"] * 64 * (6 * 6 + 4) == 48 * 2560
