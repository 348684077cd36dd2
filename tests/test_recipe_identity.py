"""A resumed run is the same run: what may change and what may not."""

import json
from pathlib import Path

import pytest
from recipe_texts import MINIMAL, load_text, recipe

from cheaptrain.recipe.identity import identity, identity_difference, identity_hash


def test_how_an_amount_is_written_does_not_make_another_run(tmp_path: Path) -> None:
    one = recipe(tmp_path, "train.tokens=10B", "train.warmup=2000 steps", "data.sources.web.weight=70.0")
    other = recipe(tmp_path, "train.tokens=10_000_000_000", "train.warmup=2k steps", "data.sources.web.weight=70")
    assert identity_hash(one) == identity_hash(other)
    assert recipe(tmp_path, "train.warmup=0%").train.warmup == recipe(tmp_path).train.warmup


@pytest.mark.parametrize(
    "override",
    [
        "run.dir=elsewhere",
        "data.dir=/big/data",
        "train.micro_batch_size=4",
        "train.compile=off",
        "log.every=5 steps",
        "checkpoint.keep_last=9",
        "validation.tokens=5",
        'samples.prompts=["x"]',
        "plan.gpus=8",
        "parallel.tp=2",
        "parallel.dp_shard=4",
        "parallel.start_timeout=1h",
        "run.max_time=1h",
        "run.allow_batch_change=true",
        "checkpoint.asynchronous=false",
        "env.NCCL_IB_DISABLE=1",
    ],
)
def test_how_it_is_run_does_not_make_another_run(tmp_path: Path, override: str) -> None:
    assert identity_hash(recipe(tmp_path, override)) == identity_hash(recipe(tmp_path))
    assert identity_difference(identity(recipe(tmp_path)), identity(recipe(tmp_path, override))) == []


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("train.lr=6e-4", "train.lr: 0.0003 -> 0.0006"),
        ("seed=1", "seed: 1337 -> 1"),
        ("train.tokens=2M", "train.tokens: 1000000 -> 2000000"),
        ("train.warmup=1%", 'train.warmup: "0 steps" -> "1%"'),
        ("train.betas=[0.9, 0.99]", "train.betas: [0.9, 0.95] -> [0.9, 0.99]"),
        ("data.sources.wiki.weight=31", "data.sources.wiki.weight: 30.0 -> 31.0"),
        ("data.sources.wiki.revision=abc", 'data.sources.wiki.revision: not set -> "abc"'),
        ("model.overrides.x=1", "model.overrides.x: not set -> 1"),
        ("data.seq_len=128", "data.seq_len: 64 -> 128"),
        ("train.global_batch_tokens=2048", "train.global_batch_tokens: 1024 -> 2048"),
    ],
)
def test_what_it_is_makes_another_run_and_is_named(tmp_path: Path, override: str, line: str) -> None:
    old, new = recipe(tmp_path), recipe(tmp_path, override)
    assert identity_hash(old) != identity_hash(new)
    assert identity_difference(identity(old), identity(new)) == [line]


def test_an_identity_read_from_a_file_is_the_same(tmp_path: Path) -> None:
    now = identity(recipe(tmp_path))
    assert json.loads(json.dumps(now)) == now
    assert "dir" not in now["data"] and "run" not in now and "plan" not in now and "train" in now


def test_sources_are_compared_by_name_and_order_counts(tmp_path: Path) -> None:
    old = identity(recipe(tmp_path))
    fewer = identity(recipe(tmp_path, "data.sources.web=unset"))
    assert "data.sources.web.weight: 70.0 -> not set" in identity_difference(old, fewer)
    assert not any("wiki" in line for line in identity_difference(old, fewer))
    swapped = load_text(tmp_path, MINIMAL.replace('"web"', '"x"').replace('"wiki"', '"web"').replace('"x"', '"wiki"'))
    assert identity_difference(old, identity(swapped.recipe))
    turned = json.loads(json.dumps(old))
    turned["data"]["sources"].reverse()
    assert identity_difference(old, turned) == ["data.sources, in order: web, wiki -> wiki, web"]


def test_a_run_from_before_an_optional_key_existed_is_another_run(tmp_path: Path) -> None:
    now = identity(recipe(tmp_path))
    older = json.loads(json.dumps(now))
    source = older["data"]["sources"][0]
    for table, key in ((older["train"], "muon_lr"), (source, "column"), (older["model"], "config")):
        assert table.pop(key) is None
    assert identity_difference(older, now) == identity_difference(now, older) == []
    for table, key in ((older["train"], "neftune_alpha"), (older["train"], "betas"), (source, "format")):
        table.pop(key)
    assert identity_difference(older, now) == identity_difference(now, older) == []
    older["train"]["lr"] = 1.0
    assert identity_difference(older, now) == ["train.lr: 1.0 -> 0.0003"]
    noisy = identity(recipe(tmp_path, "train.neftune_alpha=5"))
    older["train"]["lr"] = now["train"]["lr"]
    assert identity_difference(older, noisy) == ["train.neftune_alpha: 0.0 -> 5.0"]
    assert identity_difference({}, {"data": {"sources": None}}) == []
    assert "data.seq_len: not set -> 64" in identity_difference({}, now)
