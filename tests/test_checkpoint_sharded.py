"""Checkpoints of several processes: any layout reads what any other wrote, and what fails on one fails on all."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoints import names
from model_helpers import build
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from sharded_saves import digest, laid_out, raised
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from cheaptrain.checkpoint import blocks, state_files, tensor_files, weights
from cheaptrain.checkpoint.load import load_weights, saved_tensors
from cheaptrain.checkpoint.rundir import open_run_together
from cheaptrain.checkpoint.shared import check_shared
from cheaptrain.checkpoint.verify import verify_checkpoint
from cheaptrain.parallel.processes import join
from cheaptrain.recipe.layout import Layout

torch.set_num_threads(1)

ONE = Layout()
CHAIN = [
    ONE,
    Layout(dp_shard=2),
    Layout(dp_shard=4),
    Layout(dp_shard=3),  # no dimension divides: blocks of unequal size
    Layout(dp_shard=2, tp=2),  # FSDP over TP: strided shards
    Layout(dp_shard=3, tp=2),  # both
    Layout(dp_replicate=2, dp_shard=2),
    Layout(dp_replicate=2),
    Layout(dp_shard=2, cp=2),
    Layout(dp_replicate=2, dp_shard=2, tp=2),
    ONE,
]


def _go_on(rank: int, size: int, layout: Layout, path: str, step: int, optimizer: str, fresh: bool) -> Any:
    trained = laid_out(layout, optimizer, seed=step)  # other weights than those that are loaded
    if fresh:
        trained.step()
        trained.step()
    else:
        assert trained.load_newest(path)["step"] == step - 1
    trained.save(path, step)
    return trained.hashes()


@pytest.mark.parametrize(("optimizer", "chain"), [("adamw", CHAIN), ("muon", [*CHAIN[2:7:2], ONE])])
def test_weights_and_moments_go_from_any_layout_to_any_other_bit_for_bit(
    tmp_path: Path, optimizer: str, chain: list[Layout]
) -> None:
    expected = None
    for step, layout in enumerate(chain, 1):
        for hashes in run_ranks(_go_on, layout.world_size, layout, str(tmp_path), step, optimizer, step == 1):
            expected = expected or hashes
            assert hashes == expected, f"{layout} after {chain[step - 2]}"
        folder = tmp_path / "checkpoints" / f"step-{step:06d}"
        assert verify_checkpoint(folder) == []
        assert json.loads((folder / "manifest.json").read_text())["processes"] == layout.world_size
        written = load_file(folder / "model.safetensors")
        assert {name: digest(tensor) for name, tensor in written.items()} == {n: expected[n] for n in written}
    assert expected is not None and sum(name.startswith("optimizer/") for name in expected) > 40


def test_training_on_in_another_layout_is_the_training_that_never_stopped(tmp_path: Path) -> None:
    (straight,) = run_ranks(_steps_after, 1, ONE, str(tmp_path), True)
    for layout in (Layout(dp_shard=3), Layout(dp_shard=2, tp=2)):
        assert all(
            hashes == straight for hashes in run_ranks(_steps_after, layout.world_size, layout, str(tmp_path), False)
        )


def _steps_after(rank: int, size: int, layout: Layout, path: str, first: bool) -> dict[str, str]:
    trained = laid_out(layout)
    if first:
        trained.step()
        trained.save(path, 1)
    else:
        trained.load_newest(path)
    trained.step()
    return trained.hashes()


def _save_in_pieces(rank: int, size: int, layout: Layout, path: str) -> dict[str, str]:
    weights._BYTES_PER_FILE, state_files._BYTES_PER_FILE, blocks._SMALL_BYTES = 60_000, 20_000, 1_000
    trained = laid_out(layout)
    trained.step()
    trained.save(path, 1)
    return trained.hashes()


@pytest.mark.parametrize("layout", [Layout(dp_shard=3), Layout(dp_replicate=2, dp_shard=2), Layout(dp_shard=2, tp=2)])
def test_a_model_in_several_files_loads_as_any_other_and_nobody_writes_all(tmp_path: Path, layout: Layout) -> None:
    expected = run_ranks(_save_in_pieces, layout.world_size, layout, str(tmp_path))[0]
    folder = tmp_path / "checkpoints" / "step-000001"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert len(files) > 2 and all(f"of-{len(files):05d}" in name for name in files)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert {n: digest(p) for n, p in model.named_parameters()} == {n: expected[n] for n in index["weight_map"]}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    by_process = {
        rank: sum(file.stat().st_size for file in (folder / "state").glob(f"process-{rank:05d}-*"))
        for rank in range(layout.world_size)
    }
    moments = 2 * index["metadata"]["total_size"]
    assert all(0 < written < 0.6 * moments for written in by_process.values())
    assert moments < sum(by_process.values()) < 1.2 * moments  # and nothing twice
    assert run_ranks(_go_on, 2, Layout(dp_shard=2), str(tmp_path), 2, "adamw", False)[0] == expected


def _disk_full(rank: int, size: int, path: str, who: int, where: str) -> list[Any]:
    trained = laid_out(Layout(dp_shard=2))
    weights._BYTES_PER_FILE = 60_000  # so that both processes write some
    trained.step()
    trained.save(path, 100)
    before = trained.hashes()

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    module, _, name = where.rpartition(".")
    target: Any = {"os": os, "TensorFile": tensor_files.TensorFile, "TensorReader": tensor_files.TensorReader}[module]
    plain = getattr(target, name)
    if rank == who:
        setattr(target, name, refuse)
    told = raised(lambda: trained.save(path, 200))
    setattr(target, name, plain)
    trained.processes.wait_for_all()
    left = names(Path(path) / "checkpoints")
    trained.processes.wait_for_all()
    trained.step()
    trained.save(path, 300)  # training went on
    return [told, left, before != trained.hashes()]


@pytest.mark.parametrize("who", [0, 1])
@pytest.mark.parametrize(
    "where",
    ["TensorFile.__init__", "TensorFile.write", "TensorFile.close", "os.write", "os.fsync", "TensorReader._read"],
)
def test_a_full_disk_of_one_process_costs_all_of_them_one_checkpoint(tmp_path: Path, who: int, where: str) -> None:
    for told, left, moved in run_ranks(_disk_full, 2, str(tmp_path), who, where):
        assert told.startswith("SaveFailed: checkpoint step-000200 (step 200) not saved"), told
        assert f"process {who}: [Errno 28]" in told or "[Errno 28] No space left on device" in told
        assert "intact" in told
        assert left == {"step-000100"} and moved
    assert names(tmp_path / "checkpoints") == {"step-000100", "step-000300"}
    assert verify_checkpoint(tmp_path / "checkpoints" / "step-000300") == []


def _too_little_space(rank: int, size: int, path: str) -> str:
    trained = laid_out(Layout(dp_shard=2))
    estimate = 10**15 if rank == 0 else 1  # what the main process finds counts
    return raised(lambda: trained.save(path, 1, estimated_bytes=estimate))


def test_too_little_space_is_agreed_before_anything_is_written(tmp_path: Path) -> None:
    for told in run_ranks(_too_little_space, 2, str(tmp_path)):
        assert told.startswith("SaveFailed: checkpoint not saved") and "it takes about 1,000,000" in told
    assert names(tmp_path / "checkpoints") == set()


def _bug(rank: int, size: int, path: str, who: int) -> str:
    trained = laid_out(Layout(dp_shard=2))
    trained.step()
    if rank == who:
        tensor_files.TensorFile.write = lambda *_: {}["lm_head"]  # type: ignore[assignment,index,method-assign]
    return raised(lambda: trained.save(path, 1))


@pytest.mark.parametrize("who", [0, 1])
def test_a_bug_on_one_process_is_an_error_on_all_and_no_full_disk(tmp_path: Path, who: int) -> None:
    told = run_ranks(_bug, 2, str(tmp_path), who)
    assert told[who] == "KeyError: 'lm_head'"
    assert told[1 - who] == f"CheaptrainError: process {who}: KeyError: 'lm_head'"
    assert names(tmp_path / "checkpoints") == set()


def _wrong(rank: int, size: int, path: str, layout: Layout, how: str) -> str:
    trained = laid_out(layout)
    parts: dict[str, Any] = {}
    if how == "copies":
        if rank == size - 1:
            parameter = trained.model.get_parameter("model.norm.weight")
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            with torch.no_grad():
                local[-1] += 1e-6
    elif how == "proof":
        parts["prove"] = lambda folder: {"max_abs_difference": float("nan")}
    elif how == "swapped" and rank == 0:
        # Blocks that are exchanged on the way, and compared with themselves: only the logits know.
        plain = weights._collect

        def swapped(name: str, pieces: Any, mine: Any, processes: Any) -> Any:
            whole = plain(name, pieces, mine, processes)
            return whole.roll(whole.shape[0] // 2, 0) if "q_proj" in name else whole

        weights._collect = swapped
    if how == "swapped":
        tensor_files.TensorReader.holds = lambda *_: True  # type: ignore[method-assign]
    return raised(lambda: trained.save(path, 1, **parts))


@pytest.mark.parametrize(
    ("layout", "how", "said"),
    [
        (Layout(dp_replicate=2), "copies", "model.norm.weight was not written as it is in the live model"),
        (Layout(dp_replicate=2, dp_shard=2), "copies", "model.norm.weight was not written"),
        (Layout(dp_shard=2), "proof", "is not finite"),
        (Layout(dp_shard=2), "swapped", "logits from the files differ"),
    ],
)
def test_what_is_not_the_live_model_stops_every_process(tmp_path: Path, layout: Layout, how: str, said: str) -> None:
    for told in run_ranks(_wrong, layout.world_size, str(tmp_path), layout, how):
        assert told.startswith("ProofFailed: ") and said in told
    assert names(tmp_path / "checkpoints") == set()


def _proven(rank: int, size: int, path: str, layout: Layout, preset: str, dtype: torch.dtype) -> None:
    trained = laid_out(layout, preset=preset, dtype=dtype)
    trained.step()
    trained.save(path, 1)


@pytest.mark.parametrize(
    ("preset", "layout", "dtype", "at_most"),
    [
        ("tiny-llama", Layout(dp_shard=2), torch.float32, 1e-5),
        ("tiny-llama4", Layout(dp_shard=2), torch.float32, 1e-5),
        ("tiny-llama4", Layout(tp=2), torch.float32, 1e-5),
        ("tiny-gpt2", Layout(dp_shard=2), torch.float32, 1e-5),
        ("tiny-qwen3", Layout(dp_shard=2, tp=2), torch.bfloat16, 5e-2),
        ("tiny-llama", Layout(dp_shard=2), torch.bfloat16, 5e-2),
    ],
)
def test_the_files_give_the_live_logits_whatever_the_class_and_precision(
    tmp_path: Path, preset: str, layout: Layout, dtype: torch.dtype, at_most: float
) -> None:
    run_ranks(_proven, layout.world_size, str(tmp_path), layout, preset, dtype)
    folder = tmp_path / "checkpoints" / "step-000001"
    proof = json.loads((folder / "manifest.json").read_text())["proof"]
    assert proof["tokens"] == 32 and proof["max_abs_difference"] <= at_most
    if dtype == torch.bfloat16:
        assert proof["max_abs_difference"] > 1e-4  # it was bf16 that was compared


def _after_validation(rank: int, size: int, path: str) -> list[Any]:
    trained = laid_out(Layout(dp_shard=2))
    expected = trained.hashes()
    with torch.no_grad():  # gathers the outer weights and leaves them so
        trained.root(lambda model: model.get_input_embeddings()(torch.tensor([[1]])))
    # Vectors are always whole.
    whole = [name for name, p in trained.model.named_parameters() if p.dim() > 1 and not isinstance(p, DTensor)]
    kinds = {type(tensor.detach()) for tensor in saved_tensors(trained.model).values() if tensor.dim() > 1}
    return [len(whole) > 0, kinds, trained.hashes() == expected]


def test_weights_left_gathered_by_a_forward_pass_are_saved_as_shards() -> None:
    for gathered, kinds, same in run_ranks(_after_validation, 2, ""):
        assert gathered, "nothing was left gathered: the test does not test"
        assert kinds == {DTensor} and same


def _load_foreign(rank: int, size: int, layout: Layout, folder: str, preset: str) -> Any:
    trained = laid_out(layout, preset=preset, seed=9)
    try:
        left = load_weights(trained.model, Path(folder), trained.processes)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return left, {name: digest(tensor) for name, tensor in saved_tensors(trained.model).items()}


@pytest.mark.parametrize("layout", [ONE, Layout(dp_shard=3), Layout(dp_shard=2, tp=2)])
def test_a_transformers_folder_is_read_into_any_layout(tmp_path: Path, layout: Layout) -> None:
    there = build("tiny-llama", seed=4)
    halves = {name: p.detach().bfloat16() for name, p in there.named_parameters()}
    extra = {"lm_head.weight": halves["model.embed_tokens.weight"].clone(), "vision.weight": torch.zeros(2)}
    save_file(halves | extra, tmp_path / "model.safetensors")
    expected = {name: digest(tensor.float()) for name, tensor in halves.items()}
    for left, hashes in run_ranks(_load_foreign, layout.world_size, layout, str(tmp_path), "tiny-llama"):
        assert hashes == expected and left == ["vision.weight"]


def test_a_folder_saved_from_the_decoder_alone_is_read_by_its_own_names(tmp_path: Path) -> None:
    there = build("tiny-gpt2", seed=4)
    save_file(
        {n.removeprefix("transformer."): p.detach().contiguous() for n, p in there.named_parameters()},
        tmp_path / "model.safetensors",
    )
    expected = {name: digest(tensor) for name, tensor in saved_tensors(there).items()}
    for left, hashes in run_ranks(_load_foreign, 2, Layout(dp_shard=2), str(tmp_path), "tiny-gpt2"):
        assert hashes == expected and left == []


@pytest.mark.parametrize("damage", ["missing", "shape", "cut"])
def test_weights_that_do_not_fit_are_refused_by_name_on_every_process(tmp_path: Path, damage: str) -> None:
    there = {name: p.detach().clone() for name, p in build("tiny-llama").named_parameters()}
    if damage == "missing":
        del there["model.layers.1.mlp.up_proj.weight"]
    elif damage == "shape":
        there["model.layers.1.mlp.up_proj.weight"] = there["model.layers.1.mlp.up_proj.weight"][:-1].clone()
    file = tmp_path / "model.safetensors"
    save_file(there, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
    for told in run_ranks(_load_foreign, 2, Layout(dp_shard=2), str(tmp_path), "tiny-llama"):
        assert told.startswith("PreflightError: ")
        assert str(tmp_path) in told if damage == "cut" else "model.layers.1.mlp.up_proj.weight" in told


def _moved_in(rank: int, size: int, path: str) -> str:
    trained = laid_out(Layout(dp_shard=2))
    trained.step()
    trained.save(path, 1)
    fresh = laid_out(Layout(dp_shard=2), optimizer="muon", seed=5)
    before = fresh.hashes()
    told = raised(lambda: fresh.load_newest(path))
    assert len(fresh.state()[0]) == 0 and fresh.hashes().keys() == before.keys()
    return told


def test_moments_of_another_optimizer_are_refused_by_name(tmp_path: Path) -> None:
    for told in run_ranks(_moved_in, 2, str(tmp_path)):
        assert told.startswith("PreflightError: the optimizer state does not fit this model")
        assert "saved of AdamW" in told and "here Muon" in told


def _shared(rank: int, size: int, path: str, same: bool) -> str:
    processes = join(60)
    here = Path(path) / ("same" if same or rank != 1 else "elsewhere")
    here.mkdir(exist_ok=True)
    os.chdir(here)
    Path("run").mkdir(exist_ok=True)
    return raised(lambda: check_shared(Path("run"), processes))


def test_nodes_that_see_different_folders_are_refused_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cheaptrain.checkpoint.shared._PATIENCE_SECONDS", 0.3)
    for told in run_ranks(_shared, 3, str(tmp_path), False):
        assert told.startswith("PreflightError: run.dir run: process 1 of 3 do not see the folder")
    assert run_ranks(_shared, 3, str(tmp_path), True) == ["nothing"] * 3
    assert names(tmp_path / "same" / "run") == set() == names(tmp_path / "elsewhere" / "run")


def _open(rank: int, size: int, path: str) -> list[Any]:
    processes = join(60)

    def given(seed: int) -> dict[str, Any]:
        identity = {"recipe": {}, "provenance": {}, "identity": {"seed": seed}, "inputs": {}}
        return identity | {"steps": lambda checkpoint: 9, "report": lambda message: None}

    with open_run_together(Path(path), processes, **given(1)) as opened:
        seen = [opened.decision, opened.lock is not None, opened.recipe["identity"]]
        again = raised(lambda: open_run_together(Path(path), processes, **given(1)))
    changed = raised(lambda: open_run_together(Path(path), processes, **given(2)))
    with open_run_together(Path(path), processes, **given(1)):  # the lock was given back
        return [*seen, again, changed]


def test_a_run_is_opened_by_one_process_for_all(tmp_path: Path) -> None:
    for rank, (decision, locked, identity, again, changed) in enumerate(run_ranks(_open, 2, str(tmp_path / "run"))):
        assert (decision, locked, identity) == ("fresh", rank == 0, {"seed": 1})
        assert again.startswith("PreflightError: ") and "already training this run" in again
        assert changed.startswith("PreflightError: ") and "seed: 1 -> 2" in changed
