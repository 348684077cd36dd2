"""Sums are asked more kindly than a user could, asked twice, or asked of a model that has read them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from chat_helpers import templated
from model_helpers import build
from rich.console import Console
from small_runs import (
    prepare,
    recipe_table,
    run_child,
    tail,
    train,
    train_together,
    train_until,
    write_recipe,
    write_texts,
)

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.data.sources.drills import held_out_questions
from cheaptrain.evaluate.sums import Marks, marks
from cheaptrain.model.twin import plain_twin
from cheaptrain.recipe.load import load_recipe
from cheaptrain.train import probing
from cheaptrain.train.outcome import Outcome, print_outcomes
from cheaptrain.train.survey import survey_all

STEPS = 12
DRILLS = {"documents": 300, "digits": 2, "seed": 3, "operations": ["+"], "steps": True, "held_out": 0.1}


class Scripted:
    """Says what it is told to, in place of a model."""

    def __init__(self, answers: list[list[int]], ends: list[int]) -> None:
        self.answers, self.asked = answers, 0
        self.generation_config = SimpleNamespace(eos_token_id=ends)
        self.training, self.device = True, torch.device("cpu")

    def generate(self, *, input_ids: Any, max_new_tokens: int, pad_token_id: int, **_: Any) -> Any:
        rows = self.answers[self.asked : self.asked + len(input_ids)]
        self.asked += len(rows)
        width = max(len(row) for row in rows)
        assert width <= max_new_tokens
        new = torch.tensor([row + [pad_token_id] * (width - len(row)) for row in rows])
        return torch.cat([input_ids, new], 1)

    def train(self, mode: bool) -> None:
        self.training = mode

    def eval(self) -> None:
        self.training = False


@pytest.mark.parametrize(
    ("said", "ends", "right"),
    [
        ("4 + 3 = 7: 7\n#### 47", True, True),
        ("#### 47", True, True),
        ("#### 47\n", True, True),
        ("#### 47", False, False),  # cut off: perhaps it was to be #### 471
        ("#### 47\nas I said", True, False),
        ("so #### 47", True, False),
        ("#### 047", True, False),
        ("#### 4", True, False),
        ("47", True, False),
        ("", True, False),
    ],
)
def test_an_answer_counts_that_only_holds_the_result(tmp_path: Path, said: str, ends: bool, right: bool) -> None:
    tokenizer = templated(tmp_path, "chatml")
    stop, text = tokenizer.end_of_turn_id, tokenizer.hf(said, add_special_tokens=False)["input_ids"]
    assert stop is not None
    answer = [*text, stop, *text] if ends else text
    other = (tokenizer.hf("#### 1 and so on")["input_ids"] * 9)[: len(answer)]  # never ends
    model: Any = Scripted([answer, other], [tokenizer.eot_id, stop])
    found = marks(model, tokenizer.hf, [("20 + 27 = ?", "#### 47"), ("1 + 1 = ?", "#### 2")], 200)
    assert (found.asked, found.right, found.ended) == (2, int(right), int(ends))
    assert found.answer == said.rstrip() and model.training


def test_a_question_in_a_batch_is_answered_otherwise_than_alone(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    tokenizer = templated(tmp_path, "chatml")
    model = plain_twin(build("tiny-qwen3", vocab_size=tokenizer.size))
    for parameter in model.parameters():
        parameter.data *= 8  # so that it says other things to other questions
    questions = [(f"{'how much is ' * length}{length} + 1 = ?", str(length + 1)) for length in (9, 0, 4, 1)]
    alone = [marks(model, tokenizer.hf, [question], 6).answer for question in questions]
    for first in range(len(questions)):
        turned = questions[first:] + questions[:first]
        assert marks(model, tokenizer.hf, turned, 6).answer == alone[first]
    assert len(set(alone)) > 1


def _table(folder: Path, run: str, **probe: Any) -> dict[str, Any]:
    table = recipe_table(folder, run)
    table["data"]["sources"] = [
        {"name": "sums", "drills": DRILLS, "weight": "size", "format": "chat", "max_epochs": 99.0},
        *({**source, "weight": 0} for source in table["data"]["sources"]),
    ]
    table["data"]["seq_len"] = 128
    table["chat"] = {"template": "chatml"}
    table["probe"] = {"source": "sums", "questions": 6, "max_new_tokens": 12, **probe}
    table["train"] |= {"objective": "assistant_only", "steps": STEPS, "global_batch_tokens": 512}
    return table


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probed")
    write_texts(path, 60)
    recipe = write_recipe(path / "straight.toml", _table(path, "straight"))
    prepare(recipe)
    assert run_child(train(recipe), path / "straight.log") == 0, tail(path / "straight.log")
    return path


def _kept(run: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((run / "probe.json").read_text(encoding="utf-8"))
    return kept


@pytest.mark.slow
def test_a_run_that_goes_on_is_asked_again_or_forgets_what_it_could_before(folder: Path) -> None:
    recipe, log = write_recipe(folder / "broken.toml", _table(folder, "broken")), folder / "broken.log"

    assert run_child(train_until(recipe, 7), log) == 75, tail(log)
    before = _kept(folder / "broken")
    assert before["before"]["asked"] == 6 and before["after"] is None
    assert run_child(train(recipe), log) == 0, tail(log)
    assert _kept(folder / "broken") == _kept(folder / "straight")
    assert _kept(folder / "broken")["before"] == before["before"]
    # The questions of a finished run stand, whatever is asked now; one that lacks them is asked now.
    more = write_recipe(folder / "more.toml", _table(folder, "broken", questions=9))
    assert run_child(train(more), log) == 0, tail(log)
    assert _kept(folder / "broken")["after"]["asked"] == 6
    (folder / "broken" / "probe.json").unlink()
    assert run_child(train(more), log) == 0, tail(log)
    assert _kept(folder / "broken")["before"] is None and _kept(folder / "broken")["after"]["asked"] == 9


@pytest.mark.parametrize("content", ["", "[]", '{"before": {"asked": 1}}', '{"after": 3}', "null"])
def test_marks_that_cannot_be_read_end_a_run_that_was_trained(tmp_path: Path, content: str) -> None:
    (tmp_path / "probe.json").write_text(content, encoding="utf-8")
    assert probing.marks_in(RunDirectory(tmp_path)) == (None, None)


def test_two_processes_ask_twice_or_otherwise(folder: Path) -> None:
    recipe, calls = write_recipe(folder / "two.toml", _table(folder, "two")), folder / "two.calls"

    def counted(rank: int) -> None:
        plain = probing.keep_marks

        def noted(*given: Any) -> None:
            with calls.open("a", encoding="utf-8") as file:
                file.write(f"{rank}\n")
            plain(*given)

        probing.keep_marks = noted

    assert train_together(2, [recipe], folder / "two.log", counted) == {0: 0, 1: 0}, tail(folder / "two.log")
    assert calls.read_text(encoding="utf-8").split() == ["0", "0"]
    assert _kept(folder / "two")["before"] == _kept(folder / "straight")["before"]
    assert _kept(folder / "two")["after"]["asked"] == 6


def _problems(folder: Path, *recipes: tuple[str, dict[str, Any]]) -> list[str]:
    loaded = [load_recipe(write_recipe(folder / f"{name}.toml", table)) for name, table in recipes]
    surveys = survey_all(loaded, 1)
    return list(probing.wrong_questions(surveys[-1], surveys[:-1]))


def test_sums_are_called_unseen_that_other_drills_contain(folder: Path) -> None:
    assert _problems(folder, ("fine", _table(folder, "fine"))) == []
    table = _table(folder, "leaky")
    for number, change in enumerate(({"held_out": 0.05}, {"seed": 4}, {"operations": ["*"]})):
        other = {"name": f"others{number}", "drills": DRILLS | {"steps": False} | change, "weight": 1.0}
        earlier = _table(folder, f"earlier{number}")
        earlier["data"]["sources"] = [other, *earlier["data"]["sources"][1:]]
        earlier["train"]["objective"] = "next_token"
        del earlier["chat"], earlier["probe"]
        prepare(write_recipe(folder / "earlier.toml", earlier))
        found = _problems(folder, ("earlier", earlier), ("leaky", table))
        if "operations" in change:
            assert found == []  # products tell nothing of sums
        else:
            assert len(found) == 1 and f"drills of source 'others{number}'" in found[0]
            assert "seed = 3 and held_out = 0.1" in found[0]


def test_there_is_nothing_to_ask_or_no_room_for_the_answer(folder: Path) -> None:
    none = _table(folder, "none")
    none["data"]["sources"][0] |= {"drills": DRILLS | {"digits": 1, "held_out": 0.001}, "weight": 0}
    none["data"]["sources"].append(_table(folder, "none")["data"]["sources"][0] | {"name": "read"})
    prepare(write_recipe(folder / "none.toml", none))
    found = _problems(folder, ("none", none))
    assert any("probe.source = 'sums': drills.held_out = 0.001 holds out no pair" in problem for problem in found)
    [said] = _problems(folder, ("long", _table(folder, "long", max_new_tokens=100_000)))
    assert said.startswith("probe.max_new_tokens = 100000: with a question of")


def test_answers_without_steps_are_expected_to_end_like_those_with_them(folder: Path) -> None:
    table = _table(folder, "short")
    with_steps = load_recipe(write_recipe(folder / "steps.toml", table)).recipe
    table["data"]["sources"][0] |= {"drills": DRILLS | {"steps": False}}
    without = load_recipe(write_recipe(folder / "short.toml", table)).recipe
    drills = with_steps.data.sources[0].drills
    assert drills is not None
    expected = held_out_questions(drills, 6)
    assert probing._questions(with_steps) == [(text, f"#### {result}") for text, result in expected]
    assert all(wanted.isdecimal() for _, wanted in probing._questions(without))


def test_before_and_after_are_told_of_one_number_when_two_were_asked(capsys: pytest.CaptureFixture[str]) -> None:
    def printed(asked: int) -> str:
        outcome = Outcome(
            name="s", state="trained", tokens=1, seconds=1.0, from_step=0, validations=(), agreements=(), samples=(),
            marks=(Marks(asked, 3, 4, "q", "a"), Marks(200, 180, 190, "q", "a")), run=SimpleNamespace(final="a b/f"),  # type: ignore[arg-type]
            answers_only=True, talks=True,
        )  # fmt: skip
        print_outcomes([outcome], Console(width=200))
        said = " ".join(capsys.readouterr().out.split())
        assert "cheaptrain chat 'a b/f'" in said and "--model_args 'pretrained=a b/f' --tasks" in said
        return said

    assert "3 → 180 of 200 4 → 190 of 200" in printed(200)
    assert "3 of 100 → 180 of 200 4 of 100 → 190 of 200" in printed(100)
