"""Stages held against each other before the first step of the first one, and against what they were made from."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from small_runs import prepare, read_lines, recipe_table, run_child, tail, train, write_recipe, write_texts
from tiny_recipe import pipe
from typer.testing import CliRunner

from cheaptrain import launching
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import stated_fingerprint, verify_init_from
from cheaptrain.cli import app
from cheaptrain.errors import PreflightError, RecipeError
from cheaptrain.recipe.load import load_recipes
from cheaptrain.recipe.parents import in_order
from cheaptrain.train import beforehand
from cheaptrain.train.beforehand import refuse_disorder, refuse_later_failures
from cheaptrain.train.outcome import Outcome, print_outcomes
from cheaptrain.train.space import StageSpace, most_at_once
from cheaptrain.train.survey import survey_all

STEPS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chain")
    write_texts(path)
    prepare(_recipe(path, "prepared"))
    return path


def _recipe(
    folder: Path, name: str, change: Callable[[dict[str, Any]], None] = lambda table: None, **model: str
) -> str:
    table = recipe_table(folder, name)
    table["train"] |= {"steps": STEPS, "warmup": 0}
    table["checkpoint"] = {"every": "2 steps"}
    table["validation"] = {"every": "4 steps", "tokens": 64}
    if model:
        table["model"] = dict(model)
    change(table)
    return write_recipe(folder / f"{name}.toml", table)


def _after(folder: Path, name: str) -> str:
    return str(folder / name / "final")


def _refused(code: int, log: Path, *recipes: str) -> str:
    """What the chain says when it ends with `code`."""
    log.unlink(missing_ok=True)
    assert run_child(train(*recipes), log) == code, tail(log)
    return tail(log)


def test_a_typing_error_in_the_last_recipe_ends_the_chain_before_its_first_step(folder: Path) -> None:
    def typo(table: dict[str, Any]) -> None:
        table["train"]["learnig_rate"] = 1e-3

    first = _recipe(folder, "typo-1", lambda table: table["train"].update(lr=-1.0))
    second = _recipe(folder, "typo-2")
    third = _recipe(folder, "typo-3", typo, init_from=_after(folder, "typo-2"))
    text = _refused(2, folder / "typo.log", first, second, third)
    assert "typo-1.toml" in text and "train.lr" in text and "typo-3.toml" in text and "learnig_rate" in text
    text = _refused(2, folder / "typo.log", second, third)
    assert "learnig_rate" in text and not (folder / "typo-2").exists()


def test_missing_data_of_the_last_stage_and_numbers_of_the_second_are_told_together(folder: Path) -> None:
    def unprepared(table: dict[str, Any]) -> None:
        table["data"]["validation"] = 0.21

    def too_long(table: dict[str, Any]) -> None:
        table["train"]["steps"] = 100_000

    first = _recipe(folder, "data-1")
    second = _recipe(folder, "data-2", too_long, init_from=_after(folder, "data-1"))
    third = _recipe(folder, "data-3", unprepared, init_from=_after(folder, "data-1"))
    text = _refused(2, folder / "data.log", first, second, third)
    assert "data-2.toml" in text and "max_epochs" in text
    assert "data-3.toml: source 'prose' is not prepared" in text
    assert not (folder / "data-1").exists()


def test_stage_n_plus_1_refuses_another_tokenizer(folder: Path) -> None:
    def other(table: dict[str, Any]) -> None:
        table["tokenizer"]["train"]["sources"] = ["notes"]

    first = _recipe(folder, "tokens-1")
    second = _recipe(folder, "tokens-2", other, init_from=_after(folder, "tokens-1"))
    prepare(second)
    text = _refused(2, folder / "tokens.log", first, second)
    assert "tokens-1.toml" in text and "tokens-2.toml" in text and "another tokenizer" in text
    assert not (folder / "tokens-1").exists()


def test_longer_rows_than_an_earlier_stage_will_have_positions_for_are_refused(folder: Path) -> None:
    def longer(table: dict[str, Any]) -> None:
        table["data"]["seq_len"] = 128
        table["train"]["global_batch_tokens"] = 512

    first = _recipe(folder, "long-1", lambda table: table["model"].update(overrides={"max_position_embeddings": 64}))
    second = _recipe(folder, "long-2", longer, init_from=_after(folder, "long-1"))
    assert "64 positions" in _refused(2, folder / "long.log", first, second)
    assert not (folder / "long-1").exists()


def test_overrides_that_change_shapes_of_weights_yet_to_be_written_are_refused(folder: Path) -> None:
    def deeper(table: dict[str, Any]) -> None:
        table["model"]["overrides"] = {"num_hidden_layers": 3}

    first = _recipe(folder, "shape-1")
    second = _recipe(folder, "shape-2", deeper, init_from=_after(folder, "shape-1"))
    text = _refused(3, folder / "shape.log", first, second)
    assert "shape-2.toml: model.overrides: with num_hidden_layers the weights" in text
    assert not (folder / "shape-1").exists()


def test_a_tokenizer_that_an_earlier_stage_has_yet_to_write_is_told_from_a_wrong_path(folder: Path) -> None:
    first = _recipe(folder, "coming-1")
    second = _recipe(folder, "coming-2", lambda table: table.update(tokenizer={"path": _after(folder, "coming-1")}))
    with pytest.raises(RecipeError, match=f"yet to write, .* give it the .tokenizer. of {first}"):
        refuse_disorder(load_recipes([first, second]))


def _distils(folder: Path, teacher: str) -> Callable[[dict[str, Any]], None]:
    def change(table: dict[str, Any]) -> None:
        table["train"]["objective"] = "distill"
        table["distill"] = {"teacher": _after(folder, teacher)}

    return change


def test_a_teacher_may_come_from_an_earlier_stage_and_not_from_a_later_one(folder: Path) -> None:
    student = _recipe(folder, "student", _distils(folder, "teacher"))
    teacher = _recipe(folder, "teacher")
    surveys = survey_all(load_recipes([teacher, student]), 1)
    assert surveys[1].facts.parameters == surveys[0].facts.parameters
    with pytest.raises(RecipeError, match=f"distill.teacher: {student} learns from .* name {teacher} first"):
        refuse_disorder(load_recipes([student, teacher]))
    with pytest.raises((RecipeError, PreflightError), match=r"distill\.teacher"):
        survey_all(load_recipes([student]), 1)


@pytest.mark.slow
def test_a_finished_stage_is_not_skipped_once_its_ancestor_was_trained_anew(folder: Path) -> None:
    one, two = _recipe(folder, "old-1"), _recipe(folder, "old-2", init_from=_after(folder, "old-1"))
    log = folder / "old.log"
    assert run_child(train(one, two), log) == 0, tail(log)
    assert "done already" in _refused(0, log, one, two)
    shutil.move(folder / "old-1", folder / "old-away")
    text = _refused(3, log, one, two)
    assert f"{folder}/old-2 is stale" in text and "is gone, and" in text and "nothing is deleted" in text
    assert not (folder / "old-1").exists()  # found before the ancestor was trained for nothing
    assert run_child(train(one, "train.lr=1e-3"), log) == 0, tail(log)
    before = (folder / "old-2" / "recipe.json").read_bytes()
    text = _refused(3, log, one, two, "train.lr=1e-3")
    assert "holds other weights now" in text and (folder / "old-2" / "recipe.json").read_bytes() == before
    shutil.move(folder / "old-2", folder / "old-2-away")
    assert run_child(train(one, two, "train.lr=1e-3"), log) == 0, tail(log)


def test_a_changed_recipe_of_the_last_stage_is_refused_before_the_first_trains(folder: Path) -> None:
    two = _recipe(folder, "changed-2")
    assert run_child(train(two), folder / "changed.log") == 0
    two = _recipe(folder, "changed-2", lambda table: table["train"].update(lr=1e-4))
    text = _refused(3, folder / "changed.log", _recipe(folder, "changed-1"), two)
    assert "train.lr: 0.003 -> 0.0001" in text and not (folder / "changed-1").exists()


def test_each_checkpoint_says_what_its_stage_came_from(folder: Path) -> None:
    one, two = _recipe(folder, "line-1"), _recipe(folder, "line-2", init_from=_after(folder, "line-1"))
    assert run_child(train(one, two), folder / "line.log") == 0, tail(folder / "line.log")
    lineage = json.loads((folder / "line-2/final/manifest.json").read_text())["lineage"]
    origin = verify_init_from(folder / "line-1/final")
    assert lineage["inputs"]["init_from"] == origin.fingerprint == stated_fingerprint(folder / "line-1/final")
    assert set(lineage["inputs"]) == {"data", "init_from", "tokenizer"} and len(lineage["identity_sha256"]) == 64
    assert len(read_lines(folder / "line-2/metrics.jsonl")) > STEPS


def test_disk_is_reckoned_for_all_stages_together(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [_recipe(folder, "disk-1"), _recipe(folder, "disk-2", init_from=_after(folder, "disk-1"))]
    surveys = survey_all(load_recipes(paths), 1)
    each = beforehand.checkpoint_bytes(surveys[0].facts, surveys[0].loaded.recipe.train)

    class Usage(NamedTuple):
        free: int

    # Two saves a stage, both kept: two checkpoints of the first stage still lie there when the second has its two.
    monkeypatch.setattr(beforehand.shutil, "disk_usage", lambda path: Usage(4 * each))
    refuse_later_failures(surveys, print)
    monkeypatch.setattr(beforehand.shutil, "disk_usage", lambda path: Usage(4 * each - 1))
    with pytest.raises(PreflightError, match=r"disk-1: 2 of .*, disk-2: 2 of "):
        refuse_later_failures(surveys, print)
    for step in (2, 4):
        RunDirectory(folder / "disk-1").step(step).mkdir(parents=True)
    monkeypatch.setattr(beforehand.shutil, "disk_usage", lambda path: Usage(2 * each))
    refuse_later_failures(surveys, print)


def test_the_worst_moment_of_a_disk_counts_what_earlier_stages_leave_and_not_what_they_drop() -> None:
    first = StageSpace("first", each=10, at_once=4, left=1, there=0)
    second = StageSpace("second", each=3, at_once=5, left=2, there=1)
    assert most_at_once([first]) == (40, "first")
    assert most_at_once([first, second]) == (40, "first")
    assert most_at_once([first, first]) == (50, "first")
    assert most_at_once([second, first]) == (43, "first")
    assert most_at_once([]) == (0, "")


def _chats(folder: Path, template: str | None) -> Callable[[dict[str, Any]], None]:
    file = folder / "talk.jsonl"
    lines = [json.dumps({"prompt": f"river {number}?", "completion": f"stone {number}"}) for number in range(300)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")

    def change(table: dict[str, Any]) -> None:
        table["chat"] = {} if template is None else {"template": template}
        talk = {"name": "talk", "weight": 1, "format": "chat", "max_epochs": 99.0, "files": str(file)}
        table["data"]["sources"].append(talk)

    return change


def test_another_chat_template_than_the_weights_were_taught_is_refused_unless_it_is_named(folder: Path) -> None:
    plain = _recipe(folder, "chat-1", _chats(folder, "plain"))
    between = _recipe(folder, "chat-2", _chats(folder, "plain"), init_from=_after(folder, "chat-1"))
    silent = _recipe(folder, "chat-3", _chats(folder, None), init_from=_after(folder, "chat-2"))
    named = _recipe(folder, "chat-4", _chats(folder, "chatml"), init_from=_after(folder, "chat-2"))
    for path in (plain, silent):
        prepare(path)
    said: list[str] = []
    with pytest.raises(PreflightError, match=r"chat-3.toml: chat.template = 'chatml' writes .* by .*chat-2.toml"):
        refuse_later_failures(survey_all(load_recipes([plain, between, silent]), 1), said.append)
    assert not said
    refuse_later_failures(survey_all(load_recipes([plain, between, named]), 1), said.append)
    assert len(said) == 1 and "'chatml'" in said[0] and "'plain'" in said[0]


def _outcome(name: str, **more: Any) -> Outcome:
    validations = ({"val/loss": 3.0, "val/bpb": 1.5}, {"val/loss": 2.25, "val/bpb": 1.125})
    given = {"state": "trained", "tokens": 1000, "seconds": 65.0, "from_step": 0, "validations": validations}
    given |= {"agreements": (), "samples": (), "run": RunDirectory(Path(name)), "answers_only": False, "talks": False}
    given |= {"marks": (None, None)}
    return Outcome(name=name, **(given | more))


def test_the_last_table_shows_agreement_answers_and_the_command_to_talk() -> None:
    console, written = pipe()
    console.width = 160
    stages = [
        _outcome("phase"),
        _outcome("distilled", agreements=(0.25, 0.5, 0.625)),
        _outcome("general", answers_only=True, talks=True),
        _outcome("reasoning", answers_only=True, talks=True, state="done before"),
    ]
    print_outcomes(stages, console)
    lines = {line.split()[0]: line for line in written.getvalue().splitlines() if line.split()}
    assert "25% → 62%" in lines["distilled"] and "3.000 → 2.250" in lines["phase"] and "%" not in lines["phase"]
    assert "general*" in lines["general*"] and "done before" in lines["reasoning*"]
    assert "  cheaptrain chat reasoning/final --against general/final\n" in written.getvalue()
    console, written = pipe()
    print_outcomes(stages[:1], console)
    assert "teacher" not in written.getvalue() and "cheaptrain chat" not in written.getvalue()


def test_stages_are_put_after_all_that_they_are_made_from(folder: Path) -> None:
    last = _recipe(folder, "order-a", _distils(folder, "order-c"), init_from=_after(folder, "order-d"))
    middle = _recipe(folder, "order-d", init_from=str(folder / "order-b/checkpoints/step-000002"))
    teacher, first = _recipe(folder, "order-c"), _recipe(folder, "order-b")
    alone = _recipe(folder, "order-0")
    paths = [str(loaded.path) for loaded in in_order(load_recipes([last, alone, middle, teacher, first]))]
    assert set(paths[:3]) == {first, middle, teacher} and paths.index(first) < paths.index(middle)
    assert paths[3:] == [last, alone]
    round_1 = _recipe(folder, "round-1", init_from=_after(folder, "round-2"))
    round_2 = _recipe(folder, "round-2", init_from=_after(folder, "round-1"))
    circle = load_recipes([round_1, round_2])
    assert {str(loaded.path) for loaded in in_order(circle)} == {round_1, round_2}
    with pytest.raises(RecipeError, match="has yet to write"):
        refuse_disorder(in_order(circle))


def test_chain_prepares_first_when_asked_and_starts_nothing_in_a_dry_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(launching, "launch", lambda paths, *_, **options: done.append(options | {"paths": paths}) or 7)
    monkeypatch.setattr("cheaptrain.data.prepare.prepare_recipe", lambda *given, **_: done.append("prepared"))
    recipe = _recipe(folder, "dry")
    after = _recipe(folder, "after", init_from=_after(folder, "dry"))
    assert CliRunner().invoke(app, ["chain", after, recipe, "--prepare", "--processes", "3"]).exit_code == 7
    assert done[:2] == ["prepared", "prepared"] and done[2]["processes"] == 3 and not done[2]["dry_run"]
    assert done[2]["paths"] == [recipe, after]
    done.clear()
    result = CliRunner().invoke(app, ["chain", recipe, "--prepare", "--dry-run"])
    assert [options["dry_run"] for options in done] == [True] and f"cheaptrain prepare {recipe}" in result.output
