"""Progress of work that takes longer than a moment: on stderr, in terminals and notebooks; anywhere else it is quiet."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")
#: Seconds before anything is shown: short work stays quiet.
PATIENCE = 1.0


def track(items: Iterable[T], label: str) -> Iterator[T]:
    """Yield `items`; after a moment show how many are done, how many a second, and the time left."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    total = len(items) if isinstance(items, Sized) else None
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(),
    )
    bar = Progress(TextColumn("{task.description}", markup=False), *columns, console=_console(), transient=True)
    task = bar.add_task(label, total=total, rate="")
    with _after_a_moment(bar.start, bar.stop):
        for item in items:
            yield item
            bar.advance(task)
            speed = bar.tasks[0].speed
            bar.update(task, rate="" if not speed else f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each")


@contextmanager
def working(label: str) -> Iterator[None]:
    """Say, after a moment, that something is going on whose end is not known."""
    from rich.text import Text

    status = _console().status(Text(label))
    with _after_a_moment(status.start, status.stop):
        yield


def _console() -> Any:
    """One for all that is shown at a time: rich puts displays of the same console below each other."""
    return _console_on(sys.stderr)


@lru_cache(maxsize=1)
def _console_on(stream: Any) -> Any:
    from rich.console import Console

    return Console(file=stream, markup=False, emoji=False)


@contextmanager
def _after_a_moment(start: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    """Start a display once PATIENCE is over, if the work still goes on then and somebody looks; stop it at the end."""
    console = _console()
    if not (console.is_terminal or console.is_jupyter):
        yield
        return
    lock, over = threading.Lock(), False

    def show() -> None:
        with lock:
            if not over:
                start()

    timer = threading.Timer(PATIENCE, show)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        with lock:
            over = True
        stop()
