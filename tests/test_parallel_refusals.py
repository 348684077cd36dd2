"""A layout that cannot be is refused in words, by all processes alike, before it has touched the run it was for."""

from pathlib import Path
from typing import Any

import pytest
from small_runs import (
    prepare,
    recipe_table,
    signal_at_step,
    tail,
    train_together,
    write_recipe,
    write_texts,
)

from cheaptrain.durable import sha256_of
from cheaptrain.errors import PreflightError
from cheaptrain.model.config import model_config
from cheaptrain.parallel.tensor import check_tensor_parallel
from cheaptrain.recipe.schema import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data, and `run`: stopped after its second step of 12 rows, on two processes."""
    path = tmp_path_factory.mktemp("refusals")
    write_texts(path)
    recipe = write_recipe(path / "run.toml", _table(path, "run"))
    prepare(recipe)
    assert train_together(2, [recipe], path / "run.log", lambda rank: signal_at_step(2)) == {0: 75, 1: 75}
    return path


def _table(folder: Path, run: str, **model: Any) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["train"] |= {"steps": 4, "global_batch_tokens": 12 * 64, "micro_batch_size": 3, "warmup": 0}
    table["validation"]["every"] = "4 steps"
    return table | ({"model": model} if model else {})


def _everything(run: Path) -> dict[str, tuple[str, int]]:
    """Hash and time of every file."""
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    return {str(path): (sha256_of(path), path.stat().st_mtime_ns) for path in files}


def _refused(folder: Path, recipe: str, processes: int, code: int, words: list[str], *settings: str) -> None:
    log = folder / "refused.log"
    log.unlink(missing_ok=True)
    assert train_together(processes, [recipe, *settings], log) == dict.fromkeys(range(processes), code), tail(log)
    said = tail(log)
    assert "Traceback" not in said
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("processes", "settings", "code", "words"),
    [
        (
            5, ["train.micro_batch_size=1"], 2,
            ["12 rows a step", "do not divide over 5 processes", "micro_batch_size 1: 1, 2, 3, 4, 6 or 12 processes"],
        ),
        (2, ["train.micro_batch_size=4"], 2, ["do not divide over 2 processes", "micro_batch_size 1, 2, 3 or 6"]),
        (2, ["parallel.dp_shard=4"], 2, ["dp_shard = 4 (", "takes 4 processes, not 2: start 4"]),
        (3, ["parallel.tp=2"], 2, ["takes a multiple of 2 processes, not 3: start 2 or 4"]),
        (1, ["parallel.dp_shard=2"], 2, ["takes 2 processes, not 1: start 2"]),
        (3, ["parallel.tp=3"], 2, ["rows of 64 tokens do not divide over cp 1 x tp 3", "63 or 66"]),
        (4, ["parallel.tp=4"], 3, ["parallel.tp = 4 does not divide the key/value heads (2)", "parallel.tp = 2"]),
        (4, ["parallel.cp=4"], 3, ["4 attention heads and 2 key/value heads", "set parallel.cp = 2, or 1"]),
        (4, ["parallel.cp=2", "parallel.tp=2"], 3, ["parallel.tp = 2 leaves each process 2 and 1", "parallel.cp = 1"]),
    ],
)  # fmt: skip
def test_a_layout_that_cannot_be_changes_the_run_it_is_refused_for(
    folder: Path, processes: int, settings: list[str], code: int, words: list[str]
) -> None:
    before = _everything(folder / "run")
    _refused(folder, str(folder / "run.toml"), processes, code, words, *settings)
    assert _everything(folder / "run") == before and len(before) > 10


def test_a_class_that_cannot_be_split_is_found_when_its_stage_begins(folder: Path) -> None:
    """GPT-2 keeps query, key and value in one matrix, and learns its positions."""
    first = write_recipe(folder / "first.toml", _table(folder, "first"))
    gpt2 = write_recipe(folder / "gpt2.toml", _table(folder, "gpt2", preset="tiny-gpt2"))
    _refused(folder, first, 2, 3, ["GPT2LMHeadModel cannot be split with parallel.tp"], gpt2, "parallel.tp=2")
    assert not (folder / "first").exists() and not (folder / "gpt2").exists()


def test_the_run_that_was_refused_so_often_goes_on(folder: Path) -> None:
    log = folder / "after.log"
    settings = ["parallel.tp=2", "train.micro_batch_size=6"]
    assert train_together(2, [str(folder / "run.toml"), *settings], log) == {0: 0, 1: 0}, tail(log)
    assert "step 4/4" in tail(log)


@pytest.mark.parametrize(
    ("overrides", "tp", "what"),
    [
        ({"num_attention_heads": 6, "num_key_value_heads": 6}, 4, "attention heads (6) of this model: parallel.tp = 2"),
        ({"num_key_value_heads": 1}, 2, "key/value heads (1) of this model: no parallel.tp above 1"),
        ({}, 3, "attention heads (4) of this model: parallel.tp = 2"),
        ({}, 5, "attention heads (4)"),
    ],
)
def test_heads_that_do_not_divide_are_cut_in_two(overrides: dict[str, Any], tp: int, what: str) -> None:
    config = model_config(Model(preset="tiny-qwen3", overrides=overrides), vocab_size=384, seq_len=64)
    check_tensor_parallel(config, 1)
    with pytest.raises(PreflightError) as refusal:
        check_tensor_parallel(config, tp)
    assert f"parallel.tp = {tp} does not divide the {what}" in str(refusal.value)


def test_a_vocabulary_that_does_not_divide_is_cut_unevenly() -> None:
    config = model_config(Model(preset="tiny-qwen3", vocab_multiple=1), vocab_size=385, seq_len=64)
    with pytest.raises(PreflightError, match=r"vocabulary \(385\)"):
        check_tensor_parallel(config, 2)
