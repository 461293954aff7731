"""What rich would print, as text."""

from __future__ import annotations

from io import StringIO
from typing import Any


def printed(renderable: Any) -> str:
    """The text of an object with `__rich__`, without colours, 200 columns wide."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200).print(renderable, highlight=False, markup=False)
    return out.getvalue().rstrip()
