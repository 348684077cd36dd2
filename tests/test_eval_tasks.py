"""A task that is missing, malformed or another one is found late, or not at all."""

import gzip
import os
import random
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from task_folders import CHOICE, GROUP, write_rows, write_tasks

from cheaptrain.errors import RecipeError
from cheaptrain.evaluate import suite as suites
from cheaptrain.evaluate.suite import Suite, load_suite, random_state_kept, seed_all
from cheaptrain.evaluate.task_files import read_task_folder
from cheaptrain.recipe.schema import Eval

BENCH = Path(__file__).parents[2] / "shared" / "data" / "bench"


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection is made, although everything is on this machine")

    monkeypatch.setattr(socket.socket, "connect", refused)


@pytest.fixture
def few_defaults(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """lm-eval's own tasks are none: listing them takes seconds. Returns whether they were to be listed, call by
    call."""
    plain, asked = suites.TaskManager, list[bool]()

    def manager(**options: Any) -> Any:
        asked.append(options["include_defaults"])
        return plain(**{**options, "include_defaults": False})

    monkeypatch.setattr(suites, "TaskManager", manager)
    return asked


def _load(folder: Path, *names: str, **settings: Any) -> Suite:
    return load_suite(Eval(task_folder=str(folder), **settings), names)


def test_a_folder_works_from_where_its_author_stood_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = write_tasks(tmp_path / "here")
    found = _load(tasks, "nature", "rivers")
    assert [found.tasks[name].questions for name in ("stones", "pebbles", "rivers")] == [12, 7, 5]
    assert list(found.groups) == ["nature"] and len(found.tasks) == 3

    # Data somewhere else: named, or the current folder; nothing is written into the folder of the tasks.
    (tmp_path / "here" / "data").rename(tmp_path / "data")
    with pytest.raises(RecipeError, match=r"stones\.yaml: data file data/examples\.jsonl is not in .*data_folder"):
        _load(tasks, "stones")
    assert _load(tasks, "stones", data_folder=str(tmp_path)).tasks["stones"].questions == 12
    monkeypatch.chdir(tmp_path)
    assert _load(tasks, "stones").tasks["stones"].questions == 12
    assert sorted(os.listdir(tasks)) == ["nature.yaml", "pebbles.yaml", "rivers.yaml", "springs.yaml", "stones.yaml"]


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("bad.yaml", "task: bad\nmetric_list:\n- metric: [acc\n", r"bad\.yaml:4: is not YAML"),
        ("bad.yaml", "- a\n- b\n", r"bad\.yaml: holds no table"),
        ("bad.yaml", "doc_to_text: x\n", r"bad\.yaml: names no task"),
        ("bad.yaml", "task: bad\ninclude: other.yaml\n", r"other\.yaml \(included by .*bad\.yaml\): cannot be read"),
        ("bad.yaml", "task: bad\ninclude: bad.yaml\n", r"includes itself"),
        ("sub/again.yaml", CHOICE, r"again\.yaml: the task 'stones' is there already, in .*stones\.yaml|"
                                   r"stones\.yaml: the task 'stones' is there already, in .*again\.yaml"),
        ("bad.yaml", CHOICE.replace("task: stones", "task: bad").partition("metric_list")[0] + "metric_list: []\n",
         r"bad\.yaml: metric_list: the task has no metric"),
        ("bad.yaml", CHOICE.replace("task: stones", "task: bad").replace("- metric: acc\n", "- name: acc\n"),
         r"bad\.yaml: metric_list: an entry names no metric"),
        ("bad.yaml", CHOICE.replace("multiple_choice", "choices"), r"bad\.yaml: output_type: 'choices' is none of"),
        ("bad.yaml", "group: empty\n", r"bad\.yaml: the group 'empty' has no tasks"),
    ],
)  # fmt: skip
def test_a_malformed_task_file_is_skipped_without_a_word(tmp_path: Path, file: str, text: str, said: str) -> None:
    tasks = write_tasks(tmp_path)
    (tasks / file).parent.mkdir(exist_ok=True)
    (tasks / file).write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError, match=said):
        _load(tasks, "stones")


