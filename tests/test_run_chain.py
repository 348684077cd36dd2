"""Whole runs through the one door: chained, skipped, refused, stopped, diverged, out of space; and what they leave
behind."""

import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import (
    final_weights,
    in_child,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train,
    train_with_spy,
    write_recipe,
    write_texts,
)
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chain")
    write_texts(path)
    prepare(write_recipe(path / "prepare.toml", recipe_table(path)))
    return path


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[str, str]:
    """Two phases, the second from the weights of the first, run in one launch."""
    first = write_recipe(folder / "first.toml", recipe_table(folder, "first"))
    table = recipe_table(folder, "second")
    table["model"] = {"init_from": str(folder / "first" / "final")}
    table["train"]["steps"] = 20
    table["samples"] = {"prompts": ["prose 1: the"], "max_new_tokens": 8, "temperature": 0.7}
    second = write_recipe(folder / "second.toml", table)
    assert run_child(train(first, second), folder / "trained.log") == 0, tail(folder / "trained.log")
    return first, second


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_second_phase_starts_from_the_weights_of_the_first(folder: Path, trained: tuple[str, str]) -> None:
    end_of_first = [r["val/loss"] for r in read_lines(folder / "first" / "metrics.jsonl") if "val/loss" in r][-1]
    start_of_second = next(r["val/loss"] for r in read_lines(folder / "second" / "metrics.jsonl") if "val/loss" in r)
    assert start_of_second == end_of_first
    manifest = json.loads((folder / "first" / "final" / "manifest.json").read_text())
    recipe = json.loads((folder / "second" / "recipe.json").read_text())
    assert recipe["inputs"]["init_from"] and manifest["step"] == 60


def test_finished_stages_are_skipped_and_not_a_byte_changes(folder: Path, trained: tuple[str, str]) -> None:
    before = _hashes(folder / "first") | _hashes(folder / "second")
    log = folder / "again.log"
    assert run_child(train(*trained), log) == 0, tail(log)
    assert _hashes(folder / "first") | _hashes(folder / "second") == before
    assert log.read_text().count("done already") == 2


def test_a_changed_recipe_is_refused_saying_what_changed(folder: Path, trained: tuple[str, str]) -> None:
    log = folder / "changed.log"
    assert run_child(train(trained[0], "train.lr=5e-3"), log) == 3
    assert "train.lr: 0.003 -> 0.005 (command line)" in log.read_text()


def test_operational_keys_may_change_on_a_finished_run(folder: Path, trained: tuple[str, str]) -> None:
    log = folder / "operational.log"
    assert run_child(train(trained[0], "log.every=7 steps", "train.micro_batch_size=4"), log) == 0, tail(log)
    assert "done already" in log.read_text()


def test_transformers_loads_the_checkpoint_and_gives_the_proven_logits(folder: Path, trained: tuple[str, str]) -> None:
    final = folder / "second" / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert type(model).__name__ == "Qwen3ForCausalLM"
    manifest = json.loads((final / "manifest.json").read_text())
    assert manifest["proof"]["max_abs_difference"] == 0.0 and manifest["proof"]["tokens"] == 64
    ids = tokenizer("prose 7: the river", return_tensors="pt").input_ids
    loss = model(ids, labels=ids).loss.item()
    fresh = AutoModelForCausalLM.from_config(model.config)(ids, labels=ids).loss.item()
    assert loss < fresh - 2  # 5.9 nats untrained, about 3 trained
    config = json.loads((final / "config.json").read_text())
    assert config["use_cache"] is True and "cheaptrain" not in json.dumps(config)
    assert config["eos_token_id"] == tokenizer.eos_token_id


def test_samples_and_validation_do_not_disturb_training(folder: Path, trained: tuple[str, str]) -> None:
    quiet = recipe_table(folder, "quiet")
    quiet["model"] = {"init_from": str(folder / "first" / "final")}
    quiet["train"]["steps"] = 20
    quiet["validation"] = {"every": "20 steps", "tokens": 64}
    recipe = write_recipe(folder / "quiet.toml", quiet)
    assert run_child(train(recipe), folder / "quiet.log") == 0, tail(folder / "quiet.log")
    ours, theirs = final_weights(folder / "quiet"), final_weights(folder / "second")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    samples = read_lines(folder / "second" / "samples.jsonl")
    assert [sample["step"] for sample in samples] == [0, 10, 20]


