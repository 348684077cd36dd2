"""What a report says of runs in any state: numbers that are not those of the run, odd things that nobody was told."""

import json
import os
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_runs import BEGAN, TOKENS, checkpointed, fake_run, sampled, scored, validated

from cheaptrain.checkpoint.lock import RunLock
from cheaptrain.checkpoint.paths import RunDirectory
from cheaptrain.checkpoint.verify import stated_fingerprint
from cheaptrain.errors import CheaptrainError, RecipeError
from cheaptrain.evaluate.results import holding_evaluations
from cheaptrain.recipe.load import load_recipe
from cheaptrain.report import pictures, write
from cheaptrain.report.account import Account, account_of
from cheaptrain.report.drawn_scores import score_pictures
from cheaptrain.report.model_card import CardFacts, model_card
from cheaptrain.report.series import thinned
from cheaptrain.report.status import status_of
from cheaptrain.report.subjects import subjects_of
from cheaptrain.report.write import report_at_the_end, report_on

WITH_PICTURES = (
    "test_a_run_of_one_logged_step", "test_markup", "test_a_long_run",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _pictures_only_where_they_matter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes most of the time."""
    if not request.node.name.startswith(WITH_PICTURES):
        monkeypatch.setattr(pictures, "write_png", lambda picture, path: path.write_bytes(b""))
        monkeypatch.setattr(pictures, "svg", lambda picture, wide=False: "<svg></svg>")


def report(*runs: Path, output: Path | None = None) -> tuple[dict[str, Any], str]:
    """report.json and the page of the report on `runs`."""
    page = report_on([str(run) for run in runs], output)
    return json.loads((page.parent / "report.json").read_text(encoding="utf-8")), page.read_text(encoding="utf-8")


class Cells(HTMLParser):
    """Texts of `<span>` in cells with data-key, by stage and key; of cells of scores, by task."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: dict[tuple[str, str], str] = {}
        self.row: dict[str, str | None] = {}
        self.key = self.inside = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "tr":
            self.row = dict(attrs)
        elif tag == "td":
            self.key = dict(attrs).get("data-key") or ""
        elif tag == "span" and self.key:
            self.inside = self.key

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.found[str(self.row.get("data-stage")), self.inside] = data
            self.inside = ""


def accounts_of(run: Path) -> list[Account]:
    return [account_of(status) for status in status_of(subjects_of([str(run)]))]


def kinds(content: dict[str, Any]) -> list[str]:
    return [entry["kind"] for entry in content["noticed"]]


def test_a_page_shows_the_numbers_of_its_json_and_of_the_run(tmp_path: Path) -> None:
    plan = {
        "steps": 3, "tokens": 3 * TOKENS, "seconds": 0.5, "tokens_per_second": 2000.0, "memory_bytes": 5e8,
        "disk_bytes": {"checkpoints": 1000}, "dollars": 1.0, "dollars_per_gpu_hour": 36.0, "flops_per_token": 10.0,
        "sources": [
            {"name": "prose", "share": 2 / 3, "tokens": 512, "prepared_tokens": 400, "epochs": 1.5, "max_epochs": 9.0},
            {"name": "notes", "share": 1 / 3, "tokens": 256, "prepared_tokens": 900, "epochs": 0.25, "max_epochs": 9.0},
        ],
    }  # fmt: skip
    run = fake_run(tmp_path / "one", launches=[{"exit_code": 0, "ended": BEGAN + 60, "processes": 2, "plan": plan}])
    checkpointed(run, 3, 1.0)
    validated(run, {0: 4.0, 3: 2.0})
    content, page = report(run)
    stage = content["stages"][0]
    assert stage["state"] == "done" and stage["parameters"] == 6
    got, asked = stage["happened"], stage["asked"]
    assert (got["tokens"], got["steps"], got["seconds"], got["wall_seconds"]) == (3 * TOKENS, 3, 0.75, 60.0)
    assert got["dollars"] == pytest.approx(60 / 3600 * 36 * 2) and got["flops"] == 10 * 3 * TOKENS
    assert (asked["seconds"], asked["checkpoint_bytes"], asked["dollars"]) == (0.5, 1000, 1.0)
    data = {source["name"]: source for source in stage["data"]}
    assert data["prose"]["epochs"] == pytest.approx(1.5 * 576 / 512) and data["prose"]["share_read"] == 0.75
    assert data["notes"]["epochs"] == pytest.approx(0.25 * 192 / 256)
    assert stage["validation"]["notes"]["loss"] == {"first": 4.4, "last": 2.2, "step": 3}
    shown = Cells(page).found
    assert shown["one", "tokens"] == f"{got['tokens']:,}" == "768"
    assert shown["one", "steps"] == "3" and shown["one", "seconds"] == "1s" and shown["one", "wall_seconds"] == "1m 00s"
    assert shown["one", "tokens_per_second"] == "1k" and shown["one", "memory_bytes"] == "1 GB"
    assert shown["one", "dollars"] == "$1.20"
    assert "of 0s: 150%" in page and "4.0000 → 2.0000" in page and "75.0%" in page and ">1.69<" in page
    assert kinds(content) == ["repeats"] and "prose was read 1.69 times (9 allowed)" in content["noticed"][0]["text"]


def test_stages_continue_each_other_on_the_axis_by_path_or_by_hash_and_a_teacher_begins_at_0(tmp_path: Path) -> None:
    teacher = fake_run(tmp_path / "teacher", losses=[5.0] * 7)
    one = fake_run(tmp_path / "one")
    first = checkpointed(one, 3, 1.0)
    start = {"model": {"init_from": str(one / "final")}}
    two = fake_run(tmp_path / "two", losses=[2.0] * 5, table=start)
    content, _ = report(teacher, one, two, output=tmp_path / "out")
    assert [(s["name"], s["offset_tokens"]) for s in content["stages"]] == [
        ("teacher", 0), ("one", 0), ("two", 3 * TOKENS),
    ]  # fmt: skip
    assert content["title"] == "two" and content["together"]["tokens"] == 15 * TOKENS

    elsewhere = {"model": {"init_from": "gone/from/here"}}
    hashed = fake_run(
        tmp_path / "hashed", table=elsewhere, inputs={"init_from": stated_fingerprint(first)}, losses=[2.0]
    )
    other = fake_run(tmp_path / "other", table=elsewhere, inputs={"init_from": "0" * 64}, losses=[2.0])
    content, _ = report(one, hashed, other, output=tmp_path / "out")
    assert [s["offset_tokens"] for s in content["stages"]] == [0, 3 * TOKENS, 0]


def test_the_report_of_a_folder_is_about_the_stage_that_no_other_was_made_from(tmp_path: Path) -> None:
    fake_run(tmp_path / "runs" / "z-first")
    checkpointed(tmp_path / "runs" / "z-first", 3, 1.0)
    start = {"model": {"init_from": str(tmp_path / "runs" / "z-first" / "final")}}
    fake_run(tmp_path / "runs" / "a-second", table=start)
    page = report_on([str(tmp_path / "runs")])
    assert page == tmp_path / "runs" / "a-second" / "report" / "report.html"
    page = report_on([str(tmp_path / "runs" / "a-second")])  # its ancestor comes along
    content = json.loads((page.parent / "report.json").read_text())
    assert [stage["name"] for stage in content["stages"]] == ["z-first", "a-second"]


def test_how_a_run_started_up_is_nowhere_to_be_seen(tmp_path: Path) -> None:
    trials = {"causal": {"milliseconds": {"cudnn": 2.27, "flash": 3.561}, "refused": {"flash2": "not installed"}}}
    launch = {
        "first_step": {"seconds": 41.2, "graphs": 3, "graphs_found": 0, "compiling_seconds": 24.4},
        "attention": {"teacher": {"choice": {"causal": "cudnn", "packed": "varlen"}, "trials": trials}},
    }
    _, page = report(fake_run(tmp_path / "one", launches=[{}, launch]))
    assert "<td>41s, 24s compiling</td>" in page
    assert "attention of the teacher: cudnn; causal: cudnn 2.27 ms, flash 3.56 ms</td>" in page


def test_a_run_that_crashed_was_killed_or_has_only_begun_still_has_a_report(tmp_path: Path) -> None:
    killed = fake_run(tmp_path / "killed", launches=[{"processes": 1}])
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    content, page = report(killed)
    assert content["stages"][0]["state"] == "interrupted" and content["stages"][0]["happened"]["steps"] == 3
    assert "killed, or the machine went down" in page and "wrote no end" in page

    failed = fake_run(tmp_path / "failed", launches=[{"exit_code": 4, "ended": BEGAN + 9, "reason": "loss nan <b>"}])
    content, page = report(failed)
    assert content["stages"][0]["state"] == "failed" and "exit code 4: loss nan &lt;b&gt;" in page

    begun = fake_run(tmp_path / "begun", losses=[], launches=[{"steps": 9, "tokens": 9 * TOKENS}])
    (begun / "metrics.jsonl").unlink()
    (begun / "samples.jsonl").unlink()
    (begun / "recipe.json").unlink()
    content, page = report(begun)
    stage = content["stages"][0]
    assert (stage["happened"]["steps"], stage["asked"]["steps"]) == (0, 9) and stage["settings"] == []
    assert content["pictures"] == [] and content["together"]["tokens"] is None and "<svg" not in page

    running = fake_run(tmp_path / "running", launches=[{}])
    lock = RunLock(running / "lock")
    content, _ = report(running)
    lock.release()
    assert content["stages"][0]["state"] == "running"

    damaged = fake_run(tmp_path / "damaged")
    (damaged / "recipe.json").write_text('{"format_version": 1, "rec')
    (damaged / "launch.json").write_bytes(b"\xff")
    (damaged / "probe.json").write_text("[]")
    (damaged / "eval" / "step-000003").mkdir(parents=True)
    (damaged / "eval" / "step-000003" / "eval.json").write_text("{}")
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write("oops\n[]\n")
    content, page = report(damaged)
    text = " ".join(entry["text"] for entry in content["noticed"])
    assert "recipe.json is damaged" in text and "launch.json cannot be read" in text and "not an evaluation" in text
    assert "2 broken lines left out" in text and "probe.json" in text
    assert content["stages"][0]["happened"]["steps"] == 3


def test_a_run_of_one_logged_step_has_pictures(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0])
    scored(run, 1, {"arc_easy": (0.25, None, 1)})
    content, page = report(run)
    names = [picture["name"] for picture in content["pictures"]]
    assert {"loss", "throughput", "eval-arc_easy"} <= set(names) and page.count("<svg") == len(names) + 1
    for name in names:
        assert (run / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_what_has_not_begun_is_an_error_and_a_path_that_is_not_there(tmp_path: Path) -> None:
    fake_run(tmp_path / "one")
    with pytest.raises(RecipeError, match="no such recipe or folder"):
        report_on([str(tmp_path / "nowhere")])
    shutil.rmtree(tmp_path / "one")
    with pytest.raises(CheaptrainError, match="no run has begun in"):
        report_on([str(tmp_path / "one.toml")])
    assert not (tmp_path / "one").exists()


def test_markup_in_prompts_samples_names_and_reasons_is_text(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>"
    run = fake_run(tmp_path / "one", launches=[{"exit_code": 1, "ended": BEGAN, "reason": evil, "host": evil}])
    table = {"samples": {"prompts": [evil]}}
    other = fake_run(tmp_path / "two", table=table, more={f"val/{evil}/bpb": [1.0, 1.0, 1.0]})
    sampled(other, [(0, evil, evil), (3, evil, f"\x1b[31m{evil}")])
    scored(other, 3, {evil.replace("/", "|"): (0.5, 0.1, 10)})
    _, page = report(run, other, output=tmp_path / "out")
    assert "<script" not in page and "\x1b" not in page
    assert page.count("&lt;script&gt;alert(&#39;x&#39;)") >= 5 and "\\x1b[31m" in page


def test_secrets_of_the_recipe_stay_out_and_other_variables_are_shown(tmp_path: Path) -> None:
    table = {"env": {"WANDB_API_KEY": "c0ffee", "HF_TOKEN": "hf_abc", "NCCL_IB_DISABLE": "1"}}
    run = fake_run(tmp_path / "one", table=table)
    content, page = report(run)
    assert content["stages"][0]["recipe"]["env"] == {
        "WANDB_API_KEY": "(not shown)", "HF_TOKEN": "(not shown)", "NCCL_IB_DISABLE": "1",
    }  # fmt: skip
    for text in (page, json.dumps(content)):
        assert "c0ffee" not in text and "hf_abc" not in text
    settings = {setting["key"]: setting for setting in content["stages"][0]["settings"]}
    assert settings["env.HF_TOKEN"]["value"] == "(not shown)" and settings["env.NCCL_IB_DISABLE"]["value"] == "1"
    assert settings["train.lr"]["value"] == 3e-3 and settings["train.lr"]["from"].startswith(str(tmp_path / "one.toml"))
    assert "train.weight_decay" not in settings  # it is as it is by default


def test_interruptions_other_processes_other_commits_and_other_batches_are_told(tmp_path: Path) -> None:
    clean, dirty = ({"commit": letter * 40, "dirty": letter == "b"} for letter in "ab")
    launches = [
        {"processes": 1, "from_step": 0, "environment": {"code": clean}},
        {"exit_code": 75, "reason": "SIGTERM: stopped", "ended": BEGAN + 130, "processes": 4, "from_step": 1,
         "environment": {"code": clean}},
        {"exit_code": 0, "ended": BEGAN + 220, "processes": 4, "from_step": 2, "environment": {"code": dirty}},
    ]  # fmt: skip
    run = fake_run(tmp_path / "one", launches=launches)
    os.utime(run / "metrics.jsonl", (BEGAN + 30, BEGAN + 30))
    content, _ = report(run)
    texts = [entry["text"] for entry in content["noticed"] if entry["kind"] != "state"]
    assert texts[0].startswith("a launch was killed, or the machine went down") and "gone on with at step 1" in texts[0]
    assert "exit code 75: SIGTERM: stopped. It was gone on with at step 2, 1m 10s later" in texts[1]
    assert texts[2] == "launches had different numbers of processes: 1, 4, 4"
    assert "in no commit" in texts[3] and "different commits: aaaaaaaaaaaa, aaaaaaaaaaaa, bbbbbbbbbbbb" in texts[4]
    # The first wrote no end, and counts until a metric was last written.
    assert content["stages"][0]["happened"]["wall_seconds"] == pytest.approx(30 + 30 + 20)


def test_time_and_tokens_are_those_of_the_lines_when_not_every_step_is_logged(tmp_path: Path) -> None:
    content, _ = report(fake_run(tmp_path / "one", losses=[3.0] * 6, log_every=10))
    assert content["stages"][0]["happened"]["seconds"] == 60 * 0.25
    assert content["stages"][0]["happened"]["tokens"] == 60 * TOKENS


def test_skipped_steps_shares_and_validation_that_got_worse_are_told(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0, None, 2.0, *[2.0] * 97])
    validated(run, {0: 4.0, 50: 2.0, 100: 2.1})
    content, _ = report(run)
    text = {entry["kind"]: entry["text"] for entry in content["noticed"]}
    assert "1 step was not finite and skipped: the weights were not touched at 2" in text["skipped"]
    assert "lowest at step 50 (2.0000) and ends at 2.1000" in text["validation"]
    assert "75.0% of what was read, and 66.7% were asked for" in " ".join(e["text"] for e in content["noticed"])
    assert content["stages"][0]["happened"]["skipped_steps"] == 1


def test_scores_carry_n_and_error_and_what_is_only_to_be_read_is_no_score(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0] * 4)
    for step, value in ((2, 0.25), (4, 0.5)):
        scored(run, step, {"arc_easy": (value, 0.125, 40)}, baseline=0.25)
    content, page = report(run)
    row = content["scores"]["rows"][0]
    assert row["cells"] == [{"value": 0.5, "stderr": 0.125, "n": 40}] and row["baseline"] == 0.25
    assert "<span>0.5000</span> <small>± 0.1250</small> <small>n = 40</small>" in page
    assert content["scores"]["columns"] == [{"stage": "one", "step": 4}]
    assert (run / "report" / "eval-arc_easy.png").is_file() and 'id="eval-arc_easy"' in page

    scored(run, 4, {"completions": (3.0, None, 1)}, shown=True, items="items.jsonl")
    content, page = report(run)
    assert content["scores"]["rows"] == [] and not (run / "report" / "eval-completions.png").exists()
    assert content["shown"][0]["written"] == [{"prompt": "The sky is", "text": "blue"}]
    assert "<dt>The sky is</dt><dd>blue</dd>" in page


