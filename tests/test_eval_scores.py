"""A score is another than lm-eval's, is taken for that of another checkpoint, or is lost when a suite is killed."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import torch
from chat_helpers import templated
from fake_checkpoints import save
from lm_eval.tasks import TaskManager
from model_helpers import build
from rich.console import Console
from safetensors.torch import load_file
from small_runs import run_child, tail
from task_folders import write_rows, write_tasks

from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.errors import CheaptrainError, PreflightError, RecipeError
from cheaptrain.evaluate import command, run
from cheaptrain.evaluate.command import Options, evaluate
from cheaptrain.evaluate.curves import learning_curves
from cheaptrain.evaluate.harness import load_lm, score
from cheaptrain.evaluate.results import Evaluation, Metric, Scored, TaskResult, read_evaluation, read_items
from cheaptrain.evaluate.run import asking, shares
from cheaptrain.evaluate.standing import keep, standing
from cheaptrain.evaluate.suite import load_suite
from cheaptrain.model.saving import save_model
from cheaptrain.recipe.schema import Eval

TASKS = ["nature", "rivers", "springs"]
MEMBERS = ["stones", "pebbles", "rivers", "springs"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tasks/` and `data/`, and two models with a tokenizer: `one/`, `other/`."""
    folder = tmp_path_factory.mktemp("scored")
    torch.set_num_threads(1)
    write_tasks(folder)
    tokenizer = templated(folder, "chatml")
    for seed, name in enumerate(("one", "other"), 1):
        model = build("tiny-qwen3", vocab_size=tokenizer.size, seq_len=256, seed=seed)
        for parameter in model.parameters():
            parameter.data *= 6  # so that it prefers something
        save_model(model, folder / name)
        tokenizer.hf.save_pretrained(folder / name)
    return folder