def test_a_disk_full_in_the_middle_of_a_save_costs_that_checkpoint_only(folder: Path, trained: tuple[str, str]) -> None:
    table = recipe_table(folder, "full")
    table["checkpoint"] |= {"asynchronous": False}  # the limit below is lifted when the save returns
    recipe = write_recipe(folder / "full.toml", table)
    half = (folder / "first" / "final" / "model.safetensors").stat().st_size // 2

    def work() -> None:
        from cheaptrain.train import loop

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        plain = loop.save

        def save(stage: Any, *, final: bool) -> Any:
            if stage.ledger.step not in (15, 20):
                return plain(stage, final=final)
            resource.setrlimit(
                resource.RLIMIT_FSIZE, (half, resource.RLIM_INFINITY)
            )  # writing more fails like a full disk
            try:
                return plain(stage, final=final)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                good = sorted(p.name for p in (folder / "full" / "checkpoints").iterdir())
                assert good == ["step-000005", "step-000010"], good

        loop.save = save
        train(recipe)()

    assert run_child(work, folder / "full.log") == 0, tail(folder / "full.log")
    log = (folder / "full.log").read_text()
    assert log.count("training goes on") == 2
    failed = [
        record["checkpoint/failed"]
        for record in read_lines(folder / "full" / "metrics.jsonl")
        if "checkpoint/failed" in record
    ]
    assert failed == [1, 2]
    ours, theirs = final_weights(folder / "full"), final_weights(folder / "first")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_last_checkpoint_that_cannot_be_written_is_an_error_and_can_be_repeated(
    folder: Path, trained: tuple[str, str]
) -> None:
    recipe = write_recipe(folder / "last.toml", recipe_table(folder, "last"))

    def work() -> None:
        from cheaptrain.train import loop

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        plain = loop.save

        def save(stage: Any, *, final: bool) -> Any:
            if final:
                resource.setrlimit(resource.RLIMIT_FSIZE, (2000, resource.RLIM_INFINITY))
            return plain(stage, final=final)

        loop.save = save
        train(recipe)()

    assert run_child(work, folder / "last.log") == 1
    assert not (folder / "last" / "final").exists()
    assert run_child(train(recipe), folder / "last.log") == 0, tail(folder / "last.log")
    ours, theirs = final_weights(folder / "last"), final_weights(folder / "first")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGUSR1))]
)
def test_a_signal_saves_and_exits_75_and_the_same_command_goes_on(
    folder: Path, trained: tuple[str, str], number: signal.Signals
) -> None:
    name = f"stopped-{number.name}"
    recipe = write_recipe(folder / f"{name}.toml", recipe_table(folder, name))
    log, spy = folder / f"{name}.log", folder / f"{name}.spy"
    pid = in_child(train_with_spy([recipe], spy), log)
    deadline = time.monotonic() + 60
    while not (spy.exists() and len(spy.read_text().splitlines()) >= 7):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(pid, number)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 75, tail(log)
    done = len(read_lines(spy))
    assert done < 60 and (folder / name / "checkpoints" / f"step-{done:06d}").exists()
    assert run_child(train_with_spy([recipe], spy), log) == 0, tail(log)
    assert len(read_lines(spy)) == 60  # nothing was done twice
    ours, theirs = final_weights(folder / name), final_weights(folder / "first")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def _poisoned(recipe: str, steps: tuple[int, ...]) -> Callable[[], None]:
    """Train with the loss of some steps made NaN."""

    def work() -> None:
        from cheaptrain.train import loop
        from cheaptrain.train.objective import Sums, next_token

        done = {"steps": 0}
        plain = loop.train_step

        def poisoned(model: Any, batches: Any, compute: Any) -> Sums:
            sums = next_token(model, batches, compute)
            bad = float("nan") if done["steps"] in steps else 1.0
            return Sums(sums.loss * bad, sums.correct)

        def counted(*arguments: Any, **rest: Any) -> Any:
            done["steps"] += 1
            return plain(*arguments, **(rest | {"objective": poisoned}))

        loop.train_step = counted
        train(recipe)()

    return work


def test_nan_stops_with_exit_4_and_keeps_the_last_checkpoint(folder: Path) -> None:
    recipe = write_recipe(folder / "nan.toml", recipe_table(folder, "nan"))
    assert run_child(_poisoned(recipe, (13,)), folder / "nan.log") == 4
    assert "step 13" in tail(folder / "nan.log")
    assert sorted(p.name for p in (folder / "nan" / "checkpoints").iterdir()) == ["step-000005", "step-000010"]


