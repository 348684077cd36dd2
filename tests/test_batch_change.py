"""Another batch in the middle of a run: asked for, recorded, and neither length, rate nor rows jump."""

import json
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from recipe_texts import MINIMAL, line_of, load_text
from small_runs import (
    in_child,
    prepare,
    read_lines,
    recipe_table,
    run_child,
    tail,
    train_with_spy,
    write_recipe,
    write_texts,
)

from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.identity import BATCH, identity, identity_difference, identity_hash
from cheaptrain.recipe.length import Done, Stretch
from cheaptrain.recipe.resolve import ModelFacts, Resolved, SourceFacts, resolve
from cheaptrain.recipe.schema import Recipe
from cheaptrain.train.counts import StepCounts
from cheaptrain.train.ledger import Ledger
from cheaptrain.train.schedule import learning_rate
from cheaptrain.train.step import StepResult

ROW = 64
MODEL = ModelFacts(10_000, 4_000, {"embedding": 4_000, "layers": 6_000}, 65_000.0)


def build(rows: int, *, allow: bool = True, checkpoint: dict[str, Any] | None = None, **train: Any) -> Recipe:
    length = {} if {"tokens", "steps", "epochs", "flops", "tokens_per_parameter"} & set(train) else {"steps": 100}
    return Recipe.model_validate(
        {
            "run": {"dir": "x", "allow_batch_change": allow},
            "tokenizer": {"path": "gpt2"},
            "model": {"preset": "tiny"},
            "data": {"seq_len": ROW, "sources": [{"name": "web", "weight": 1.0, "files": "web", "max_epochs": 1.0}]},
            "train": {"lr": 1.0, "global_batch_tokens": rows * ROW, **length, **train},
            "checkpoint": checkpoint or {},
        }
    )


def trained(ledger: Ledger, recipe: Recipe, steps: int, world: int = 1, **facts: Any) -> Resolved:
    """Go on with `ledger` for so many steps, as the loop does; what was resolved for it."""
    resolved = resolve(recipe, world, done=ledger.done(), **facts)
    ledger.begin(resolved)
    rows = resolved.rows_per_step
    counts = StepCounts(rows, rows * ROW, rows, rows, (rows,))
    for _ in range(steps):
        ledger.add(counts, ["web"], StepResult(1.0, 0.5, 1.0, 1.0, counts, True, False), 1.0)
    return resolved


def test_a_batch_changes_by_itself() -> None:
    ledger = Ledger()
    trained(ledger, build(8), 10)
    with pytest.raises(PreflightError) as caught:
        resolve(build(16, allow=False), 1, done=ledger.done())
    assert str(caught.value) == (
        "train.global_batch_tokens: 1,024 tokens a step, and the run did its 10 steps so far with 512 in the end. To go"
        " on from here with another batch, add run.allow_batch_change=true to the command line; to go on as before, add"
        " train.global_batch_tokens=512"
    )
    trained(ledger, build(16), 5)
    assert resolve(build(16, allow=False), 1, done=ledger.done()).rows_per_step == 16, "it is the run's own batch now"
    with pytest.raises(PreflightError, match=r"512 tokens a step, .* 15 steps so far with 1,024"):
        resolve(build(8, allow=False), 1, done=ledger.done())
    assert resolve(build(8, allow=False), 1).rows_per_step == 8, "a run that has nothing behind it may have any"


def test_the_refusal_names_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = load_text(Path(), MINIMAL)
    done = Done(1, 512, 8, (Stretch(0, 0, 512),))
    with pytest.raises(PreflightError, match=f"recipe.toml:{line_of(MINIMAL, 'global_batch')}"):
        resolve(loaded.recipe, 1, provenance=loaded.provenance, done=done)


