"""What a run writes down of itself and what it ends with: cards that differ by the clock, reports that are missing."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_runs
from huggingface_hub import ModelCard
from small_runs import prepare, recipe_table, run_child, tail, train, train_until, write_recipe, write_texts

from cheaptrain.checkpoint.jsonl import newest_record
from cheaptrain.checkpoint.verify import stated_fingerprint, verify_checkpoint
from cheaptrain.environment import _own_state, git_state

STEPS = 12


def _reporting(*arguments: str) -> Any:
    """Work for a child: train, with the report that other tests leave out."""

    def work() -> None:
        small_runs.stages.report_at_the_end = small_runs.REPORT_AT_THE_END
        train(*arguments)()

    return work


def _table(folder: Path, run: str, **model: Any) -> dict[str, Any]:
    table = recipe_table(folder, f"outputs/{run}")
    table["train"] |= {"steps": STEPS, "warmup": 0}
    table["checkpoint"] = {"every": "4 steps"}
    table["validation"] = {"every": "4 steps", "tokens": 64}
    table["plan"] = {"tokens_per_second": 1000.0}
    table["samples"] = {"prompts": ["the river"], "max_new_tokens": 4}
    table["card"] = {"license": "apache-2.0", "tags": ["tiny"]}
    return table | ({"model": model} if model else {})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`one`, stopped after 7 steps and gone on with, `two` from its weights with the report of both, and `plain`, which
    is `one` without a stop."""
    folder = tmp_path_factory.mktemp("report")
    write_texts(folder)
    one = write_recipe(folder / "one.toml", _table(folder, "one"))
    two = write_recipe(folder / "two.toml", _table(folder, "two", init_from=str(folder / "outputs/one/final")))
    plain = write_recipe(folder / "plain.toml", _table(folder, "plain") | {"log": {"report": False}})
    prepare(one)
    assert run_child(train_until(one, 7), folder / "log") == 75, tail(folder / "log")
    (folder / "log").unlink()
    assert run_child(_reporting(one, two), folder / "log") == 0, tail(folder / "log")
    assert run_child(_reporting(plain), folder / "plain.log") == 0, tail(folder / "plain.log")
    return folder


def test_the_end_of_a_chain_says_where_its_report_lies_and_the_report_has_all_stages(made: Path) -> None:
    page = made / "outputs/two/report/report.html"
    assert tail(made / "log").rstrip().endswith(str(page))
    content = json.loads((page.parent / "report.json").read_text())
    assert [(s["name"], s["state"], s["offset_tokens"]) for s in content["stages"]] == [
        ("one", "done", 0), ("two", "done", STEPS * 256),
    ]  # fmt: skip
    assert not (made / "outputs/one/report").exists()  # a stage of seconds has none of its own
    assert not (made / "outputs/plain/report").exists()  # log.report = false
    assert "report.html" not in tail(made / "plain.log")


def test_a_launch_writes_down_plan_environment_and_the_launches_before_it(made: Path) -> None:
    record = json.loads((made / "outputs/one/launch.json").read_text())
    (before,) = record["earlier"]
    assert (before["exit_code"], before["from_step"], record["exit_code"], record["from_step"]) == (75, 0, 0, 7)
    assert "SIGTERM" in before["reason"] and "earlier" not in before
    plan = before["plan"]
    assert (plan["steps"], plan["tokens"], plan["seconds"]) == (STEPS, STEPS * 256, STEPS * 256 / 1000)
    assert plan["parameters"] > 0 and plan["memory_bytes"] > 4 * plan["parameters"]
    assert [source["name"] for source in plan["sources"]] == ["prose", "notes"]
    assert sum(source["tokens"] for source in plan["sources"]) == STEPS * 256
    environment = record["environment"]
    for launch in (before, record):  # the CPU compiles nothing
        assert 0 < launch["first_step"]["seconds"] < 600 and launch["first_step"]["graphs"] == 0
    assert environment["packages"]["torch"] and environment["python"].startswith("3.") and environment["gpus"] == 0
    content = json.loads((made / "outputs/two/report/report.json").read_text())["stages"][0]
    assert content["asked"]["seconds"] == plan["seconds"] and len(content["launches"]) == 2
    assert content["environment"]["packages"] == environment["packages"]
    assert content["happened"]["memory_bytes"] > 5e7 and content["happened"]["memory_of"] == "main process"


