"""Differences that are none, differences that are missed, questions and runs that do not belong together."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compared_runs import answers, make_run, recipe_of, score, task_result
from typer.testing import CliRunner

from cheaptrain.cli import app
from cheaptrain.compare.comparison import Report, compare, to_json, write
from cheaptrain.compare.tasks import BETTER, NO_ERROR, NOT_COMPARED, NOT_SHOWN, ONE_SIDE, SAME, WORSE, Comparison
from cheaptrain.errors import RecipeError
from cheaptrain.evaluate.results import Item, Metric, read_evaluation, write_evaluation, write_items
from cheaptrain.recipe.schema import Recipe


def found(report: Report, task: str, pair: int = 0) -> Comparison:
    rows = [*report.pairs[pair].tasks, *report.pairs[pair].held_out]
    return next(row for row in rows if row.task == task)


def two(folder: Path, first: Any, second: Any, **told: Any) -> Report:
    """Two runs with these scores of one task."""
    a, b = (
        make_run(folder / name, scores={"quiz": values}, **told)
        for name, values in (("before", first), ("after", second))
    )
    return compare([str(a), str(b)])


def test_a_run_against_itself_shows_nothing(tmp_path: Path) -> None:
    scores = {"quiz": answers(0.4, 1), "sums": answers(0.7, 2), "hard": [0.0] * 30}
    run = make_run(tmp_path / "run", scores=scores)
    shutil.copytree(run, tmp_path / "copy")
    report = compare([str(run), str(tmp_path / "copy")])
    rows = [*report.pairs[0].tasks, *report.pairs[0].held_out]
    assert [row.task for row in rows] == ["quiz", "sums", "hard", "held-out text"]
    assert all(row.second - row.first == 0.0 for row in rows if row.first is not None and row.second is not None)
    assert [row.estimate.difference for row in rows if row.estimate] == [0.0, 0.0, 0.0]
    assert [row.outcome for row in rows] == [SAME, SAME, SAME, NO_ERROR]
    assert report.differences == ()
    # The same answers of other weights: still nothing, and not "known exactly".
    evaluation = read_evaluation(tmp_path / "copy/eval/step-000040")
    write_evaluation(replace(evaluation, checkpoint=replace(evaluation.checkpoint, hash="another")))
    rows = list(compare([str(run), str(tmp_path / "copy")]).pairs[0].tasks)
    assert [(row.outcome, row.estimate and row.estimate.p) for row in rows] == [(NOT_SHOWN, 1.0)] * 3
    assert all(row.estimate and row.estimate.low < 0 < row.estimate.high for row in rows)


def test_a_trained_model_is_better_than_an_untrained_one_everywhere(tmp_path: Path) -> None:
    tasks = [f"task{number}" for number in range(8)]
    untrained = make_run(tmp_path / "untrained", scores={t: answers(0.25, i) for i, t in enumerate(tasks)})
    trained = make_run(tmp_path / "trained", scores={t: answers(0.9, 50 + i) for i, t in enumerate(tasks)})
    rows = compare([str(untrained), str(trained)]).pairs[0].tasks
    assert [row.outcome for row in rows] == [BETTER] * 8
    assert all(row.p_corrected is not None and row.p_corrected < 1e-9 for row in rows)
    rows = compare([str(trained), str(untrained)]).pairs[0].tasks
    assert [row.outcome for row in rows] == [WORSE] * 8


def test_questions_are_matched_by_content_not_by_place(tmp_path: Path) -> None:
    values = answers(0.5, 3)
    first = make_run(tmp_path / "first", scores={"quiz": values})
    second = make_run(tmp_path / "second")
    docs = [f"quiz-{number}" for number in reversed(range(200))]
    score(second, 40, {"quiz": list(reversed(values))}, docs=docs)
    row = found(compare([str(first), str(second)]), "quiz")
    assert row.n == 200
    assert row.estimate is not None and (row.estimate.difference, row.estimate.p) == (0.0, 1.0)


def test_questions_that_one_side_lacks_are_counted_and_named(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": [1.0, 1.0, 0.0, 0.0]})
    second = make_run(tmp_path / "second", scores={"quiz": [0.0, 1.0, 1.0]})
    row = found(compare([str(first), str(second)]), "quiz")
    assert row.n == 3
    assert row.estimate is not None and row.estimate.difference == 0.0
    assert row.notes == ("1 question of first left out, not on both sides: quiz-3",)


def test_a_question_that_stands_twice_is_two_questions(tmp_path: Path) -> None:
    docs = ["same", "same", "other"]
    runs = [make_run(tmp_path / name) for name in ("first", "second")]
    score(runs[0], 40, {"quiz": [1.0, 0.0, 0.0]}, docs=docs)
    score(runs[1], 40, {"quiz": [1.0, 1.0, 0.0]}, docs=docs)
    row = found(compare([str(run) for run in runs]), "quiz")
    assert row.n == 3
    assert row.estimate is not None and row.estimate.difference == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": "2.0"}, "version 1.0 against 2.0"),
        ({"harness": "lm-eval 0.5.0"}, "harness lm-eval 0.4.13 against lm-eval 0.5.0"),
        ({"settings": {"shots": 5, "limit": None}}, "shots 0 against 5"),
        ({"settings": {"shots": 0, "limit": 100}}, "limit none against 100"),
        ({"metrics": (Metric("acc_norm", 0.5),)}, "metric acc (none) against acc_norm (none)"),
    ],
)
def test_what_was_asked_differently_is_not_compared(tmp_path: Path, changed: dict[str, Any], why: str) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": answers(0.5, 1)})
    second = make_run(tmp_path / "second", scores={"quiz": answers(0.9, 2)}, **changed)
    row = found(compare([str(first), str(second)]), "quiz")
    assert row.outcome == NOT_COMPARED
    assert why in row.verdict
    assert row.estimate is None


def test_an_older_result_that_was_asked_alike_is_found(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": answers(0.25, 1)})
    second = make_run(tmp_path / "second", scores={"quiz": answers(0.9, 2)})
    folder = second / "eval/step-000040"
    evaluation = read_evaluation(folder)
    newer = task_result(folder, "quiz2", [1.0] * 10)
    newer = replace(newer, task="quiz", settings={"shots": 0, "limit": 10}, when="2026-12-01T00:00:00")
    write_evaluation(replace(evaluation, results=(*evaluation.results, newer)))
    assert found(compare([str(first), str(second)]), "quiz").n == 200


def test_batch_size_is_no_other_question_and_precision_is_told(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": answers(0.25, 1)})
    other = {"shots": 0, "limit": None, "batch_size": 1, "dtype": "bfloat16"}
    second = make_run(tmp_path / "second", scores={"quiz": answers(0.9, 2)}, settings=other)
    row = found(compare([str(first), str(second)]), "quiz")
    assert row.outcome == BETTER
    assert row.notes == ("scored in different precision: bfloat16, float32",)


def test_a_task_of_one_side_alone_is_said_to_be_missing(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": answers(0.5, 1), "sums": answers(0.5, 2)})
    second = make_run(tmp_path / "second", scores={"quiz": answers(0.5, 1)})
    row = found(compare([str(first), str(second)]), "sums")
    assert (row.outcome, row.verdict) == (ONE_SIDE, "not compared: second was not scored on it")


def test_without_any_evaluation_recipes_and_losses_are_compared(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "first"), make_run(tmp_path / "second", loss=2.5)]
    report = compare([str(run) for run in runs])
    assert report.pairs[0].tasks == ()
    assert any("no task was scored on both sides" in note for note in report.notes)
    assert found(report, "held-out text").verdict == "−0.500 nats a token; one run each: no interval"


def test_the_verdict_says_how_much_how_sure_and_of_how_many(tmp_path: Path) -> None:
    first, second = [1.0] * 50 + [0.0] * 150, [1.0] * 80 + [0.0] * 120
    row = found(two(tmp_path / "a", first, second), "quiz")
    assert row.verdict.startswith("after is better by 15.0 points (95 % 9.")
    assert row.verdict.endswith(", p < 0.0001, n = 200)")
    first, second = [1.0, 0.0] * 100, [1.0, 0.0] * 98 + [1.0] * 4
    row = found(two(tmp_path / "b", first, second), "quiz")
    assert row.verdict.startswith("no difference shown at n = 200: +1.0 points (95 % −")
    assert row.verdict.endswith(", p = 0.5); less than about ±2.0 does not show")


def test_one_of_twenty_tasks_does_not_pass_for_more_than_chance(tmp_path: Path) -> None:
    same = answers(0.5, 1)
    won = [1.0] * 14 + same[14:]
    tasks = {f"task{number}": same for number in range(20)}
    first = make_run(tmp_path / "first", scores=tasks)
    second = make_run(tmp_path / "second", scores=tasks | {"task3": won})
    row = found(compare([str(first), str(second)]), "task3")
    assert row.estimate is not None and row.estimate.p < 0.05
    assert row.outcome == BETTER
    assert row.p_corrected == pytest.approx(min(1.0, 20 * row.estimate.p))
    assert "not when corrected for the 20 tasks compared" in row.verdict


def test_seeds_are_grouped_by_how_they_are_named(tmp_path: Path) -> None:
    for condition, accuracy in (("plain", 0.3), ("taught", 0.6)):
        for seed in (1, 2, 3):
            run = tmp_path / f"{condition}-seed{seed}"
            make_run(run, seed=seed, scores={"quiz": answers(accuracy, 10 * seed)}, loss=3 - accuracy + seed / 100)
    listed = [str(tmp_path / f"{condition}-seed{seed}") for seed in (1, 2, 3) for condition in ("plain", "taught")]
    stems = [str(tmp_path / "plain"), str(tmp_path / "taught")]
    patterns = [str(tmp_path / "plain-*"), str(tmp_path / "taught-*")]
    named = [f"{name}={','.join(str(tmp_path / f'{name}-seed{s}') for s in (1, 2, 3))}" for name in ("plain", "taught")]
    for what in (listed, stems, patterns, named):
        report = compare(what)
        assert [side.seeds for side in report.sides] == [[1, 2, 3], [1, 2, 3]], what
        row = found(report, "quiz")
        assert row.outcome == BETTER and row.runs == (3, 3)
        assert row.estimate is not None and row.estimate.method == "paired seeds"
        assert "n = 200, 3 paired seeds" in row.verdict
        loss = found(report, "held-out text")
        assert loss.estimate is not None and loss.estimate.difference == pytest.approx(-0.3)
        assert loss.outcome == BETTER and loss.verdict.startswith("taught is better by 0.3")  # a loss: less is better
        assert report.differences == ()
    # Two seeds alone are compared with each other: as one side there would be nothing to compare.
    assert [side.name for side in compare(listed[::2][:2]).sides] == ["plain-seed1", "plain-seed2"]


def test_a_folder_of_runs_is_one_side(tmp_path: Path) -> None:
    for condition in ("plain", "taught"):
        for seed in (2, 10):
            make_run(tmp_path / condition / f"seed{seed}", seed=seed)
    report = compare([str(tmp_path / "plain"), str(tmp_path / "taught")])
    assert [(side.name, side.seeds) for side in report.sides] == [("plain", [2, 10]), ("taught", [2, 10])]


def test_runs_of_other_recipes_are_no_seeds_of_one(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", seed=1)
    other = make_run(tmp_path / "other", seed=2, recipe=recipe_of(tmp_path / "other", 2, lr=1e-3))
    third = make_run(tmp_path / "third", seed=1)
    with pytest.raises(RecipeError, match=r"not seeds of one recipe, they differ in train\.lr"):
        compare([f"mixed={first},{other}", str(third)])
    with pytest.raises(RecipeError, match="is named twice"):
        compare([f"twice={first},{first}", str(third)])


def test_seeds_that_are_not_the_same_are_not_paired(tmp_path: Path) -> None:
    for condition, seeds in (("plain", (1, 2)), ("taught", (2, 3, 4)), ("lone", (9,))):
        for seed in seeds:
            make_run(tmp_path / f"{condition}-seed{seed}", seed=seed, loss=3 + seed / 100)
    plain, taught, lone = (str(tmp_path / name) for name in ("plain", "taught", "lone"))
    row = found(compare([plain, taught]), "held-out text")
    assert row.estimate is not None and row.estimate.method == "seeds"
    assert "the seeds of the two sides are not the same, so they are not paired" in row.notes
    row = found(compare([taught, lone]), "held-out text")
    assert "one run on one side: its spread is taken to be that of the other" in row.notes
    make_run(tmp_path / "taught-seed1", seed=1, loss=3.01)
    row = found(compare([plain, taught]), "held-out text")
    assert row.estimate is not None and (row.estimate.method, row.estimate.difference) == ("paired seeds", 0.0)
    assert "seeds of one side alone, not in the interval: 3, 4" in row.notes


def test_a_seed_that_was_not_scored_is_left_out_and_named(tmp_path: Path) -> None:
    for condition in ("plain", "taught"):
        for seed in (1, 2, 3):
            scores = None if (condition, seed) == ("taught", 2) else {"quiz": answers(0.5, seed)}
            make_run(tmp_path / f"{condition}-seed{seed}", seed=seed, scores=scores)
    row = found(compare([str(tmp_path / "plain"), str(tmp_path / "taught")]), "quiz")
    assert row.runs == (3, 2)
    assert "taught: not scored on it, and left out: taught-seed2" in row.notes
    assert row.estimate is not None and row.estimate.df == 1


def test_a_seed_that_is_not_there_yet_is_not_averaged_with_those_that_are(tmp_path: Path) -> None:
    for condition in ("plain", "taught"):
        for seed in (1, 2, 3):
            run = make_run(tmp_path / f"{condition}-seed{seed}", seed=seed)
            late = (condition, seed) == ("taught", 3)
            score(run, 20 if late else 40, {"quiz": answers(0.5, seed)})
            if late:
                lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
                (run / "metrics.jsonl").write_text("".join(lines[:25]))
    report = compare([str(tmp_path / "plain"), str(tmp_path / "taught")])
    for task in ("quiz", "held-out text"):
        row = found(report, task)
        assert row.runs == (3, 2)
        assert "taught: not as far as the other seeds, and left out: taught-seed3" in row.notes
        assert row.estimate is not None and row.estimate.difference == 0.0
    assert "scored after different numbers of tokens: plain after 10,240; taught after 5,120, 10,240" in report.notes


def test_losses_of_other_tokenizers_are_compared_by_bytes(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", loss=3.0)
    second = make_run(tmp_path / "second", loss=3.6, tokenizer="b" * 64)
    report = compare([str(first), str(second)])
    row = found(report, "held-out text")
    assert (row.metric, row.unit) == ("bpb", "bits a byte")
    assert (row.first, row.second) == (pytest.approx(1.0), pytest.approx(1.2))
    assert any("tokenizers differ" in note for note in row.notes)
    from cheaptrain.compare.curves import pictures_of

    titles = [picture.title for picture in pictures_of(report.sides, report.logged, "tokens")]
    assert "Held-out text" in titles
    assert "Training loss" not in titles and "Held-out loss" not in titles


def test_a_group_is_compared_by_the_questions_of_its_tasks(tmp_path: Path) -> None:
    values = {"small": (answers(0.3, 1, 40), answers(0.9, 2, 40)), "large": (answers(0.3, 3), answers(0.35, 4))}
    runs = []
    for number, name in enumerate(("first", "second")):
        run = make_run(tmp_path / name)
        folder = score(run, 40, {task: both[number] for task, both in values.items()}, baseline=0.25)
        evaluation = read_evaluation(folder)
        means = [float(np.mean(both[number])) for both in values.values()]
        by_size = float(np.average(means, weights=[40, 200]))
        centred = float(np.mean([(mean - 0.25) / 0.75 for mean in means]))
        groups = (
            replace(evaluation.results[0], task=task, items=None, members=("small", "large"), metrics=metrics, n=240)
            for task, metrics in (("sized", (Metric("acc", by_size),)), ("core", (Metric("acc_centred", centred),)))
        )
        write_evaluation(replace(evaluation, results=(*evaluation.results, *groups)))
        runs.append(str(run))
    report = compare(runs)
    assert [(row.task, row.within) for row in report.pairs[0].tasks][:2] == [("small", "core"), ("large", "core")]
    for task in ("sized", "core"):
        row = found(report, task)
        assert row.n == 240
        assert row.estimate is not None and row.second is not None and row.first is not None
        assert row.estimate.difference == pytest.approx(row.second - row.first)
        assert row.outcome == BETTER


def test_a_score_that_is_no_mean_of_its_questions_gets_no_interval_of_them(tmp_path: Path) -> None:
    report = two(tmp_path, [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], metrics=(Metric("acc", 0.123),))
    row = found(report, "quiz")
    assert (row.outcome, row.n, row.estimate) == (NO_ERROR, 0, None)
    assert any("acc is no mean over its questions" in note for note in row.notes)


def test_bits_a_byte_are_compared_as_the_ratio_they_are(tmp_path: Path) -> None:
    rng, sizes = np.random.default_rng(5), [50, 400, 1000, 90, 30] * 8
    runs = []
    for name, worth in (("first", 0.8), ("second", 0.7)):
        run = make_run(tmp_path / name)
        logs = [-size * worth * float(rng.uniform(0.97, 1.03)) for size in sizes]
        folder = score(run, 40, {"books": [0.0] * len(sizes)})
        items = [
            Item(i, f"d{i}", {}, extra={"bits_per_byte": [log, size]})
            for i, (log, size) in enumerate(zip(logs, sizes, strict=True))
        ]
        write_items(folder / "books.items.jsonl", items)
        ratio = -sum(logs) / sum(sizes) / np.log(2)
        evaluation = read_evaluation(folder)
        result = replace(evaluation.results[0], metrics=(Metric("bits_per_byte", ratio, higher_is_better=False),))
        write_evaluation(replace(evaluation, results=(result,)))
        runs.append(str(run))
    row = found(compare(runs), "books")
    assert (row.outcome, row.n, row.unit) == (BETTER, 40, "bits per byte")
    assert row.estimate is not None and row.second is not None and row.first is not None
    assert row.estimate.difference == pytest.approx(row.second - row.first)
    assert row.estimate.high < 0


def test_what_is_only_there_to_be_read_gets_no_verdict(tmp_path: Path) -> None:
    row = found(two(tmp_path, answers(0.2, 1), answers(0.9, 2), shown=True), "quiz")
    assert (row.outcome, row.estimate) == (NOT_COMPARED, None)


def test_recipes_differ_by_what_they_mean(tmp_path: Path) -> None:
    def recipe(folder: Path, weights: tuple[float, float], **train: Any) -> Recipe:
        table = recipe_of(folder, 1, **train).model_dump(mode="json")
        base = table["data"]["sources"][0]
        names = [("web", weights[0]), ("books", weights[1])]
        table["data"]["sources"] = [base | {"name": name, "weight": weight} for name, weight in names]
        return Recipe.model_validate(table)

    def keys(*sides: Recipe) -> dict[str, tuple[str, ...]]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        runs = [str(make_run(tmp_path / name, recipe=side)) for name, side in zip("abc", sides, strict=False)]
        return {difference.key: difference.values for difference in compare(runs).differences}

    here = tmp_path / "x"
    assert keys(recipe(here, (60, 40)), recipe(here, (3, 2))) == {}
    assert keys(recipe(here, (60, 40)), recipe(here, (1, 1)))["data.sources.web.weight"] == ("60 %", "50 %")
    tokens = {"steps": None, "tokens": "10B"}
    assert keys(recipe(here, (1, 1), **tokens), recipe(here, (1, 1), steps=None, tokens=10_000_000_000)) == {}
    found = keys(recipe(here, (1, 1)), recipe(here, (1, 1), lr=1e-3), recipe(here, (1, 1), micro_batch_size=2))
    assert found == {"train.lr": ("0.0003", "0.001", "0.0003"), "train.micro_batch_size": ("1", "1", "2")}


def test_what_a_run_is_made_from_is_compared_by_its_bytes(tmp_path: Path) -> None:
    def run(name: str, path: str, weights: str) -> str:
        table = recipe_of(tmp_path / name, 1).model_dump(mode="json")
        table["model"] |= {"preset": None, "init_from": path}
        folder = make_run(tmp_path / name, recipe=Recipe.model_validate(table))
        kept = json.loads((folder / "recipe.json").read_text())
        kept["inputs"]["init_from"] = weights
        del kept["sha256"]
        from cheaptrain.checkpoint.verify import seal

        (folder / "recipe.json").write_text(json.dumps(seal(kept)))
        return str(folder)

    first, moved, other = (
        run("first", "a/final", "1" * 64),
        run("moved", "b/final", "1" * 64),
        run("other", "a/final", "2" * 64),
    )
    assert compare([first, moved]).differences == ()
    (difference,) = compare([first, other]).differences
    assert (difference.key, difference.values) == (
        "model.init_from",
        ("a/final, 111111111111", "a/final, 222222222222"),
    )


def test_secrets_of_the_environment_are_not_shown(tmp_path: Path) -> None:
    table = recipe_of(tmp_path / "second", 1).model_dump(mode="json") | {
        "env": {"WANDB_API_KEY": "hunter2", "LEVEL": "7"}
    }
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", recipe=Recipe.model_validate(table))
    text = json.dumps(to_json(compare([str(first), str(second)])))
    assert "env.LEVEL" in text and "env.WANDB_API_KEY" in text
    assert "hunter2" not in text


def test_damaged_runs_are_compared_as_far_as_they_can_be_read(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "first"), make_run(tmp_path / "second", loss=2.5)
    lines = (second / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = '{"step": 2, "train/lo\n'
    (second / "metrics.jsonl").write_text("".join(lines) + '{"step": 41, "train/loss": 2.')
    (second / "recipe.json").write_text("{")
    report = compare([str(first), str(second)])
    assert found(report, "held-out text").second == pytest.approx(2.5)
    assert any("1 broken line left out" in note for note in report.notes)
    assert any("the recipe of second is not compared" in note for note in report.notes)
    (second / "metrics.jsonl").unlink()
    (second / "recipe.json").unlink()
    report = compare([str(first), str(second)])
    assert report.pairs[0].held_out == ()
    assert any("nothing was logged" in note for note in report.notes)
    assert write(report, tmp_path / "out").is_file()


def test_damaged_evaluations_are_told_and_the_rest_stands(tmp_path: Path) -> None:
    first = make_run(tmp_path / "first", scores={"quiz": answers(0.5, 1)})
    second = make_run(tmp_path / "second", scores={"quiz": answers(0.5, 1)})
    (second / "eval/step-000040/eval.json").write_text("{")
    report = compare([str(first), str(second)])
    assert any("not an evaluation of this version" in note for note in report.notes)
    assert found(report, "quiz").outcome == ONE_SIDE


def test_a_checkpoint_is_compared_as_it_was_then(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scores={"quiz": answers(0.9, 1)})
    score(run, 20, {"quiz": answers(0.3, 2)})
    (run / "checkpoints/step-000020").mkdir(parents=True)
    for early in (run / "checkpoints/step-000020", run / "eval/step-000020"):
        report = compare([str(early), str(run)])
        assert [side.name for side in report.sides] == ["run/step-000020", "run"]
        assert found(report, "quiz").outcome == BETTER
        assert found(report, "held-out text").first == pytest.approx(3.5)
        assert report.logged[0][0].metrics.last("train/tokens") == 20 * 256


def test_results_of_a_checkpoint_that_is_of_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", scores={"quiz": answers(0.3, 1)})
    folder = score(tmp_path / "somewhere", 7, {"quiz": answers(0.9, 2)}).rename(tmp_path / "smollm-abc")
    report = compare([str(run), str(folder)])
    assert found(report, "quiz").outcome == BETTER
    assert report.pairs[0].held_out == () and report.differences == ()


@pytest.mark.parametrize("axis", ["tokens", "flops", "time"])
def test_curves_lie_where_the_axis_says(tmp_path: Path, axis: Any) -> None:
    runs = [make_run(tmp_path / f"{name}-seed{seed}", seed=seed) for name in ("a", "b") for seed in (1, 2)]
    from cheaptrain.compare.curves import pictures_of

    report = compare([str(run) for run in runs], axis)
    picture = next(p for p in pictures_of(report.sides, report.logged, axis) if p.title == "Held-out loss")
    end = {"tokens": 10_240, "flops": 10_240 * 6e6, "time": 10_240 / 512}[axis]
    assert [curve.thin for curve in picture.curves] == [True, True, False] * 2
    assert picture.curves[2].label == "a, mean of 2"
    assert picture.curves[2].x[-1] == pytest.approx(end)
    assert list(picture.curves[2].y) == pytest.approx([4.0, 3.75, 3.5, 3.25, 3.0])


def test_every_other_is_held_against_the_first(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, loss=loss) for name, loss in (("a", 3.0), ("b", 2.9), ("c", 3.2))]
    report = compare([str(run) for run in runs])
    assert [pair.second for pair in report.pairs] == ["b", "c"]
    assert [found(report, "held-out text", pair).verdict[:5] for pair in (0, 1)] == ["−0.10", "+0.20"]


def test_two_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / place / "run") for place in ("old", "new")]
    assert [side.name for side in compare([str(run) for run in runs]).sides] == ["old/run", "new/run"]
    for place in ("old", "new"):
        for seed in (1, 2):
            make_run(tmp_path / place / f"sft-seed{seed}", seed=seed)
    report = compare([str(tmp_path / "old/sft"), str(tmp_path / "new/sft")])
    assert [side.name for side in report.sides] == ["old/sft", "new/sft"]


def test_what_is_asked_wrongly_ends_with_exit_code_2_and_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for what, why in (
        ([str(run)], "compare takes two or more"),
        ([str(run), "nowhere"], "nowhere: there is no such run"),
        ([str(run), "no*where"], "no folder matches"),
        ([str(run), "empty"], "neither a run nor a checkpoint that was scored"),
        ([str(run), "x="], "no run is named"),
        ([str(run), str(run), "--axis", "steps"], "--axis steps: write one of tokens, flops, time"),
    ):
        with pytest.raises(RecipeError, match=why):
            CliRunner().invoke(app, ["compare", *what], catch_exceptions=False)


def test_json_goes_to_the_terminal_and_into_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = make_run(Path("first"), scores={"quiz": answers(0.25, 1)})
    second = make_run(Path("second"), scores={"quiz": answers(0.9, 2)})
    printed = CliRunner().invoke(app, ["compare", str(first), str(second), "--json"], catch_exceptions=False)
    content = json.loads(printed.stdout)
    (page,) = Path("outputs/compare").glob("first-vs-second-*/compare.html")
    assert json.loads((page.parent / "compare.json").read_text())["pairs"] == content["pairs"]
    assert content["pairs"][0]["tasks"][0]["estimate"]["difference"] == pytest.approx(0.65, abs=0.1)
    shown = CliRunner().invoke(app, ["compare", str(first), str(second), "--output", "here"], catch_exceptions=False)
    assert "second is better by" in " ".join(shown.stdout.split())
    assert Path("here/compare.html").is_file()
