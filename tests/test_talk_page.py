"""The page in a real browser: markup in an answer that is run, requests that leave the machine, columns mixed up."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from browsing import MARKUP, NEEDS_BROWSER, chromium
from talk_servers import running
from talkers import END, save_talker

from cheaptrain.talk.server import make_app
from cheaptrain.talk.talker import load_talker

torch.set_num_threads(1)

selenium = pytest.importorskip("selenium")

from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.wait import WebDriverWait  # noqa: E402

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    downloads = tmp_path_factory.mktemp("downloads")
    with chromium("--window-size=1280,800", preferences={"download.default_directory": str(downloads)}) as driver:
        driver.downloads = downloads
        yield driver


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """`left` answers with MARKUP and control characters, `right` never ends."""
    folder = tmp_path_factory.mktemp("page")
    left = load_talker("left", save_talker(folder / "left", [MARKUP, "\x1b[31m", " é", END]))
    right = load_talker("right", save_talker(folder / "right", ["on", " and"], positions=100_000))
    with running(make_app([left, right])) as server:
        yield f"http://127.0.0.1:{server.port}"


def opened(browser: Any, address: str) -> Any:
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(address)
    until(browser, lambda: len(browser.find_elements(By.CSS_SELECTOR, "main > section")) == 2)
    return browser


def until(browser: Any, what: Callable[[], Any]) -> None:
    WebDriverWait(browser, 60, poll_frequency=0.02).until(lambda _: what())


def texts(browser: Any, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    return list(browser.execute_script(script, selector))


def write(browser: Any, name: str, text: str) -> None:
    field = browser.find_element(By.ID, name)
    field.clear()
    field.send_keys(text)


def send(browser: Any, text: str, limit: int) -> None:
    write(browser, "limit", str(limit))
    write(browser, "temperature", "0")
    write(browser, "text", text + Keys.ENTER)


def done(browser: Any) -> bool:
    return not browser.find_element(By.ID, "send").get_property("disabled")


def test_answers_stand_in_their_columns_and_their_markup_is_text(browser: Any, address: str, tmp_path: Path) -> None:
    page = opened(browser, address)
    write(page, "system", "Be <b>brief</b>.")
    send(page, "<i>hi</i>", 20)
    until(page, lambda: len(texts(page, ".note")) == 2)
    assert page.title == "left | right – cheaptrain"
    assert texts(page, "section:nth-of-type(1) .assistant") == [MARKUP + "\\x1b[31m é"]
    assert texts(page, "section:nth-of-type(2) .assistant") == ["on" + " and" * 19]
    assert texts(page, ".user") == ["<i>hi</i>"] * 2
    assert page.find_elements(By.CSS_SELECTOR, "main script, main img, main i, main b") == []
    notes = texts(page, ".note")
    assert notes[0].startswith("ended by itself · 4 tokens · ")
    assert notes[1].startswith("cut at the limit, did not end by itself · 20 tokens · ")
    lefts = [e.rect["x"] for e in page.find_elements(By.CSS_SELECTOR, ".assistant")]
    tops = [e.rect["y"] for e in page.find_elements(By.CSS_SELECTOR, ".assistant")]
    assert lefts[0] + 500 < lefts[1] and tops[0] == tops[1]
    assert page.get_log("browser") == []  # no script refused, nothing failed to load

    page.find_element(By.ID, "save").click()
    file = browser.downloads / "conversation.json"
    until(page, file.is_file)
    saved = json.loads(file.read_text("utf-8"))["conversations"]
    assert saved[0]["messages"][1] == {"role": "assistant", "content": MARKUP + "\x1b[31m é"}
    assert [side["answers"][0]["ending"] for side in saved] == ["stop", "length"]
    assert saved[0]["answers"][0]["system"] == "Be <b>brief</b>."
    assert saved[0]["answers"][0]["seed"] == saved[1]["answers"][0]["seed"]


def test_an_answer_streams_in_and_escape_stops_it(browser: Any, address: str) -> None:
    page = opened(browser, address)
    send(page, "go on", 90_000)
    grown: list[int] = []

    def growing() -> bool:
        grown.append(len("".join(texts(page, "section:nth-of-type(2) .assistant"))))
        return len({length for length in grown if length}) > 2

    until(page, growing)
    assert grown == sorted(grown)
    assert not done(page)
    page.find_element(By.ID, "text").send_keys(Keys.ESCAPE)
    until(page, lambda: done(page))
    assert texts(page, "section:nth-of-type(2) .note") == ["interrupted"]
    send(page, "and now?", 2)
    until(page, lambda: done(page) and len(texts(page, "section:nth-of-type(2) .note")) == 2)
    assert texts(page, "section:nth-of-type(2) .assistant")[1] == "on and"

    page.find_element(By.ID, "retry").click()
    until(page, lambda: done(page) and len(texts(page, "section:nth-of-type(2) .note")) == 2)
    assert texts(page, "section:nth-of-type(2) .user") == ["go on", "and now?"]
    page.find_element(By.ID, "fresh").click()
    assert texts(page, ".turn") == []


def test_old_turns_are_left_out_when_the_model_has_no_positions_for_them(browser: Any, tmp_path: Path) -> None:
    small = load_talker("small", save_talker(tmp_path / "small", ["yes", END], positions=100))
    base = load_talker("base", save_talker(tmp_path / "base", ["?", " so"], template=None))
    with running(make_app([small, base])) as server:
        page = opened(browser, f"http://127.0.0.1:{server.port}")
        assert "no chat template" in texts(page, ".hint")[1]
        for number in range(3):
            send(page, f"question {number}, please?", 3)
            until(page, lambda number=number: done(page) and len(texts(page, ".note")) == 2 * number + 2)
        assert "the 2 oldest turns no longer fit and were left out" in texts(page, "section:nth-of-type(1) .note")[-1]
        assert texts(page, "section:nth-of-type(1) .assistant") == ["yes"] * 3
        send(page, "x" * 100, 3)
        until(page, lambda: texts(page, ".note.bad"))
        assert "100 positions" in texts(page, "section:nth-of-type(1) .note.bad")[0]
        until(page, lambda: done(page))
        assert len(texts(page, "section:nth-of-type(1) .user")) == 3  # what was not asked is no part of the history


def test_no_request_leaves_this_machine(browser: Any, address: str) -> None:
    page = opened(browser, address)
    send(page, "hi", 3)
    until(page, lambda: len(texts(page, ".note")) == 2)
    page.find_element(By.ID, "theme").click()
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    assert f"{address}/v1/chat/completions" in asked
    assert [url for url in asked if not url.startswith((address, "data:,"))] == []


def test_light_and_dark_differ_and_follow_the_button(browser: Any, address: str) -> None:
    page = opened(browser, address)
    color = "return getComputedStyle(document.body).backgroundColor"
    first = page.execute_script(color)
    page.find_element(By.ID, "theme").click()
    second = page.execute_script(color)
    page.find_element(By.ID, "theme").click()
    assert first != second
    assert page.execute_script(color) == first
