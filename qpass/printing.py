"""What is printed: tables as text, and plain data."""

from __future__ import annotations

import math
from io import StringIO
from typing import Any


def printed(renderable: Any) -> str:
    """The text of an object with `__rich__`, without colours, 200 columns wide."""
    from rich.console import Console

    out = StringIO()
    Console(file=out, width=200, markup=False, emoji=False, highlight=False).print(renderable)
    return out.getvalue().rstrip()


def number_table(*columns: str, words: int = 1) -> Any:
    """An empty rich table; all columns but the first `words` are numbers, flush right."""
    from rich.table import Table

    table = Table(*columns, box=None, pad_edge=False)
    for column in table.columns[words:]:
        column.justify = "right"
    return table


def finite(value: Any) -> Any:
    """Plain data as JSON has them: numbers that are not finite become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(v) for key, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value
