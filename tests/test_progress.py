"""Progress is for those who look: nothing in a pipe, nothing for what is short, rate and time left for what is long."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import qpass.progress
from qpass.progress import track, working


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@contextmanager
def looking(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> Iterator[io.StringIO]:
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(qpass.progress.sys, "stderr", stream)
    monkeypatch.setattr(qpass.progress, "PATIENCE", 0.1)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    yield stream


def slow(count: int) -> Iterator[int]:
    for i in range(count):
        time.sleep(0.15)
        yield i


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_long_work_is_shown_in_a_terminal_only(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    with looking(monkeypatch, terminal) as shown:
        assert list(track([1, 2, 3, 4], "counting")) == [1, 2, 3, 4]
        assert not shown.getvalue(), "short work is quiet"
        for _ in track([1, 2, 3, 4], "counting"):
            time.sleep(0.2)
        with working("waiting"):
            time.sleep(0.3)
    text = shown.getvalue()
    assert ("counting" in text) == ("waiting" in text) == terminal
    assert ("/4" in text and ("/s" in text or "s each" in text)) == terminal
    assert ("0:00:0" in text) == terminal, "the time that is left"


def test_an_item_that_takes_long_shows_before_it_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    with looking(monkeypatch, True) as shown:
        for _ in track([1], "one long item"):
            time.sleep(0.4)
            assert "one long item" in shown.getvalue()


def test_one_within_another(monkeypatch: pytest.MonkeyPatch) -> None:
    with looking(monkeypatch, True) as shown:
        for _ in track([1, 2], "outer"):
            for _ in track(list(slow(2)), "inner"):
                time.sleep(0.1)
    assert "outer" in shown.getvalue()
    assert "inner" in shown.getvalue()


def test_an_error_ends_the_display(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        for _ in track([1, 2], "failing"):
            time.sleep(0.2)
            raise RuntimeError

    with looking(monkeypatch, True) as shown:
        with pytest.raises(RuntimeError):
            fails()
        before = shown.getvalue()
        assert "failing" in before
        time.sleep(0.3)
        assert shown.getvalue() == before
