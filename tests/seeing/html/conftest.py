"""The pages in a real browser, headless, as a person sees them. Skipped where there is none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qpass.seeing.diff import Diff
from qpass.seeing.report import Report
from tests.seeing.html.page import Open, Page

_FLAGS = (
    "headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
    "disable-component-update", "disable-sync", "window-size=1400,900",
)  # fmt: skip


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no Chromium with its chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (*_FLAGS, f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def show(chrome: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a page from a file. At the end: it logged nothing, asked for nothing, and no name of a model has run."""

    def load(what: Diff | Report) -> Page:
        path = tmp_path / "page.html"
        what.to_html(path)
        chrome.get_log("browser"), chrome.get_log("performance")
        chrome.get(path.as_uri())
        return Page(chrome)

    yield load
    assert chrome.get_log("browser") == []
    assert [url for url in _asked_for(chrome) if not url.startswith("file://")] == []
    assert chrome.execute_script("return window.hacked") is None


def _asked_for(chrome: Any) -> list[str]:
    """What the page asked for; not what the browser's own start page did."""
    messages = [json.loads(line["message"])["message"] for line in chrome.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return [p["request"]["url"] for p in sent if not p.get("documentURL", "").startswith("chrome://")]