def card(run: Path, step: int) -> str:
    recipe = load_recipe(run.parent / f"{run.name}.toml").recipe
    return model_card(
        CardFacts(run.name, recipe, RunDirectory(run), step, 20, step * TOKENS, step, {}, "Tiny", 6, 64, 400)
    )


def test_scores_of_weights_that_another_training_replaced_are_left_out_and_named(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0] * 16)
    checkpointed(run, 8, 1.0, final=False)
    checkpointed(run, 12, 1.0, final=False)
    for step, value in ((4, 0.125), (8, 0.25), (12, 0.75)):
        scored(run, step, {"arc_easy": (value, 0.125, 40)})
    shutil.rmtree(run / "checkpoints" / "step-000012")
    assert "| arc_easy | acc | 0.2500 |" in card(run, 12) and "0.7500" not in card(run, 12)
    assert "model-index" not in card(run, 12)
    checkpointed(run, 12, 2.0, final=False)  # the same step with other weights
    assert "## Scores, at step 8" in card(run, 16) and "0.7500" not in card(run, 16)
    holding, stale = holding_evaluations(RunDirectory(run))
    assert [[one.checkpoint.step for one in part] for part in (holding, stale)] == [[4, 8], [12]]
    content, page = report(run)
    assert content["scores"]["columns"] == [{"stage": "one", "step": 8}] and "0.7500" not in page
    (told,) = [entry["text"] for entry in content["noticed"] if "scores of other weights" in entry["text"]]
    assert str(run / "eval" / "step-000012") in told
    scored(run, 12, {"arc_easy": (0.5, 0.125, 40)})
    content, _ = report(run)
    assert content["scores"]["rows"][0]["cells"][0]["value"] == 0.5 and kinds(content).count("state") == 1


