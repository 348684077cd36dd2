"""Adapters: only they train, what is saved has them merged and is the live model, and a run goes on bit for bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chat_helpers import numbered_chats, write_chats
from model_helpers import build, packed_logits, separate_logits, tokens
from small_runs import (
    final_state,
    final_weights,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    signal_at_step,
    tail,
    train,
    train_together,
    train_until,
    write_recipe,
    write_texts,
)

from cheaptrain.errors import RecipeError
from cheaptrain.model.config import model_config
from cheaptrain.model.facts import model_facts
from cheaptrain.model.lora import adapters, add_adapters
from cheaptrain.model.twin import plain_twin
from cheaptrain.recipe.layout import Layout
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.schema import Lora, Model, Train
from cheaptrain.report.measure import Setting, measure
from cheaptrain.report.memory import moments_held, peak_bytes
from cheaptrain.train.space import moment_bytes

TARGETS = {"tiny-qwen3": None, "tiny-llama": None, "tiny-gpt2": ["c_attn", "c_proj", "c_fc"]}


def lora(preset: str, **changes: Any) -> Lora:
    targets = {} if TARGETS[preset] is None else {"targets": TARGETS[preset]}
    return Lora.model_validate({"rank": 4, "alpha": 8.0} | targets | changes)


@pytest.mark.parametrize("preset", list(TARGETS))
def test_adapters_change_a_model_before_they_train_or_train_its_weights(preset: str) -> None:
    torch.set_num_threads(1)
    model, ids = build(preset).eval(), tokens()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = packed_logits(model, ids).detach()
    trained = add_adapters(model, lora(preset), seed=1)
    found = adapters(model)
    assert trained == sum(p.numel() for p in found.values()) > 0
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(found)
    assert torch.equal(packed_logits(model, ids), logits)
    optimizer = torch.optim.AdamW(found.values(), lr=0.1)
    packed_logits(model, ids).square().sum().backward()
    optimizer.step()
    live = packed_logits(model, ids).detach()
    assert (live - logits).abs().max() > 1e-2
    twin = plain_twin(model)
    assert {name: p.shape for name, p in twin.named_parameters()} == {name: p.shape for name, p in before.items()}
    with torch.no_grad():
        merged = separate_logits(twin, ids)
    assert (merged - live).abs().max() < 1e-4 * max(1.0, float(live.abs().max()))
    names = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if "lora_" not in name}
    assert all(torch.equal(names[name], before[name]) for name in before), "a frozen weight moved"
    assert any(not torch.equal(p, before[name]) for name, p in twin.named_parameters())


def test_first_adapters_depend_on_what_was_drawn_before() -> None:
    drawn = []
    for _ in range(2):
        torch.rand(3)
        model = build()
        add_adapters(model, lora("tiny-qwen3"), seed=5)
        drawn.append([p.clone() for p in adapters(model).values()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*drawn, strict=True))
    assert any(p.abs().max() > 0 for p in drawn[0])


def test_a_target_that_no_layer_has_is_passed_over() -> None:
    with pytest.raises(RecipeError, match=r"lora\.targets: c_attn is no linear layer of Qwen3.* there are .*q_proj"):
        add_adapters(build(), lora("tiny-qwen3", targets=["q_proj", "c_attn"]), seed=1)
    with pytest.raises(RecipeError, match="lm_head"):
        add_adapters(build(), lora("tiny-qwen3", targets=["lm_head"]), seed=1)


def test_the_plan_reckons_with_moments_of_weights_that_do_not_train() -> None:
    spec, train = Model(preset="tiny-qwen3"), Train.model_validate({"steps": 1, "global_batch_tokens": 64, "lr": 1.0})
    config = model_config(spec, vocab_size=512, seq_len=64)
    plain = Setting(Layout(), 64, 2, False, False, False, False, 64)
    found = [measure(config, setting) for setting in (plain, replace(plain, lora=lora("tiny-qwen3")))]
    facts = model_facts(spec, 512, 64, lora("tiny-qwen3"))
    assert found[1].held.trained == facts.adapters == sum(p.numel() for p in adapters(_adapted(spec)).values())
    saved = moments_held(found[0].held, train) - moments_held(found[1].held, train)
    assert saved == moment_bytes(replace(facts, adapters=0), train) - moment_bytes(facts, train) > 0
    assert peak_bytes(found[0], train) - peak_bytes(found[1], train) > saved


def _adapted(spec: Model) -> Any:
    model = build(spec, vocab_size=512, seq_len=64)
    add_adapters(model, lora("tiny-qwen3"), seed=1)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to start from."""
    path = tmp_path_factory.mktemp("lora")
    write_texts(path)
    table = recipe_table(path, "base")
    table["train"]["steps"] = 5
    recipe = write_recipe(path / "base.toml", table)
    prepare(recipe)
    assert run_child(train(recipe), path / "base.log") == 0, tail(path / "base.log")
    return path


