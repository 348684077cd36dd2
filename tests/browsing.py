"""Headless Chromium for the tests of pages; they are skipped where it is not."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
NEEDS_BROWSER = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no chromium and chromedriver on this machine")

MARKUP = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


@contextmanager
def chromium(*arguments: str, preferences: Mapping[str, Any] | None = None) -> Iterator[Any]:
    """A browser that keeps what pages log and what they ask for."""
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(BROWSER)
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", *arguments):
        options.add_argument(argument)
    if preferences:
        options.add_experimental_option("prefs", dict(preferences))
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with Chrome(options=options, service=Service(str(DRIVER))) as driver:
        yield driver