def test_a_card_says_shots_and_limit_and_leaves_out_what_is_no_score(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0] * 4)
    scored(run, 2, {"arc_easy": (0.25, 0.125, 40)}, settings={"shots": 5, "limit": 40})
    scored(run, 2, {"completions": (3.0, None, 1)}, shown=True, items="items.jsonl", add=True)
    scored(run, 3, {"completions": (3.0, None, 1)}, shown=True, items="items.jsonl")
    assert "| arc_easy | acc | 0.2500 | 0.1250 | 40 | 5 | first 40 | lm-eval 0.4.13 |" in card(run, 4)
    assert "completions" not in card(run, 4) and "## Scores, at step 2" in card(run, 4)


def test_what_was_asked_in_several_ways_stands_in_a_row_and_a_picture_for_each(tmp_path: Path) -> None:
    one = fake_run(tmp_path / "one", losses=[3.0] * 4)
    two = fake_run(tmp_path / "two", losses=[3.0] * 4)
    scored(one, 2, {"boolq": (0.125, 0.125, 40)})
    scored(one, 4, {"boolq": (0.25, 0.125, 40)}, settings={"shots": 5}, baseline=0.5, notes=("cut",))
    scored(one, 4, {"boolq": (0.375, 0.125, 9)}, settings={"limit": 9}, add=True)
    scored(two, 4, {"boolq": (0.5, 0.125, 40)})
    scored(two, 4, {"boolq": (0.625, 0.125, 9)}, settings={"limit": 9, "chat_template": True}, add=True)
    content, page = report(one, two, output=tmp_path / "out")
    rows = {
        (row["shots"], row["limit"], row["asked"]): [cell and cell["value"] for cell in row["cells"]]
        for row in content["scores"]["rows"]
    }
    assert rows == {
        (5, None, ""): [0.25, None],
        (0, None, ""): [None, 0.5],
        (0, 9, ""): [0.375, None],
        (0, 9, "in the chat template"): [None, 0.625],
    }
    five = next(row for row in content["scores"]["rows"] if row["shots"] == 5)
    assert (five["baseline"], five["notes"]) == (0.5, ["one: cut"]) and page.count("first 9<") == 2
    assert [row["baseline"] for row in content["scores"]["rows"] if row["shots"] == 0] == [None] * 3
    assert len({picture["file"] for picture in content["pictures"]}) == len(content["pictures"])
    captions = sorted(p["caption"].split(", higher")[0] for p in content["pictures"] if p["name"].startswith("eval-"))
    assert captions == [
        "n = 40, 0-shot", "n = 40, 5-shot", "n = 9, 0-shot, first 9 questions",
        "n = 9, 0-shot, first 9 questions, in the chat template",
    ]  # fmt: skip