@pytest.fixture
def place(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own with all of it, as the current one."""
    shutil.copytree(home, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    plain = socket.socket.connect

    def connect(self: socket.socket, address: Any) -> None:
        assert self.family not in (socket.AF_INET, socket.AF_INET6), "a connection, with everything on this machine"
        plain(self, address)

    monkeypatch.setattr(socket.socket, "connect", connect)
    return tmp_path / "place"


def _evaluate(*paths: str, tasks: str | None = ",".join(TASKS), **options: Any) -> str:
    written = StringIO()
    changes = {"task_folder": "tasks", "batch_size": 4} | options.pop("changes", {})
    evaluate(
        list(paths), Options(tasks, changes=changes, **{"device": "cpu", **options}), Console(file=written, width=200)
    )
    return written.getvalue()


def _kept(name: str = "one") -> Evaluation:
    (folder,) = Path("outputs/eval").glob(f"{name}-*")
    return read_evaluation(folder)


def _spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that are really scored from here on."""
    plain, scored = run.score, list[str]()

    def spied(lm: Any, asked: Any, *rest: Any) -> Any:
        scored.append(asked.name)
        return plain(lm, asked, *rest)

    monkeypatch.setattr(run, "score", spied)
    return scored


@pytest.mark.parametrize("chat", [False, True])
def test_the_numbers_are_not_those_of_lm_eval(place: Path, chat: bool) -> None:
    settings = Eval(task_folder="tasks", batch_size=4, chat_template=chat, shots={"all": 2})
    suite = load_suite(settings.model_copy(update={"shots": {"stones": 2, "pebbles": 2}}), TASKS)
    lm = load_lm(place / "one", "float32", 4, torch.device("cpu"))
    ours = {
        name: score(lm, asked, asking(settings, asked, torch.device("cpu"), None))
        for name, asked in suite.tasks.items()
    }
    theirs: Any = {"results": {}, "samples": {}}
    for names, shots in ((["nature"], 2), (["rivers", "springs"], None)):
        found: Any = lm_eval.simple_evaluate(
            model="hf",
            model_args="pretrained=one,dtype=float32",
            tasks=names,
            num_fewshot=shots,
            batch_size=4,
            device="cpu",
            bootstrap_iters=1000,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            task_manager=TaskManager(include_path="tasks", include_defaults=False),
        )
        theirs["results"] |= found["results"]
        theirs["samples"] |= found["samples"]
    for name in MEMBERS:
        entries = theirs["results"][name]
        assert [(f"{m.name},{m.filter}", m.value) for m in ours[name].metrics] == [
            (key, float(value)) for key, value in entries.items() if "," in key and "_stderr" not in key
        ]
        for metric in ours[name].metrics:
            assert metric.stderr == entries[f"{metric.name}_stderr,{metric.filter}"]
        samples = theirs["samples"][name]
        assert [item.doc for item in ours[name].items] == [sample["doc_hash"] for sample in samples]
        assert [item.metrics for item in ours[name].items] == [
            {metric: float(sample[metric]) for metric in sample["metrics"]} for sample in samples
        ]
        if name == "rivers":
            assert [item.answer for item in ours[name].items] == [sample["filtered_resps"][0] for sample in samples]
    assert len({metric.value for name in MEMBERS for metric in ours[name].metrics}) > 3
    assert ours["stones"].baseline == pytest.approx(1 / 3) and ours["rivers"].baseline is None
    by_task = {
        name: run.result_of(
            suite.tasks[name], asking(settings, suite.tasks[name], torch.device("cpu"), None), "", answer
        )
        for name, answer in ours.items()
    }
    mean = run.group_result(suite.groups["nature"], by_task)
    assert mean is not None and mean.n == 19 and mean.members == ("stones", "pebbles")
    assert mean.metrics[0].value == theirs["results"]["nature"]["acc,none"]
    assert mean.metrics[0].stderr == theirs["results"]["nature"]["acc_stderr,none"]


@pytest.mark.slow
def test_the_numbers_are_not_those_of_the_command_of_lm_eval(place: Path) -> None:
    line = ["lm_eval", "--model", "hf", "--model_args", "pretrained=one,dtype=float32", "--device", "cpu"]
    line += ["--tasks", "stones,rivers", "--include_path", "tasks", "--batch_size", "4", "--output_path", "theirs"]
    subprocess.run([str(Path(sys.executable).parent / line[0]), *line[1:]], check=True, capture_output=True)
    _evaluate("one", tasks="stones,rivers")
    (found,) = Path("theirs").rglob("results_*.json")
    theirs = json.loads(found.read_text(encoding="utf-8"))["results"]
    for result in _kept().results:
        for metric in result.metrics:
            assert metric.value == theirs[result.task][f"{metric.name},{metric.filter}"]
            assert metric.stderr == theirs[result.task][f"{metric.name}_stderr,{metric.filter}"]


def test_what_stands_is_scored_again_or_what_changed_is_not(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scored = _spy(monkeypatch)
    shown = _evaluate("one")
    assert scored == MEMBERS and "nature (2 tasks)" in shown
    first = _kept()
    assert {result.task for result in first.results} == {*MEMBERS, "nature"}
    again = _evaluate("one")
    assert scored == MEMBERS and _kept() == first
    assert [line for line in again.splitlines() if "±" in line] == [line for line in shown.splitlines() if "±" in line]

    def now(*paths: str, **options: Any) -> list[str]:
        scored.clear()
        _evaluate(*paths, **options)
        return sorted(scored)

    assert now("other") == sorted(MEMBERS)  # another checkpoint
    assert now("one", tasks="stones", changes={"limit": 5}) == ["stones"]
    assert now("one", tasks="stones", changes={"limit": 12}) == []  # all there are
    assert now("one", tasks="stones", changes={"seed": 7}) == ["stones"]
    assert now("one", tasks="stones", shots=1) == ["stones"]
    assert now("one", tasks="stones", changes={"chat_template": True}) == ["stones"]
    assert now("one", tasks="stones", changes={"system": "Be short."}) == ["stones"]
    assert now("one", tasks="stones", changes={"dtype": "bfloat16"}) == ["stones"]
    assert now("one", tasks="stones", changes={"batch_size": 2}) == []
    assert now("one", tasks="stones", again=True) == ["stones"]
    text = (place / "tasks" / "stones.yaml").read_text(encoding="utf-8")
    (place / "tasks" / "stones.yaml").write_text(text.replace("version: 1.0", "version: 2.0"), encoding="utf-8")
    assert now("one") == ["stones"]
    write_rows(place / "data" / "rivers.jsonl", [{"question": "when", "answer": "then"}])
    assert now("one") == ["rivers"]
    results = _kept().results
    assert len({result.key for result in results}) == len(results)
    assert {result.version for result in results if result.task == "stones"} == {"1.0", "2.0"}
    assert _kept().newest()["rivers"].n == 1
    # Another weight in the same folder is another checkpoint, in a folder of results of its own.
    shutil.copytree("other", "one", dirs_exist_ok=True)
    assert now("one", tasks="springs") == ["springs"]
    assert len(list(Path("outputs/eval").glob("one-*"))) == 2


def test_a_suite_that_was_killed_starts_over(place: Path, tmp_path: Path) -> None:
    def killed() -> None:
        import os

        plain, calls = run.keep, [0]

        def keep(*arguments: Any) -> None:
            calls[0] += 1
            if calls[0] == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            plain(*arguments)

        run.keep = keep  # type: ignore[assignment]
        _evaluate("one")

    assert run_child(killed, tmp_path / "log") == -signal.SIGKILL, tail(tmp_path / "log")
    before = _kept()
    assert [result.task for result in before.results] == ["stones", "pebbles"]
    with pytest.MonkeyPatch.context() as patch:
        scored = _spy(patch)
        _evaluate("one")
    assert scored == ["rivers", "springs"]
    assert [result for result in _kept().results if result.task in ("stones", "pebbles")] == list(before.results)


def test_a_result_lacks_what_it_is_of(place: Path) -> None:
    _evaluate("one", tasks="stones,rivers", changes={"limit": 4})
    kept = _kept()
    assert kept.checkpoint.hash[:12] in kept.folder.name and (kept.checkpoint.parameters or 0) > 1000
    for result in kept.results:
        assert result.n == 4 and result.harness.startswith("lm-eval 0.") and result.version == "1.0"
        assert result.settings["limit"] == 4 and result.settings["dtype"] == "float32"
        items = read_items(kept, result)
        assert [item.index for item in items] == [0, 1, 2, 3] and len({item.doc for item in items}) == 4
        main = result.metrics[0]
        assert main.value == pytest.approx(sum(item.metrics[main.name] for item in items) / 4)
        own = json.loads((kept.folder / str(result.results)).read_text(encoding="utf-8"))
        assert own["results"][result.task][f"{main.name},none"] == main.value
        assert own["n-samples"][result.task] == {"original": 12 if result.task == "stones" else 5, "effective": 4}


def test_prompts_are_cut_without_a_word(place: Path) -> None:
    config = json.loads((place / "one" / "config.json").read_text(encoding="utf-8"))
    (place / "one" / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}), encoding="utf-8")
    shown = _evaluate("one", tasks="stones")
    cut = next(note for note in _kept().results[0].notes if "cut from the left" in note)
    assert cut.startswith("35 prompts") and cut in shown


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_task_that_fails_takes_the_others_with_it(place: Path, processes: int) -> None:
    # It loads, and its last question has nothing to choose from.
    path = place / "data" / "pebbles.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    write_rows(path, [*rows, {"question": "why", "choices": [], "answer": 0}])
    with pytest.raises(CheaptrainError, match="pebbles") as failed:
        _evaluate("one", processes=processes)
    assert failed.value.exit_code == 1 and "the others stand" in str(failed.value)
    assert {result.task for result in _kept().results} == {"stones", "rivers", "springs"}


