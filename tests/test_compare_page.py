"""The page of a comparison in a real browser: requests that leave the machine, names that are run, numbers that are not
those of the JSON."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import MARKUP, NEEDS_BROWSER, chromium
from compared_runs import answers, make_run, recipe_of, score

from cheaptrain.compare.comparison import compare, write

selenium = pytest.importorskip("selenium")

from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two conditions of two seeds and a third run; tasks that are better, worse, the same, and called like markup."""
    folder, runs = tmp_path_factory.mktemp("compared"), []
    wins = {"plain": (0.3, 0.7, 0.5), "taught": (0.9, 0.2, 0.5)}
    for condition, chances in wins.items():
        for seed in (1, 2):
            run = folder / f"{condition}-seed{seed}"
            loss = (3.0 if condition == "plain" else 2.7) + seed / 100
            make_run(run, seed=seed, loss=loss, recipe=recipe_of(run, seed, lr=3e-4 if condition == "plain" else 6e-4))
            for step in (20, 40):
                names = zip(("won", "lost", MARKUP[:40].replace("/", "_")), chances, strict=True)
                score(run, step, {task: answers(chance, 7 * seed) for task, chance in names})
            runs.append(str(run))
    odd = make_run(folder / MARKUP.replace("/", "_"), loss=2.0, tokenizer="b" * 64)
    return write(compare([*runs, str(odd)]), folder / "out")


def opened(browser: Any, page: Path, width: int) -> Any:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    )
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    return browser


def test_the_page_stands_alone_and_runs_nothing(browser: Any, page: Path) -> None:
    opened(browser, page, 1200)
    assert browser.title.endswith("cheaptrain compare")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [page.as_uri()]
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    assert page.stat().st_size < 1_500_000


@pytest.mark.parametrize("width", [1200, 390])
def test_nothing_is_wider_than_the_screen(browser: Any, page: Path, width: int) -> None:
    opened(browser, page, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_headings_pictures_and_numbers_are_those_of_the_json(browser: Any, page: Path) -> None:
    opened(browser, page, 1200)
    content = json.loads((page.parent / "compare.json").read_text(encoding="utf-8"))
    headings = [element.text for element in browser.find_elements(By.TAG_NAME, "h2")]
    assert headings[0] == "taught against plain"
    assert headings[2:] == ["Curves", "What differs in the recipes", "Runs", "How this was reckoned"]
    widths = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map((s) => s.getBoundingClientRect().width)"
    )
    assert len(widths) >= 4 and min(widths) > 200
    for section, pair in zip(browser.find_elements(By.CSS_SELECTOR, "section.pair"), content["pairs"], strict=True):
        rows = section.find_elements(By.CSS_SELECTOR, "tr[data-task]")
        compared = [entry for entry in (*pair["tasks"], *pair["held_out"]) if entry["outcome"] != "one side alone"]
        assert [row.get_attribute("data-task") for row in rows] == [entry["task"] for entry in compared]
        for row, entry in zip(rows, compared, strict=True):
            assert row.find_element(By.CSS_SELECTOR, ".outcome").text.startswith(entry["outcome"])
            if entry["estimate"]:
                shown = row.find_element(By.CSS_SELECTOR, "[data-key=difference]").text.replace("−", "-")
                assert float(shown) == pytest.approx(entry["estimate"]["difference"] * entry["scale"], abs=0.06)
        verdicts = [element.text for element in section.find_elements(By.CSS_SELECTOR, ".verdicts li > span")]
        assert verdicts == [entry["verdict"] for entry in compared]  # one source, so one held-out text
    assert [entry["outcome"] for entry in content["pairs"][0]["tasks"]] == ["better", "worse", "no difference shown"]


def test_an_interval_that_is_better_is_drawn_to_the_right_of_zero(browser: Any, page: Path) -> None:
    opened(browser, page, 1200)
    for task, right in (("won", True), ("lost", False), ("held-out text", True)):  # a loss that fell
        drawn = browser.find_element(By.CSS_SELECTOR, f"tr[data-task='{task}'] svg")
        zero = drawn.find_element(By.CSS_SELECTOR, ".zero").rect["x"]
        middle = drawn.find_element(By.TAG_NAME, "circle").rect["x"]
        assert (middle > zero + 20) if right else (middle < zero - 20)
