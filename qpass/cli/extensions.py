"""What other packages do for the command line: known by their entry points only."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from qpass.errors import QpassError, nearest


def extension(group: str, name: str) -> Any:
    """The function behind an entry point. Raises `QpassError` for an unknown name, and for one whose packages are missing."""
    found = {e.name: e for e in entry_points(group=group)}
    if name not in found:
        raise QpassError(f"format {name}: {nearest(name, {'compressed-tensors', *found})}")
    try:
        return found[name].load()
    except ImportError as error:
        raise QpassError(f"format {name}: {error.name} is not installed: pip install 'qpass-torch[{name}]'") from None
