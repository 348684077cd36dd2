"""The shipped quickstart learns what it learnt when its curve was recorded."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from golden.record_quickstart import GOLDEN, RECIPES, STAGES, curve, prepare_sft, prepared_phase1
from small_runs import run_child

# Matrix products add in another order on another processor or with other threads; a wrong batch, mask, rate or weight
# moves the loss by far more than this within a few steps.
TOLERANCE = 0.01
STEPS = 25
ONE_THREAD = "train.cpu_threads=1"  # more do not survive a fork


def _golden_or_skip(folder: Path) -> dict[str, Any]:
    """The golden file, if the text here is the text it was recorded on: it comes from the installed packages."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    os.chdir(folder)
    _, data = prepared_phase1()
    if data != golden["data"]:
        pytest.skip("the installed packages are not those of constraints.txt, so the quickstart's text is another")
    return golden


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quickstart_follows_its_golden_curve_from_the_first_step(folder: Path) -> None:
    golden = _golden_or_skip(folder)

    def work() -> None:
        from cheaptrain.train import loop
        from cheaptrain.train.chain import run_chain

        plain, done = loop.train_step, [0]

        def counted(*arguments: Any, **rest: Any) -> Any:
            done[0] += 1
            if done[0] > STEPS:
                os._exit(0)
            return plain(*arguments, **rest)

        loop.train_step = counted
        run_chain([str(RECIPES["phase1"])], [ONE_THREAD])

    assert run_child(work, folder / "log") == 0, (folder / "log").read_text()[-3000:]
    ours = curve(Path("outputs/quickstart/phase1"))
    expected = golden["phase1"]["train/loss"][:STEPS]
    assert [step for step, _ in ours["train/loss"]] == list(range(1, STEPS + 1))
    assert [loss for _, loss in ours["train/loss"]] == pytest.approx([loss for _, loss in expected], abs=TOLERANCE)
    assert ours["val/loss"][0][1] == pytest.approx(golden["phase1"]["val/loss"][0][1], abs=TOLERANCE)


@pytest.mark.slow
def test_quickstart_ends_where_it_ended(folder: Path) -> None:
    golden = _golden_or_skip(folder)
    prepare_sft()

    def work() -> None:
        from cheaptrain.train.chain import run_chain

        run_chain([str(path) for path in RECIPES.values()], [ONE_THREAD])

    assert run_child(work, folder / "log") == 0, (folder / "log").read_text()[-3000:]
    for stage in STAGES:
        ours = curve(Path("outputs/quickstart") / stage)
        assert [step for step, _ in ours["train/loss"]] == [step for step, _ in golden[stage]["train/loss"]]
        for key in ("val/loss", "val/bpb"):
            assert [value for _, value in ours[key]] == pytest.approx([v for _, v in golden[stage][key]], abs=0.03)
    before, after = (json.loads(Path(f"outputs/quickstart/{stage}/probe.json").read_text()) for stage in STAGES[-2:])
    assert before["before"]["right"] <= 5 and before["before"]["ended"] <= 20
    assert after["after"]["right"] >= 80 and after["after"]["ended"] >= 95
