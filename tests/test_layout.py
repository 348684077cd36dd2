"""Any layout of processes: what is started is what the recipe says, and only data-parallel groups divide the rows."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from recipe_texts import MINIMAL, line_of, load_text

from cheaptrain.errors import RecipeError
from cheaptrain.recipe.batch import resolve_batch
from cheaptrain.recipe.identity import identity
from cheaptrain.recipe.layout import Layout, planned_processes, resolve_layout
from cheaptrain.recipe.load import load_recipe
from cheaptrain.recipe.resolve import resolve
from cheaptrain.recipe.schema import Parallel, Recipe

SMALL = st.integers(1, 6)


def build(parallel: dict[str, Any] | None = None, seq_len: int = 64, rows: int = 48, micro: int = 1) -> Recipe:
    return Recipe.model_validate(
        {
            "run": {"dir": "x"},
            "tokenizer": {"path": "gpt2"},
            "model": {"preset": "tiny"},
            "data": {"seq_len": seq_len, "sources": [{"name": "web", "weight": 1.0, "files": "web"}]},
            "train": {"steps": 10, "lr": 1.0, "global_batch_tokens": rows * seq_len, "micro_batch_size": micro},
            "parallel": parallel or {},
        }
    )


@settings(deadline=None)
@given(replicate=SMALL, shard=SMALL, cp=SMALL, tp=SMALL)
def test_auto_shards_over_what_the_others_leave(replicate: int, shard: int, cp: int, tp: int) -> None:
    world = replicate * shard * cp * tp
    given_all = Parallel(dp_replicate=replicate, dp_shard=shard, cp=cp, tp=tp)
    auto = Parallel(dp_replicate=replicate, cp=cp, tp=tp)
    assert resolve_layout(auto, world) == resolve_layout(given_all, world) == Layout(replicate, shard, cp, tp)
    assert Layout(replicate, shard, cp, tp).data_parallel == replicate * shard
    assert Layout(replicate, shard, cp, tp).world_size == world


@settings(deadline=None)
@given(replicate=SMALL, shard=st.none() | SMALL, cp=SMALL, tp=SMALL, world=st.integers(1, 300))
def test_fewer_processes_than_asked_train_as_something_else(
    replicate: int, shard: int | None, cp: int, tp: int, world: int
) -> None:
    asked = Parallel(dp_replicate=replicate, dp_shard=shard or "auto", cp=cp, tp=tp)
    fixed = replicate * cp * tp
    right = world % fixed == 0 if shard is None else world == fixed * shard
    if right:
        assert resolve_layout(asked, world).world_size == world
        return
    with pytest.raises(RecipeError) as caught:
        resolve_layout(asked, world)
    said = re.search(r"start ([\d,]+)(?: or ([\d,]+))? ", str(caught.value))
    assert said
    for proposed in filter(None, said.groups()):
        assert resolve_layout(asked, int(proposed.replace(",", ""))).tp == tp
    if 'dp_shard = "auto"' in str(caught.value):
        assert resolve_layout(asked.model_copy(update={"dp_shard": "auto"}), world).world_size == world


def test_the_refusal_says_where_the_layout_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = MINIMAL + "\n[parallel]\ntp = 4\n"
    loaded = load_text(Path(), text)
    with pytest.raises(RecipeError) as caught:
        resolve(loaded.recipe, 6, provenance=loaded.provenance)
    assert str(caught.value) == (
        f"[parallel] tp = 4 (recipe.toml:{line_of(text, 'tp = 4')}) takes a multiple of 4 processes, not 6: start 4 "
        "or 8 (`cheaptrain launch --processes`; `cheaptrain plan` goes by plan.gpus)"
    )
    with pytest.raises(RecipeError) as caught:
        resolve_layout(Parallel(dp_shard=1), 2)
    assert str(caught.value).endswith('start 1 (`cheaptrain launch --processes`; `cheaptrain plan` goes by plan.gpus), '
                                      'or set parallel.dp_shard = "auto"')  # fmt: skip


@settings(deadline=None)
@given(replicate=SMALL, shard=SMALL, cp=SMALL, tp=SMALL, micro=SMALL, accumulation=SMALL)
def test_processes_that_share_rows_read_them_as_different_ones(
    replicate: int, shard: int, cp: int, tp: int, micro: int, accumulation: int
) -> None:
    groups = replicate * shard
    asked = build({"dp_replicate": replicate, "dp_shard": shard, "cp": cp, "tp": tp},
                  seq_len=cp * tp * 8, rows=groups * micro * accumulation, micro=micro)  # fmt: skip
    resolved = resolve(asked, groups * cp * tp)
    assert resolved.accumulation == accumulation, "rows are shared out over groups, not over processes"
    assert resolved.layout == Layout(replicate, shard, cp, tp)
    assert (resolved.world_size, resolved.rows_per_step) == (groups * cp * tp, groups * micro * accumulation)


@settings(deadline=None)
@given(
    rows=st.integers(1, 200), replicate=SMALL, shard=SMALL, each=st.sampled_from([1, 2, 4]), micro=SMALL,
    auto=st.booleans(),
)  # fmt: skip
def test_what_a_refusal_proposes_is_accepted(
    rows: int, replicate: int, shard: int, each: int, micro: int, auto: bool
) -> None:
    groups = replicate * shard
    assume(rows % (groups * micro))
    parallel = {"dp_replicate": replicate, "dp_shard": "auto" if auto else shard, "tp": each}
    with pytest.raises(RecipeError) as caught:
        resolve_batch(build(parallel, rows=rows, micro=micro), groups * each)
    checked = 0
    for line in str(caught.value).split("\n")[1:]:
        where, _, proposal = line.partition(":")
        if 'dp_shard = "auto"' in proposal:
            assert not auto
            proposal = proposal.partition(" with ")[0]
        for number in numbers_in(proposal):
            checked += 1
            free = parallel | {"dp_shard": "auto"}
            if "both" in where:
                accepted = resolve_batch(build(parallel, rows=number // 64, micro=micro), groups * each)
                assert accepted.tokens_per_step == number
            elif "another" in where:
                assert resolve_batch(build(free, rows=rows, micro=1), number).layout.tp == each
            elif "processes" in proposal:
                assert resolve_batch(build(free, rows=rows, micro=micro), number).layout.tp == each
            else:
                assert resolve_batch(build(parallel, rows=rows, micro=number), groups * each).micro_batch_size == number
    assert checked, "there is always a remedy"


def numbers_in(text: str) -> list[int]:
    """The numbers of `1, 2, 16 or 1,024`."""
    return [int(number) for number in re.findall(r"\d+", re.sub(r"(?<=\d),(?=\d)", "", text))]


def test_the_refusal_speaks_of_groups_where_processes_share_rows() -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_batch(build({"tp": 2, "dp_replicate": 2}, micro=4), 20)
    assert str(caught.value).split("\n") == [
        "train.micro_batch_size: 48 rows a step (global_batch_tokens 3,072 / seq_len 64) do not divide over 10 groups"
        " of 2 processes (dp_replicate=2, dp_shard=5, tp=2) x micro_batch_size 4 = 40. What would:",
        "  with 20 processes: no micro_batch_size",
        "  with micro_batch_size 4: 4, 8, 12 or 24 processes",
        "  with another micro_batch_size: 4, 8, 12, 16, 24, 32, 48 or 96 processes",
        "  with both as they are: global_batch_tokens 2,560 or 5,120",
    ]
    with pytest.raises(RecipeError) as caught:
        resolve_batch(build({"dp_shard": 5}, micro=4), 5)
    assert '  with micro_batch_size 4: 1, 2, 3, 4, 6 or 12 processes with parallel.dp_shard = "auto"' in str(
        caught.value
    )


@pytest.mark.parametrize(
    ("seq_len", "cp", "tp", "said"),
    [
        (100, 1, 8, "rows of 100 tokens do not divide over cp 1 x tp 8 = 8 processes, .* are 96 or 104"),
        (96, 8, 8, "cp 8 x tp 8 = 64 processes, which share each row; the nearest lengths are 64 or 128"),
        (10, 16, 1, "nearest lengths are 16$"),
    ],
)  # fmt: skip
def test_a_row_that_its_processes_cannot_share_is_refused(seq_len: int, cp: int, tp: int, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        resolve(build({"cp": cp, "tp": tp}, seq_len=seq_len), cp * tp)
    assert resolve(build({"cp": cp, "tp": tp}, seq_len=cp * tp * 8), cp * tp).world_size == cp * tp


def test_a_layout_makes_another_run() -> None:
    assert identity(build({"tp": 2, "step_timeout": "5min"})) == identity(build())


@pytest.mark.parametrize(
    ("keys", "processes"),
    [
        ((), 1),
        (("parallel.tp=2",), 2),
        (("parallel.tp=2", "parallel.dp_shard=3", "parallel.cp=5", "parallel.dp_replicate=7"), 210),
        (("parallel.tp=2", "plan.gpus=8"), 8),
    ],
)
def test_a_recipe_with_tp_cannot_be_planned_without_saying_how_many(
    tmp_path: Path, keys: tuple[str, ...], processes: int
) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(MINIMAL, encoding="utf-8")
    recipe = load_recipe(str(path), keys).recipe
    assert planned_processes(recipe) == processes
    assert resolve_layout(recipe.parallel, processes).world_size == processes