def test_processes_get_parts_of_a_task_or_the_same(place: Path) -> None:
    costs = {"a": 9, "b": 5, "c": 4, "d": 1, "e": 1}
    parts = [shares(costs, rank, 2) for rank in range(2)]
    assert sorted(parts[0] + parts[1]) == sorted(costs)
    assert abs(sum(costs[name] for name in parts[0]) - sum(costs[name] for name in parts[1])) <= 2
    assert [shares(costs, rank, 8) for rank in range(8)].count([]) == 3


@pytest.mark.slow
def test_a_process_that_dies_is_not_told_of(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_in_process", _die)
    with pytest.raises(CheaptrainError, match="stones: a process of the evaluation died"):
        _evaluate("one", processes=2)


def _die(*_: Any) -> None:
    import os

    os._exit(9)


def test_a_checkpoint_that_is_damaged_or_none_is_scored(place: Path, tmp_path: Path) -> None:
    def refused(kind: type[CheaptrainError], said: str, *paths: str, **options: Any) -> None:
        with pytest.raises(kind, match=said):
            _evaluate(*paths, **options)

    refused(RecipeError, "there is no such recipe, run or checkpoint", "./nothing")
    refused(RecipeError, "no run and no checkpoint", "tasks")
    refused(RecipeError, "one is one checkpoint; name its run", "one", every_checkpoint=True)
    refused(RecipeError, "no task is named", "one", tasks=None)
    refused(RecipeError, "a key goes with a recipe", "one", "eval.limit=3")
    refused(RecipeError, "eval.dtype: Input should be", "one", changes={"dtype": "int4"})
    refused(RecipeError, "--output is a folder for one", "one", "other", output=Path("there"))
    refused(RecipeError, "--device", "one", device="cuda:77") if not torch.cuda.is_available() else None
    save(RunDirectory(tmp_path / "run"), 3)
    weights = tmp_path / "run" / "checkpoints" / "step-000003" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    (tmp_path / "run" / "recipe.json").write_text("{}", encoding="utf-8")
    refused(RecipeError, "the run is not finished; name one of its checkpoints", str(tmp_path / "run"))
    refused(PreflightError, "step-000003 is damaged: model.safetensors", str(weights.parent))


def _run_of(place: Path, steps: dict[int, str]) -> Path:
    """A run with checkpoints that hold the models of these names, as far as evaluating looks at them."""
    at = RunDirectory(place / "run")
    for step, name in steps.items():
        files = {file.name: file.read_bytes() for file in (place / name).iterdir() if file.suffix != ".safetensors"}
        weights = load_file(place / name / "model.safetensors")
        save(at, step, weights=weights, files=files, tokens_seen=step * 1000, prove=lambda _: {})
    at.final.unlink(missing_ok=True)
    at.final.symlink_to(f"checkpoints/step-{max(steps):06d}")
    kept = {"recipe": {"eval": {"tasks": ["stones"], "task_folder": "tasks", "limit": 6, "light": ["stones"]}}}
    (place / "run" / "recipe.json").write_text(json.dumps(kept), encoding="utf-8")
    return place / "run"


def test_checkpoints_are_scored_twice_or_fall_off_the_curve(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at = _run_of(place, {10: "one", 20: "other"})
    scored = _spy(monkeypatch)
    shown = _evaluate("run", tasks=None, changes={"limit": 5}, every_checkpoint=True)
    assert scored == ["stones", "stones"] and "step 10" in shown and "step 20" in shown
    shutil.rmtree(at / "checkpoints" / "step-000010")
    _run_of(place, {30: "one"})
    _evaluate("run", tasks="nature", changes={"limit": 5}, every_checkpoint=True)
    assert sorted(scored[2:]) == ["pebbles", "pebbles", "stones"]
    curves = {curve.task: curve for curve in learning_curves(RunDirectory(at))}
    assert [(point.step, point.tokens) for point in curves["nature"].points] == [(20, 20_000), (30, 30_000)]
    assert all(point.stderr is not None and point.n == 10 for point in curves["nature"].points)
    names = sorted(path.name for path in (at / "eval").glob("*.png"))
    assert "learning-curves.png" in names and "nature-curve.png" in names
    # The run's own [eval] counts where nothing else is said; another limit is another curve.
    _evaluate("run", tasks=None)
    last = read_evaluation(at / "eval" / "step-000030")
    assert last.newest()["stones"].n == 6
    assert json.loads(_evaluate_json("run"))[0]["results"][0]["n"] == 6


def test_results_of_another_model_in_a_step_s_folder_are_mixed_in(place: Path) -> None:
    at = _run_of(place, {10: "one"})
    _evaluate("run", tasks="stones")
    old = read_evaluation(at / "eval" / "step-000010")
    shutil.rmtree(at / "checkpoints")
    _run_of(place, {10: "other"})
    _evaluate("run", tasks="pebbles")
    now = read_evaluation(at / "eval" / "step-000010")
    assert [result.task for result in now.results] == ["pebbles"] and now.checkpoint.hash != old.checkpoint.hash
    aside = read_evaluation(at / "eval" / f"step-000010.of-{old.checkpoint.hash[:12]}")
    assert aside.results == old.results
    assert [curve.task for curve in learning_curves(RunDirectory(at))] == ["pebbles"]


def test_the_mean_of_a_group_outlives_its_tasks(place: Path) -> None:
    _evaluate("one", tasks="nature")
    kept = _kept()
    stones = kept.newest()["stones"]
    better = replace(stones, metrics=tuple(replace(metric, value=metric.value + 0.5) for metric in stones.metrics))
    keep(kept.folder, kept.checkpoint, better)
    before = kept.newest()["nature"].metrics[0].value
    _evaluate("one", tasks="nature")
    assert _kept().newest()["nature"].metrics[0].value == pytest.approx(before + 0.25)  # half of it: of two tasks


def test_results_that_take_turns_in_a_folder_are_lost_or_cannot_be_written(tmp_path: Path) -> None:
    result = TaskResult("t", "k", "1", 10, (Metric("acc", 0.5),), {}, 0.0, "lm-eval", "2026-01-01")
    one, other = Scored("x", "a" * 64), Scored("x", "b" * 64)
    for turn in range(6):
        scored = (one, other)[turn % 2]
        assert len(standing(tmp_path / "at", scored).results) == turn // 2
        keep(tmp_path / "at", scored, replace(result, key=str(turn)))
    assert {place.name for place in tmp_path.iterdir() if place.is_dir()} == {"at", f"at.of-{'a' * 12}"}


def test_a_quick_look_hides_the_whole_or_an_old_version_the_new_one() -> None:
    def result(version: str, n: int, month: int) -> TaskResult:
        return TaskResult("t", f"{n}", version, n, (Metric("acc", 0.5),), {}, 0.0, "lm-eval", f"2026-{month:02}-01")

    def newest(*results: TaskResult) -> tuple[str, int]:
        found = Evaluation(Path(), Scored("x", "a"), results).newest()["t"]
        return found.version, found.n

    assert newest(result("1", 100, 1), result("1", 10, 2)) == ("1", 100)
    assert newest(result("2", 90, 2), result("1", 100, 1)) == ("2", 90)
    assert newest(result("1", 100, 1), result("1", 100, 3), result("2", 10, 2)) == ("1", 100)


def _evaluate_json(path: str) -> str:
    written = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", written)
        _evaluate(path, tasks=None, as_json=True)
    return written.getvalue()