def adapted(folder: Path, run: str, **lora_keys: Any) -> str:
    table = recipe_table(folder, run)
    table["model"] = {"init_from": str(folder / "base" / "final")}
    table["lora"] = {"rank": 4, "dropout": 0.1} | lora_keys
    table["train"] |= {"steps": 12, "lr": 1e-2}
    return write_recipe(folder / f"{run}.toml", table)


@pytest.mark.slow
def test_adapters_stopped_and_resumed_are_other_adapters(folder: Path) -> None:
    straight, broken = adapted(folder, "straight"), adapted(folder, "broken")
    assert run_child(train(straight), folder / "straight.log") == 0, tail(folder / "straight.log")

    assert run_child(train_until(broken, 7), folder / "broken.log") == 75, tail(folder / "broken.log")
    assert run_child(train(broken), folder / "broken.log") == 0, tail(folder / "broken.log")
    ours, theirs = final_weights(folder / "straight"), final_weights(folder / "broken")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    ours, theirs = final_state(folder / "straight"), final_state(folder / "broken")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any(name.startswith("adapter/") for name in ours)

    base, final = final_weights(folder / "base"), final_weights(folder / "straight")
    assert base.keys() == final.keys()
    changed = {name for name in base if not torch.equal(base[name], final[name])}
    assert changed == {name for name in base if "_proj" in name}
    losses = [
        record["train/loss"] for record in read_lines(folder / "straight" / "metrics.jsonl") if "train/loss" in record
    ]
    assert losses[-1] < losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("layout", [["parallel.dp_shard=2"], ["parallel.cp=2"]])
def test_adapters_on_more_processes_are_other_adapters(folder: Path, layout: list[str]) -> None:
    alone, name = adapted(folder, "alone", dropout=0.0), f"shared-{layout[0][9:11]}"
    shared = adapted(folder, name, dropout=0.0)
    assert run_child(train(alone), folder / "alone.log") == 0, tail(folder / "alone.log")
    log = folder / f"{name}.log"
    stopped = train_together(2, [shared, *layout], log, lambda rank: signal_at_step(7))
    assert stopped == {0: 75, 1: 75}, tail(log)
    assert train_together(2, [shared, *layout], log) == {0: 0, 1: 0}, tail(log)
    ours, theirs = final_weights(folder / "alone"), final_weights(folder / name)
    for weight, other in ours.items():
        assert (theirs[weight] - other).abs().max() < 1e-4, weight


def test_new_tokens_are_met_by_adapters_only_after_the_stage_before_is_trained(folder: Path) -> None:
    table = recipe_table(folder, "before")
    first = write_recipe(folder / "before.toml", table)
    write_chats(folder / "chats.jsonl", numbered_chats(40))
    table = recipe_table(folder, "after")
    table["model"] = {"init_from": str(folder / "before" / "final")}
    table["chat"], table["lora"] = {"template": "llama3", "max_dropped": 1.0, "max_cut": 1.0}, {"rank": 4}
    chats = {"name": "chats", "files": str(folder / "chats.jsonl"), "format": "chat", "weight": 1.0, "max_epochs": 99.0}
    table["data"] |= {
        "seq_len": 256,
        "sources": [chats, *({**source, "weight": 0} for source in table["data"]["sources"])],
    }
    table["train"] |= {"objective": "assistant_only", "global_batch_tokens": 512}
    second, log = write_recipe(folder / "after.toml", table), folder / "chain.log"
    prepare(second)
    assert run_child(train(first, second), log) == 3, tail(log)
    assert "[lora] trains no embedding" in tail(log).splitlines()[-1]
    assert not (folder / "before" / "metrics.jsonl").exists()


def test_adapters_go_on_from_another_model_or_another_rank(folder: Path) -> None:
    recipe = adapted(folder, "moved")

    assert run_child(train_until(recipe, 3), folder / "moved.log") == 75, tail(folder / "moved.log")
    adapted(folder, "moved", rank=8)
    assert run_child(train(recipe), folder / "moved.log") in (2, 3), tail(folder / "moved.log")
    assert "lora.rank" in tail(folder / "moved.log")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        (["train.optimizer=muon"], "adapters are trained with optimizer"),
        (["model.init_from=unset", "model.preset=tiny-qwen3"], "adapts a model that is there"),
    ],
)
def test_adapters_with_what_they_cannot_honour_are_accepted(folder: Path, changes: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        load_recipe(adapted(folder, "refused"), changes)
