"""The page of a report in a real browser: pictures that are not drawn, text wider than a phone, requests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsing import MARKUP, NEEDS_BROWSER, chromium
from fake_runs import BEGAN, checkpointed, fake_run, sampled, scored, validated

from cheaptrain.report.write import report_on

selenium = pytest.importorskip("selenium")

from selenium.webdriver.common.by import By  # noqa: E402

pytestmark = NEEDS_BROWSER

LONG = "a_word_without_a_place_to_break_" * 8


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of three stages with everything in it, and texts that are too long or are markup."""
    folder = tmp_path_factory.mktemp("page")
    noise = np.random.default_rng(0).standard_normal((3, 200)) / 20
    losses = [(3 - stage + 2 * np.exp(-np.arange(200) / 20) + noise[stage]).tolist() for stage in range(3)]
    environment = {
        "cheaptrain": "0.1.0", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "device": "AMD EPYC", "gpus": 0,
        "cpus": 2, "memory_bytes": 2e10, "system": LONG, "code": {"commit": "a" * 40, "dirty": True}, "folder": None,
    }  # fmt: skip
    launches = [{"processes": 2}, {"exit_code": 0, "ended": BEGAN + 160, "processes": 2, "environment": environment}]
    agreement = {"kd/loss": losses[0], "kd/agreement": [0.5] * 200}
    runs = [fake_run(folder / "teacher", losses=losses[2]), fake_run(folder / "one", losses=losses[0])]
    checkpointed(runs[1], 200, 1.0)
    two = {"model": {"init_from": str(runs[1] / "final")}}
    runs.append(fake_run(folder / "two", losses=losses[1], table=two, launches=launches, more=agreement))
    checkpointed(runs[2], 200, 2.0)
    for run, last in zip(runs, (2.0, 3.0, 2.5), strict=True):
        validated(run, {0: 5.0, 100: last + 0.5, 200: last})
        sampled(run, [(0, MARKUP, LONG), (200, MARKUP, MARKUP), (200, LONG, "\n\n")])
    for step in (100, 200):
        scored(runs[2], step, {"arc_easy": (step / 400, 0.1, 40), LONG: (0.5, None, 1)}, baseline=0.25)
    marks = {"asked": 100, "ended": 100, "right": 50, "question": MARKUP, "answer": LONG}
    (runs[2] / "probe.json").write_text(json.dumps({"before": None, "after": marks}))
    return report_on([str(run) for run in runs])


def opened(browser: Any, page: Path, width: int, *, dark: bool = False) -> Any:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri())
    return browser


def test_every_picture_is_drawn_and_no_script_or_request_is_there(browser: Any, page: Path) -> None:
    shown = opened(browser, page, 1200)
    assert shown.title == "two – cheaptrain report"
    assert shown.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in shown.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert shown.find_elements(By.CSS_SELECTOR, "script, img, iframe, link[rel=stylesheet]") == []
    headings = [heading.text for heading in shown.find_elements(By.CSS_SELECTOR, "h2")]
    assert headings == [
        "What to look at", "Stages: asked and happened", "Curves", "Scores", "Sums it has never seen",
        "Samples, before and after", "Data that was read", "Recipe", "Environment and launches",
    ]  # fmt: skip
    content = json.loads((page.parent / "report.json").read_text())
    names = [picture["name"] for picture in content["pictures"]]
    assert [figure.get_attribute("id") for figure in shown.find_elements(By.TAG_NAME, "figure")] == names
    drawings = [svg for svg in shown.find_elements(By.CSS_SELECTOR, "figure svg") if svg.is_displayed()]
    assert len(drawings) == len(names) >= 11
    for svg in drawings:
        assert svg.rect["width"] > 300 and svg.rect["height"] > 150
        assert len(svg.find_elements(By.CSS_SELECTOR, "path")) > 5
    for name in names:
        loaded = """const image = new Image(); image.src = arguments[0];
            return image.decode().then(() => [image.naturalWidth, image.naturalHeight])"""
        width, height = shown.execute_script(loaded, (page.parent / f"{name}.png").as_uri())
        assert width > 600 and height > 350
    assert shown.title == "two – cheaptrain report"  # whatever samples say


def test_numbers_of_tables_are_those_of_report_json(browser: Any, page: Path) -> None:
    shown = opened(browser, page, 1200)
    stages = json.loads((page.parent / "report.json").read_text())["stages"]
    for stage in stages:
        row = f"tr[data-stage='{stage['name']}'] td[data-key='%s'] > span"
        assert shown.find_element(By.CSS_SELECTOR, row % "tokens").text == f"{stage['happened']['tokens']:,}"
        assert shown.find_element(By.CSS_SELECTOR, row % "steps").text == f"{stage['happened']['steps']:,}"
        both = stage["validation"]["all"]["loss"]
        cell = shown.find_element(By.CSS_SELECTOR, f"tr[data-stage='{stage['name']}'] td[data-key='val-loss']").text
        assert cell == f"{both['first']:.4f} → {both['last']:.4f}"
        for source in stage["data"]:
            place = f"tr[data-stage='{stage['name']}'][data-source='{source['name']}'] td[data-key='tokens']"
            assert shown.find_element(By.CSS_SELECTOR, place).text == f"{source['tokens']:,}"
    score = shown.find_element(By.CSS_SELECTOR, "tr[data-task='arc_easy']").text
    assert "0.5000 ± 0.1000 n = 40" in score and score.endswith("0.25")


@pytest.mark.parametrize("width", [390, 768, 1200])
def test_nothing_is_wider_than_the_screen_and_nothing_is_cut(browser: Any, page: Path, width: int) -> None:
    shown = opened(browser, page, width)
    whole, seen = "document.documentElement.scrollWidth", "document.documentElement.clientWidth"
    assert shown.execute_script(f"return {whole} - {seen}") == 0
    wider = """return [...document.querySelectorAll('main *')].filter((e) =>
        e.getBoundingClientRect().right > innerWidth + 1 && !e.closest('.scroll') && !e.closest('svg')).length"""
    assert shown.execute_script(wider) == 0
    fits = "return [...document.querySelectorAll('.scroll')].every((e) => getComputedStyle(e).overflowX == 'auto')"
    assert shown.execute_script(fits)


def test_pictures_follow_light_and_dark(browser: Any, page: Path) -> None:
    colours = []
    for dark in (False, True):
        shown = opened(browser, page, 1200, dark=dark)
        colours.append(
            shown.execute_script(
                """const line = document.querySelector('#validation svg path[style*="--c1"]');
                const text = document.querySelector('#validation svg text');
                return [getComputedStyle(line).stroke, getComputedStyle(text).fill,
                        getComputedStyle(document.body).backgroundColor]"""
            )
        )
    assert all(light != dark for light, dark in zip(*colours, strict=True))
    assert colours[0][0] == "rgb(213, 94, 0)"