@pytest.mark.parametrize(
    ("length", "steps", "tokens"),
    [
        # 10 steps of 8 rows of 64 tokens are 5,120 tokens; then 16 rows a step.
        ({"steps": 100}, 100, 5_120 + 90 * 1024),
        ({"tokens": 512 * 100}, 10 + 45, 512 * 100),
        ({"tokens": 512 * 100 + 511}, 10 + 45, 512 * 100),
        ({"tokens": 512 * 100 + 512}, 10 + 46, 512 * 100 + 1024),
        ({"tokens_per_parameter": 5.12}, 10 + 45, 51_200),
        ({"flops": 65_000 * 51_200}, 10 + 45, 51_200),
        ({"epochs": 1}, 10 + 45, 512 * 100),
    ],
)
def test_the_run_ends_elsewhere_than_asked(length: dict[str, Any], steps: int, tokens: int) -> None:
    facts = {"model": MODEL, "sources": {"web": SourceFacts(ROW * 815 + 1, 9, 9, 9, 9)}}
    if "steps" in length:
        del facts["sources"]
    ledger = Ledger()
    trained(ledger, build(8, **length), 10, **facts)
    changed = resolve(build(16, **length), 1, done=ledger.done(), **facts)
    assert (changed.steps, changed.tokens, changed.rows) == (steps, tokens, tokens // ROW)
    assert changed.tokens_per_parameter == tokens / 10_000
    assert sum(share.rows for share in changed.shares) == changed.rows


@settings(deadline=None)
@given(
    tokens=st.integers(50_000, 10**6),
    batches=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 30)), min_size=1, max_size=6),
)
def test_where_a_run_ends_depends_on_where_it_was_stopped(tokens: int, batches: list[tuple[int, int]]) -> None:
    ledger, ends = Ledger(), []
    for rows, steps in batches:
        recipe = build(rows, tokens=tokens)
        done = ledger.done()
        if done and tokens - done.tokens < rows * ROW:  # too near to the end for this batch
            return
        resolved = resolve(recipe, 1, done=done)
        assert abs(resolved.tokens - tokens) * 2 <= rows * ROW, "the nearest number of steps"
        assert resolved.tokens == ledger.tokens_seen + (resolved.steps - ledger.step) * rows * ROW
        trained(ledger, recipe, min(steps, resolved.steps - ledger.step - 1))
        again = resolve(recipe, 1, done=ledger.done())
        assert (again.steps, again.tokens, again.rows) == (resolved.steps, resolved.tokens, resolved.rows)
        if steps:
            ends.append(rows)
        assert Ledger.from_json(ledger.to_json()) == ledger
    history = [entry.global_batch_tokens // ROW for entry in ledger.batches]
    assert all(one != other for one, other in pairwise(history)), "an entry says something new"


def test_a_finished_run_starts_again_with_a_smaller_batch() -> None:
    ledger = Ledger()
    recipe = build(16, tokens=1024 * 10 + 400)
    trained(ledger, recipe, 10)
    assert resolve(recipe, 1, done=ledger.done()).steps == 10
    # 400 tokens are left, which is more than half a step of 8 rows; but the run has reached its end.
    after = resolve(build(8, tokens=1024 * 10 + 400), 1, done=ledger.done())
    assert (after.steps, after.tokens) == (10, 10_240)
    with pytest.raises(PreflightError, match="allow_batch_change"):
        resolve(build(8, tokens=1024 * 10 + 400, allow=False), 1, done=ledger.done())


def test_a_run_ends_in_the_middle_because_the_new_batch_is_too_big() -> None:
    ledger = Ledger()
    trained(ledger, build(1, tokens=ROW * 100), 90)
    with pytest.raises(RecipeError) as caught:
        resolve(build(21, tokens=ROW * 100), 1, done=ledger.done())
    assert str(caught.value) == (
        "train.tokens: after step 90 640 tokens are left, which is no step of 1,344 (train.global_batch_tokens):"
        " go on with a smaller batch"
    )
    assert resolve(build(20, tokens=ROW * 100), 1, done=ledger.done()).steps == 91


def rates(resolved: Resolved, recipe: Recipe, first_step: int, tokens: int) -> list[float]:
    factor = learning_rate(recipe.train, resolved)
    return [factor(tokens + k * resolved.tokens_per_step) for k in range(resolved.steps - first_step)]


SCHEDULES = [
    {"schedule": "linear", "warmup": "0 steps", "final_lr_ratio": 0.1},
    {"schedule": "linear", "warmup": "40 steps"},
    {"schedule": "cosine", "warmup": "10%"},
    {"schedule": "cosine", "warmup": "5000 tokens"},
    {"schedule": "wsd", "warmup": "60 steps", "decay": "100 steps"},
    {"schedule": "wsd", "warmup": "3%", "decay": "40%"},
    {"schedule": "constant", "warmup": "30 steps"},
]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("length", [{"steps": 200}, {"tokens": 512 * 200}, {"tokens": 512 * 200 + 300}], ids=str)
@pytest.mark.parametrize("change", [5, 30, 100, 150])
def test_the_rate_jumps_where_the_batch_changes(schedule: dict[str, Any], length: dict[str, Any], change: int) -> None:
    for rows in (1, 4, 8, 24):
        compare_rates(schedule, length, rows, change)


def compare_rates(schedule: dict[str, Any], length: dict[str, Any], rows: int, change: int) -> None:
    before, after = build(8, **length, **schedule), build(rows, **length, **schedule)
    ledger = Ledger()
    old = trained(ledger, before, change)
    new = resolve(after, 1, done=ledger.done())
    seen = ledger.tokens_seen
    # The same place on the curve, whatever comes after.
    assert new.curve.place(seen) == old.curve.place(seen) == old.tokens_per_step * change
    assert new.curve.place(new.tokens) == new.curve.length == old.curve.length == old.tokens
    assert (new.curve.warmup, new.curve.decay) == (old.curve.warmup, old.curve.decay)
    curve = [*rates(old, before, 0, 0)[:change], *rates(new, after, change, seen)]
    assert len(curve) == new.steps
    # No step is further from the one before than the steepest stretch of the old curve allows for its length.
    steepest = max(abs(a - b) for a, b in pairwise(rates(old, before, 0, 0)))
    longest = max(float(new.curve.place(seen + new.tokens_per_step) - seen) / old.tokens_per_step, 1.0)
    assert max(abs(a - b) for a, b in pairwise(curve)) <= steepest * longest * 1.0001
    if "steps" in length:
        assert curve == pytest.approx(rates(old, before, 0, 0)), "counted in steps, it is the curve of the first plan"
    whole = rates(new, after, 0, 0)
    assert min(whole) >= 0 and max(whole) <= 1


def test_a_warm_up_in_steps_begins_again_after_the_change() -> None:
    ledger = Ledger()
    trained(ledger, build(8, tokens=512 * 1000, warmup="300 steps"), 400)
    changed = build(32, tokens=512 * 1000, warmup="300 steps")
    resolved = resolve(changed, 1, done=ledger.done())
    assert resolved.warmup_tokens == 300 * 512, "what it was, not 300 steps of the new batch"
    assert resolved.decay_tokens == 700 * 512
    assert learning_rate(changed.train, resolved)(ledger.tokens_seen) == pytest.approx(1 - 100 / 700)


def test_stretches_of_the_plan_are_not_those_of_the_run() -> None:
    ledger = Ledger()
    recipe = build(8, steps=100, schedule="wsd", warmup="20 steps", decay="30 steps")
    trained(ledger, recipe, 10)
    resolved = resolve(build(16, steps=100, schedule="wsd", warmup="20 steps", decay="30 steps"), 1, done=ledger.done())
    # 10 steps of warm-up were done with 512 tokens, 10 are to come with 1,024; so are the 30 of decay.
    assert resolved.warmup_tokens == 10 * 512 + 10 * 1024
    assert resolved.decay_tokens == 30 * 1024
    assert resolved.tokens == 10 * 512 + 90 * 1024


def test_intervals_are_those_of_the_old_batch() -> None:
    ledger = Ledger()
    keys = {"checkpoint": {"every": "10%", "keep_every": "20%"}}
    first = trained(ledger, build(8, tokens=512 * 100, **keys), 50)
    assert (first.save_every, first.keep_every, first.validate_every) == (10, 20, 10)
    second = resolve(build(16, tokens=512 * 100, **keys), 1, done=ledger.done())
    assert (second.steps, second.save_every, second.keep_every, second.validate_every) == (75, 5, 10, 5)


def test_a_checkpoint_kept_for_good_is_deleted_after_the_batch_changed() -> None:
    keys = {"checkpoint": {"every": "5%", "keep_every": "10%"}}
    ledger = Ledger()
    first = trained(ledger, build(8, tokens=512 * 100, **keys), 50)
    assert [step for step in range(1, 51) if first.keeps(step)] == [10, 20, 30, 40, 50]
    smaller = resolve(build(4, tokens=512 * 100, **keys), 1, done=ledger.done())
    assert (smaller.steps, smaller.keep_every) == (150, 20)
    assert [s for s in range(1, 151) if smaller.keeps(s)] == [10, 20, 30, 40, 50, 60, 80, 100, 120, 140]
    assert not any(resolve(build(4), 1).keeps(step) for step in range(100)), "kept only where it is asked"


def test_epochs_are_reckoned_with_the_new_batch_from_the_first_step() -> None:
    # 100 steps of 8 rows fit the 900 rows; 90 steps of 8 and 10 of 16 do; 100 of 16 would not.
    sources = {"web": SourceFacts(ROW * 900 + 1, 9, 9, 9, 9)}
    ledger = Ledger()
    trained(ledger, build(8, steps=100), 90, sources=sources)
    resolved = resolve(build(16, steps=100), 1, sources, done=ledger.done())
    assert resolved.rows == 90 * 8 + 10 * 16
    assert resolved.shares[0].epochs == 880 / 900
    fewer = {"web": SourceFacts(ROW * 870 + 1, 9, 9, 9, 9)}
    with pytest.raises(RecipeError, match=r"data\.sources\.web: 56,320 tokens asked"):
        resolve(build(16, steps=100), 1, fewer, done=ledger.done())


def test_another_layout_is_recorded_and_changes_no_number() -> None:
    recipe = build(24, tokens=24 * ROW * 100)
    ledger = Ledger()
    first = trained(ledger, recipe, 10)
    others = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"tp": 2})}
    )  # fmt: skip
    second = trained(ledger, others, 10, world=8)
    assert [vars(entry) for entry in ledger.batches] == [
        {"step": 0, "tokens": 0, "global_batch_tokens": 1536, "processes": 1, "layout": "1 process"},
        {"step": 10, "tokens": 15_360, "global_batch_tokens": 1536, "processes": 8, "layout": "dp_shard=4, tp=2"},
    ]
    assert (first.steps, first.tokens, first.curve) == (second.steps, second.tokens, second.curve)
    assert ledger.done() == Done(20, 30_720, 480, (Stretch(0, 0, 1536),))