def test_each_checkpoint_carries_a_card_that_its_manifest_names(made: Path) -> None:
    folder = made / "outputs/two/checkpoints" / f"step-{STEPS:06d}"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert "README.md" in manifest["files"] and verify_checkpoint(folder) == []
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "apache-2.0" and card.data.tags == ["cheaptrain", "tiny"]
    assert card.data.base_model is None and card.data.library_name == "transformers"
    held_out = newest_record(made / "outputs/two/metrics.jsonl", "val/loss")
    assert held_out is not None and f"| all | {held_out['val/loss']:.4f} |" in card.text
    assert f"# two, step {STEPS}" in card.text and f"{STEPS * 256 * 2:,}" in card.text  # with the stage before
    assert f"{made}/outputs/two/report/report.html" in card.text
    earlier = ModelCard.load(made / "outputs/two/checkpoints/step-000008/README.md")
    assert f"step 8 of {STEPS} of the stage, which has not come to its end" in earlier.text


def test_the_card_of_a_resumed_run_is_that_of_the_run_never_stopped(made: Path) -> None:
    cards = [(made / f"outputs/{run}/final/README.md").read_text() for run in ("one", "plain")]
    assert cards[0].replace("one", "plain") == cards[1].replace("one", "plain")


def test_a_card_is_no_part_of_what_a_stage_starts_from(made: Path) -> None:
    one, plain = (made / f"outputs/{run}/final" for run in ("one", "plain"))
    assert stated_fingerprint(one) == stated_fingerprint(plain)  # the same weights, and other cards
    folder = made / "outputs/plain/checkpoints/step-000008"
    (folder / "README.md").write_text("another")
    assert [problem.file for problem in verify_checkpoint(folder)] == ["README.md"]


def test_a_run_that_diverges_leaves_a_report(made: Path) -> None:
    recipe = write_recipe(made / "bad.toml", _table(made, "bad"))

    def work() -> None:
        from cheaptrain.train import loop

        plain = loop._step

        def spoiled(stage: Any, *rest: Any) -> Any:
            if stage.ledger.step == 2:
                stage.model.get_input_embeddings().weight.data.fill_(float("nan"))
            return plain(stage, *rest)

        loop._step = spoiled
        _reporting(recipe)()

    assert run_child(work, made / "bad.log") == 4, tail(made / "bad.log")
    content = json.loads((made / "outputs/bad/report/report.json").read_text())
    assert content["stages"][0]["state"] == "failed" and "skipped" in [e["kind"] for e in content["noticed"]]
    assert str(made / "outputs/bad/report/report.html") in tail(made / "bad.log")


def test_the_commit_and_whether_files_were_changed_are_told_or_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *who, *arguments], check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git_state(tmp_path) is None
    git("init", "--quiet")
    assert git_state(tmp_path) is None  # no commit yet
    (tmp_path / "a.py").write_text("1")
    git("add", "a.py")
    git("commit", "--quiet", "-m", "one")
    commit = git("rev-parse", "HEAD")
    (tmp_path / "outputs").write_text("not followed")
    assert git_state(tmp_path) == {"commit": commit, "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert git_state(tmp_path) == {"commit": commit, "dirty": True}
    package = tmp_path / "package"
    package.mkdir()
    (package / "b.py").write_text("1")
    assert _own_state(package / "b.py") is None  # it lies there, and is not of it
    git("add", "package")
    git("commit", "--quiet", "-m", "two", "--", "package")
    commit = git("rev-parse", "HEAD")
    assert _own_state(package / "b.py") == {"commit": commit, "dirty": False}  # a.py is not below it
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None


def test_the_newest_record_is_found_from_the_end_across_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "metrics.jsonl"
    assert newest_record(file, "val/loss") is None
    lines = [{"step": 1, "val/loss": 3.0}, *({"step": n, "train/loss": 1.0} for n in range(2, 40))]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 40, "val/loss": 2.')
    for block in (7, 64, 2**20):
        monkeypatch.setattr("cheaptrain.checkpoint.jsonl._BLOCK_BYTES", block)
        assert newest_record(file, "val/loss") == {"step": 1, "val/loss": 3.0}
        assert newest_record(file, "kd/loss") is None