def test_all_that_is_wrong_with_a_folder_takes_as_many_attempts(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    (tasks / "a.yaml").write_text("task: [", encoding="utf-8")
    (tasks / "b.yaml").write_text("group: empty\n", encoding="utf-8")
    with pytest.raises(RecipeError) as refused:
        read_task_folder(tasks)
    assert "a.yaml" in str(refused.value) and "b.yaml" in str(refused.value)
    with pytest.raises(RecipeError, match="there is no folder"):
        read_task_folder(tmp_path / "nowhere")
    with pytest.raises(RecipeError, match=r"there is no task \(\*\.yaml\)"):
        read_task_folder(tmp_path / "data")


def test_a_template_of_tasks_is_taken_for_one(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    base, name = CHOICE.replace("task: stones\n", ""), "include: base.yaml\ntask: included\n"
    (tasks / "base.yaml").write_text(base, encoding="utf-8")
    (tasks / "included.yaml").write_text(name, encoding="utf-8")
    found = _load(tasks, "included", "stones")
    assert found.tasks["included"].questions == 12
    assert found.tasks["included"].content != found.tasks["stones"].content  # its name is another


@pytest.mark.parametrize("broken", ["{{no_such_column.index(1)}}", "{{ answer", "{{answer|nofilter}}"])
def test_a_task_that_cannot_be_asked_says_so_after_the_model_is_loaded(tmp_path: Path, broken: str) -> None:
    tasks = write_tasks(tmp_path)
    (tasks / "stones.yaml").write_text(CHOICE.replace('"{{answer}}"', f'"{broken}"'), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"stones\.yaml: the task 'stones' cannot be loaded"):
        _load(tasks, "stones")


def test_a_mistyped_name_is_told_without_its_neighbours(tmp_path: Path, few_defaults: list[bool]) -> None:
    tasks = write_tasks(tmp_path)
    _load(tasks, "nature", "stones")
    assert True not in few_defaults, "lm-eval's own tasks were listed although all names were at hand"
    with pytest.raises(RecipeError, match=r"'stonse'; did you mean stones"):
        _load(tasks, "stonse")
    assert few_defaults[-1]
    with pytest.raises(RecipeError, match=r"'xyzzy'; `lm_eval ls tasks`"):
        _load(tasks, "xyzzy")
    (tasks / "nature.yaml").write_text(GROUP.replace("pebbles", "pebles"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"the task 'nature' cannot be loaded"):
        _load(tasks, "nature")


def test_what_is_asked_changes_and_the_hash_does_not(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    names = ("stones", "rivers")

    def content() -> list[str]:
        found = _load(tasks, *names)
        return [found.tasks[name].content for name in names]

    first = content()
    assert content() == first and first[0] != first[1]
    rows = [{"question": f"what {number}", "choices": ["a", "b"], "answer": 0} for number in range(12)]
    write_rows(tmp_path / "data" / "stones.jsonl", rows)
    second = content()
    assert second[0] != first[0] and second[1] == first[1]
    (tasks / "stones.yaml").write_text(CHOICE.replace("{{question}}", "Q: {{question}}"), encoding="utf-8")
    third = content()
    assert third[0] != second[0] and third[1] == first[1]
    # Code beside the files may be what they call; and worked examples count where there are any.
    (tasks / "utils.py").write_text("one = 1\n", encoding="utf-8")
    fourth = content()
    assert fourth[0] != third[0] and fourth[1] != third[1]
    shown = _load(tasks, "stones", shots={"stones": 2}).tasks["stones"]
    write_rows(tmp_path / "data" / "examples.jsonl", rows)
    assert shown.content != _load(tasks, "stones", shots={"stones": 2}).tasks["stones"].content
    assert fourth[0] == content()[0], "examples that nobody is shown are no part of it"


def test_a_setting_that_a_task_does_not_take_is_dropped(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    (tasks / "stones.yaml").write_text(CHOICE + "num_fewshot: 0\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"eval\.shots: the file of stones says 0"):
        _load(tasks, "stones", shots={"stones": 3})
    found = _load(tasks, "stones", "pebbles", shots={"all": 3})
    assert (found.tasks["stones"].shots, found.tasks["pebbles"].shots) == (0, 3)
    with pytest.raises(RecipeError, match=r"no task asked for is called 'stonse'"):
        _load(tasks, "stones", shots={"stonse": 3})
    with pytest.raises(RecipeError, match="already; rename yours"):
        (tasks / "core.yaml").write_text(CHOICE.replace("task: stones", "task: core_copa"), encoding="utf-8")
        _load(tasks, "stones")


def test_shots_of_a_group_are_ignored_or_those_of_a_task_not_asked_are_a_mistake(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    found = _load(tasks, "nature", shots={"nature": 2, "pebbles": 1}).tasks
    assert {name: asked.shots for name, asked in found.items()} == {"stones": 2, "pebbles": 1}
    settings = Eval(task_folder=str(tasks), shots={"pebbles": 1})
    assert load_suite(settings, ["stones"], complete=False).tasks["stones"].shots == 0
    with pytest.raises(RecipeError, match="no task asked for is called 'pebbles'"):
        load_suite(settings, ["stones"])


def test_loading_tasks_moves_random_numbers(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)

    def states() -> tuple[Any, ...]:
        numpy: Any = np.random.get_state()
        return random.getstate(), numpy[1].tolist(), torch.get_rng_state().tolist()

    seed_all(98, 99)
    before = states()
    _load(tasks, "stones")
    assert states() == before
    with random_state_kept():
        seed_all(1, 2)
        assert all(one != other for one, other in zip(states(), before, strict=True))
    assert states() == before


def test_compressed_data_and_globs_are_not_found(tmp_path: Path) -> None:
    tasks = write_tasks(tmp_path)
    data = tmp_path / "data"
    (data / "stones-1.jsonl.gz").write_bytes(gzip.compress((data / "stones.jsonl").read_bytes()))
    text = CHOICE.replace("data/stones.jsonl", "data/stones-*.jsonl.gz")
    (tasks / "stones.yaml").write_text(text, encoding="utf-8")
    assert _load(tasks, "stones").tasks["stones"].questions == 12


@pytest.mark.skipif(not BENCH.is_dir(), reason="the shared benchmark data is not here")
def test_the_shared_tasks_need_another_folder_to_stand_in() -> None:
    found = _load(BENCH / "lm_eval_tasks", "arc_easy_local", "piqa_local")
    assert [found.tasks[name].questions for name in ("arc_easy_local", "piqa_local")] == [2376, 1838]
    assert len(read_task_folder(BENCH / "lm_eval_tasks")) >= 68