def test_a_changed_batch_is_another_run() -> None:
    one, other = build(8), build(16)
    assert identity_hash(one) != identity_hash(other)
    assert identity_hash(one, without=BATCH) == identity_hash(other, without=BATCH)
    assert identity(one, without=BATCH) == identity(other, without=BATCH)
    assert "global_batch_tokens" not in identity(one, without=BATCH)["train"]
    assert identity_difference(identity(one), identity(other)) == ["train.global_batch_tokens: 512 -> 1024"]
    assert identity_difference(identity(one), identity(other), without=BATCH) == []
    changed = build(16, weight_decay=0.5)
    assert identity_difference(identity(one), identity(changed), without=BATCH) == ["train.weight_decay: 0.1 -> 0.5"]
    with pytest.raises(KeyError):
        identity(one, without=("train.no_such_key",))


def test_a_history_that_does_not_begin_at_the_start_is_believed() -> None:
    for stretches in ((), (Stretch(5, 5, 5),)):
        with pytest.raises(ValueError, match="begin at step 0"):
            Done(5, 5, 5, stretches)


@pytest.mark.slow
def test_a_run_that_changes_its_batch_reads_other_rows_or_loses_its_history(tmp_path: Path) -> None:
    write_texts(tmp_path)
    table = recipe_table(tmp_path)
    table["train"] |= {"tokens": 256 * 60, "warmup": "20 steps"}
    del table["train"]["steps"]
    path = write_recipe(tmp_path / "run.toml", table)
    prepare(path)
    log, spy, run = tmp_path / "log", tmp_path / "spy", tmp_path / "run"
    straight = [f"run.dir={tmp_path / 'straight'}"]
    assert run_child(train_with_spy([path], tmp_path / "straight.spy", tuple(straight)), log) == 0, tail(log)

    first = in_child(train_with_spy([path], spy), log)
    while len(read_lines(spy) if spy.exists() else []) < 12:
        time.sleep(0.005)
    os.kill(first, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 75, tail(log)
    before = len(read_lines(spy))
    assert 12 <= before < 60, "stopped in the middle"

    other = "train.global_batch_tokens=512"
    assert run_child(train_with_spy([path], spy, (other,)), log) == 3
    assert "run.allow_batch_change=true" in tail(log)
    assert len(read_lines(spy)) == before, "nothing was trained with the other batch"
    assert run_child(train_with_spy([path], spy, (other, "run.allow_batch_change=true")), log) == 0, tail(log)
    assert run_child(train_with_spy([path], spy, (other,)), log) == 0, "finished with it, it is the run's own"
    assert run_child(train_with_spy([path], spy), log) == 3, "going back asks again"

    rows = [row for record in read_lines(spy) for row in record["rows"]]
    expected = [row for record in read_lines(tmp_path / "straight.spy") for row in record["rows"]]
    assert rows == (expected if before % 2 == 0 else [*expected, *rows[240:]]), "row for row the run that never changed"
    steps = before + (60 - before + 1) // 2
    assert len(read_lines(spy)) == steps
    ledger = json.loads((run / "final" / "state" / "trainer.json").read_text())["ledger"]
    assert (ledger["step"], ledger["tokens_seen"]) == (steps, len(rows) * 64)
    assert [(entry["step"], entry["tokens"], entry["global_batch_tokens"]) for entry in ledger["batches"]] == [
        (0, 0, 256),
        (before, before * 256, 512),
    ]
    rates = [record["train/learning_rate"] for record in read_lines(run / "metrics.jsonl") if "train/loss" in record]
    assert len(rates) == steps
    # Warm-up is over 20 x 256 tokens; then a straight line to 0 at the end, two old steps at a time.
    places = [*range(before), *range(before, 60, 2)]
    plain = [(step + 1) / 20 if step < 20 else 1 - (step - 20) / 40 for step in places]
    for step, (rate, wanted) in enumerate(zip(rates, plain, strict=True)):
        if step < before:
            assert rate == pytest.approx(3e-3 * wanted)
        elif places[step] >= 20:
            assert rate == pytest.approx(3e-3 * wanted, abs=3e-3 / 40)
