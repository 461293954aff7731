"""A progress bar for work that takes longer than a moment, on stderr, in terminals and notebooks alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")
#: Seconds before a bar is shown: short work stays quiet.
PATIENCE = 1.0


def track(items: Iterable[T], label: str) -> Iterator[T]:
    """Yield `items`; after a second, show how far it is. In a log file (no terminal) one line at the end says how long."""
    from rich.console import Console
    from rich.progress import Progress

    total = len(items) if isinstance(items, Sized) else None
    start = time.monotonic()
    console = Console(file=sys.stderr)
    bar = Progress(console=console, transient=True)
    task, shown = bar.add_task(label, total=total), False
    try:
        for item in items:
            yield item
            bar.advance(task)
            if not shown and time.monotonic() - start > PATIENCE and (console.is_terminal or console.is_jupyter):
                bar.start()
                shown = True
    finally:
        if shown:
            bar.stop()
    seconds = time.monotonic() - start
    if seconds > PATIENCE and not shown:
        print(f"{label}: done in {seconds:.1f} s", file=sys.stderr)