def test_groups_whose_members_differ_in_their_limits_are_told_apart_by_their_questions(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", losses=[3.0] * 4)
    scored(run, 4, {"core": (0.25, None, 90)}, members=("a", "b"))
    scored(run, 4, {"core": (0.5, None, 30)}, members=("a", "b"), add=True)
    scored(run, 4, {"core": (0.75, None, 900)}, members=("a", "b"), settings={"limit": None}, add=True)
    content, _ = report(run)
    rows = [(row["limited"], row["cells"][0]["value"]) for row in content["scores"]["rows"]]
    assert rows == [(None, 0.75), ("90, limits differ", 0.25), ("30, limits differ", 0.5)]


def test_the_cost_is_that_of_the_processes_of_each_launch(tmp_path: Path) -> None:
    plan = {"dollars_per_gpu_hour": 36.0}
    launches = [
        {"exit_code": 75, "ended": BEGAN + 60, "processes": 8, "plan": plan},
        {"exit_code": 0, "ended": BEGAN + 120, "processes": 1},
    ]
    content, _ = report(fake_run(tmp_path / "one", launches=launches))
    got = content["stages"][0]["happened"]
    assert got["wall_seconds"] == 80 and got["dollars"] == pytest.approx((60 * 8 + 20) / 3600 * 36)


def test_every_task_that_was_scored_while_training_is_drawn(tmp_path: Path) -> None:
    more = {f"eval/t{number}{what}": [0.5] * 3 for number in range(19) for what in ("", "/n", "/stderr")}
    (account,) = accounts_of(fake_run(tmp_path / "one", more=more))
    drawn = [picture for picture in score_pictures([account], []) if picture.name.startswith("scores-while")]
    assert [picture.name[22:] for picture in drawn] == ["", "2", "3"]
    assert [len(picture.curves) for picture in drawn] == [8, 8, 3]
    assert {curve.label for picture in drawn for curve in picture.curves} == {f"t{number}" for number in range(19)}
    assert max(curve.colour for picture in drawn for curve in picture.curves) == 7


def test_sums_have_an_interval_where_none_or_nearly_all_are_right(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one")
    marks = {"asked": 100, "ended": 100, "question": "What is 1 plus 1?", "answer": "#### 2"}
    (run / "probe.json").write_text(json.dumps({"before": marks | {"right": 0}, "after": marks | {"right": 85}}))
    content, page = report(run)
    before, after = (content["stages"][0]["marks"][when] for when in ("before", "after"))
    assert (before["low"], before["high"]) == (0.0, pytest.approx(0.0370, abs=1e-4))
    assert (after["low"], after["high"]) == (pytest.approx(0.7672, abs=1e-4), pytest.approx(0.9069, abs=1e-4))
    assert Cells(page).found["one", "right"] == "85.0%"


def test_samples_are_those_before_anything_was_learned_and_those_after_each_stage(tmp_path: Path) -> None:
    one = fake_run(tmp_path / "one")
    checkpointed(one, 3, 1.0)
    two = fake_run(tmp_path / "two", table={"model": {"init_from": str(one / "final")}})
    sampled(one, [(0, "Hello", "a"), (2, "Hello", "b"), (3, "Hello", "c")])
    sampled(two, [(0, "Hello", "c"), (3, "Hello", "\n\nd\n"), (3, "Only here", "e")])
    content, page = report(one, two)
    hello, only = content["prompts"]
    assert [(w["stage"], w["step"], w["text"]) for w in hello["written"]] == [
        ("one", 0, "a"), ("one", 3, "c"), ("two", 3, "\n\nd\n"),
    ]  # fmt: skip
    assert [w["text"] for w in only["written"]] == ["e"] and "<dd>⏎⏎d⏎</dd>" in page


def test_pictures_of_an_earlier_report_go_and_files_of_others_stay(tmp_path: Path) -> None:
    run = fake_run(tmp_path / "one", more={"kd/loss": [1.0, 0.5, 0.4]})
    report(run)
    assert (run / "report" / "distillation-loss.png").is_file()
    text = (run / "metrics.jsonl").read_text().replace("kd/loss", "other")
    (run / "metrics.jsonl").write_text(text)
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "photo.png").write_bytes(b"x")
    report(run)
    assert not (run / "report" / "distillation-loss.png").exists() and (run / "report" / "loss.png").is_file()
    report(run, output=mine)
    assert (mine / "photo.png").read_bytes() == b"x"


def test_a_report_that_cannot_be_written_is_a_warning_at_the_end_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = fake_run(tmp_path / "one")
    (run / "report").write_text("a file where the folder would be")
    told: list[str] = []
    assert report_at_the_end(subjects_of([str(run)]), told.append) is None
    assert len(told) == 1 and "no report: " in told[0] and f"cheaptrain report {run}" in told[0]
    with pytest.raises(CheaptrainError, match="--output"):
        report_on([str(run)])

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("somewhere")

    monkeypatch.setattr(write, "report_content", broken)
    assert report_at_the_end(subjects_of([str(run)]), told.append) is None
    assert "ZeroDivisionError: somewhere" in told[1]


def test_a_long_run_gives_a_small_page_that_keeps_the_one_spike(tmp_path: Path) -> None:
    count = 20_000
    noise = 2 + 0.05 * np.random.default_rng(0).standard_normal(count)
    noise[12_345] = 9.0
    run = fake_run(tmp_path / "one", losses=noise.tolist())
    content, page = report(run)
    assert len(page) < 500_000
    spikes = [entry["text"] for entry in content["noticed"] if entry["kind"] == "spike"]
    assert len(spikes) == 1 and spikes[0].startswith("loss 9.000 at step 12,346, where 1.995 was usual")
    x, y = thinned(np.arange(count), noise)
    assert len(x) <= 482 and y.max() == 9.0 and x[y.argmax()] == 12_345 and y.min() == noise.min()
    assert (x[0], x[-1]) == (0, count - 1) and (np.diff(x) > 0).all()
