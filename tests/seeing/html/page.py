"""What is to be seen of a page in a browser."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, TypeAlias

from qpass.seeing.diff import Diff
from qpass.seeing.report import Report

CSS = "css selector"
#: Keys, as WebDriver names them.
ENTER, ESCAPE, LEFT = "\ue007", "\ue00c", "\ue012"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

Open: TypeAlias = "Callable[[Diff | Report], Page]"


class Page:
    """What is to be seen of a page."""

    def __init__(self, chrome: Any) -> None:
        self.chrome = chrome

    def all(self, css: str) -> list[Any]:
        return self.chrome.find_elements(CSS, css)

    def one(self, css: str) -> Any:
        (found,) = self.all(css)
        return found

    def texts(self, css: str) -> list[str]:
        return [e.get_property("textContent") for e in self.all(css)]

    def row(self, path: str) -> Any:
        """The row with this path."""
        (found,) = (r for r in self.all(".row") if [path] == [e.text for e in r.find_elements(CSS, ".path")])
        return found

    def press(self, *keys: str) -> None:
        for key in keys:
            self.chrome.switch_to.active_element.send_keys(key)

    def search(self, text: str) -> None:
        """Types, and waits for the page to have taken notice."""
        field = self.one("#search")
        field.clear()
        field.send_keys(text)
        self.wait(lambda: self.chrome.execute_script("return state.query") == text.lower())

    def wait(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 5
        while not condition():
            assert time.monotonic() < end, "the page took no notice"
            time.sleep(0.02)

    @property
    def selected(self) -> Any:
        return self.one('[aria-selected="true"]')