def test_skipped_steps_are_counted_and_their_tokens_are_not_read_again(folder: Path) -> None:
    table = recipe_table(folder, "skip")
    table["train"] |= {"on_nonfinite": "skip", "max_skipped_steps": 3}
    recipe = write_recipe(folder / "skip.toml", table)
    assert run_child(_poisoned(recipe, (7, 8, 20)), folder / "skip.log") == 0, tail(folder / "skip.log")
    records = [r for r in read_lines(folder / "skip" / "metrics.jsonl") if "train/loss" in r]
    assert records[-1]["train/skipped_steps"] == 3 and records[-1]["train/tokens"] == 60 * 256
    assert [r["step"] for r in records if r["train/loss"] is None] == [7, 8, 20]


def test_too_many_skipped_steps_in_a_row_stop_the_run(folder: Path) -> None:
    table = recipe_table(folder, "skips")
    table["train"] |= {"on_nonfinite": "skip", "max_skipped_steps": 3}
    recipe = write_recipe(folder / "skips.toml", table)
    assert run_child(_poisoned(recipe, (7, 8, 9)), folder / "skips.log") == 4
    assert "3 skipped in a row" in tail(folder / "skips.log")


def test_a_second_process_on_the_same_run_is_refused(folder: Path) -> None:
    recipe = write_recipe(folder / "twice.toml", recipe_table(folder, "twice"))
    pid = in_child(train(recipe), folder / "twice-1.log")
    deadline = time.monotonic() + 60
    while not (folder / "twice" / "recipe.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert run_child(train(recipe), folder / "twice-2.log") == 3
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert str(pid) in (folder / "twice-2.log").read_text()


def test_text_changed_after_prepare_is_refused_before_training(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=60)
    table = recipe_table(tmp_path)
    table["train"]["steps"] = 5
    recipe = write_recipe(tmp_path / "recipe.toml", table)
    prepare(recipe)
    with (tmp_path / "notes.jsonl").open("a") as file:
        file.write('{"text": "one more line"}\n')
    assert run_child(train(recipe), tmp_path / "log") == 3
    assert "notes.jsonl" in tail(tmp_path / "log") and "cheaptrain prepare" in tail(tmp_path / "log")
    assert not (tmp_path / "run").exists()


def test_a_flipped_byte_in_a_shard_is_refused_before_training(tmp_path: Path) -> None:
    write_texts(tmp_path, documents=60)
    table = recipe_table(tmp_path)
    table["train"]["steps"] = 5
    recipe = write_recipe(tmp_path / "recipe.toml", table)
    prepare(recipe)
    shard = next((tmp_path / "data").glob("prose-*/train-00000.bin"))
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    assert run_child(train(recipe), tmp_path / "log") == 3
    assert shard.name in tail(tmp_path / "log")


@pytest.mark.parametrize("optimizer, compile", [("muon", "off"), ("adamw", "layers")])
@pytest.mark.slow
def test_other_optimizers_and_compiled_layers_learn_and_resume(folder: Path, optimizer: str, compile: str) -> None:
    losses = []
    for name in ("straight", "resumed"):
        table = recipe_table(folder, f"{optimizer}-{compile}-{name}")
        table["train"] |= {
            "optimizer": optimizer,
            "compile": compile,
            "steps": 10,
            "activation_checkpointing": compile == "off",
        }
        recipe = write_recipe(folder / f"{optimizer}-{name}.toml", table)
        log = folder / f"{optimizer}-{name}.log"
        assert run_child(train(recipe), log) == 0, tail(log)
        run = Path(table["run"]["dir"])
        if name == "resumed":
            (run / "final").unlink()
            (run / "checkpoints" / "step-000010").rename(run / "checkpoints" / ".away")
            assert run_child(train(recipe), log) == 0, tail(log)
        losses.append([r["train/loss"] for r in read_lines(run / "metrics.jsonl") if "train/loss" in r])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5


@pytest.mark.slow
def test_the_graphs_of_the_stages_before_are_counted_against_the_last_one(folder: Path) -> None:
    """torch gives a layer's code so many graphs in a process, whoever they were for."""
    recipes = []
    for number, width in enumerate((64, 96)):
        table = recipe_table(folder, f"wide-{width}")
        table["model"]["overrides"] = {"intermediate_size": width}
        table["train"] |= {"steps": 2, "warmup": "1 step", "compile": "layers"}
        recipes.append(write_recipe(folder / f"wide-{number}.toml", table))

    def work() -> None:
        from torch._dynamo import config

        from cheaptrain.model import compiled
        from cheaptrain.train import chain as stages

        stages.print_plan = lambda *_: None
        compiled.lower = torch._dynamo.lookup_backend("aot_eager")
        compiled.MOST_GRAPHS = config.recompile_limit = 1  # all rows here are packed
        train(*recipes)()

    assert run_child(work, folder / "wide.log") == 0, tail(folder / "wide.log")
