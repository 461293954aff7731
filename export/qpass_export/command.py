"""`qpass export --format onnx`: what the command line of qpass calls, found by its entry point."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.errors import QpassError
from qpass_export.export import Exported, export_onnx
from qpass_export.verify import Check, verify


@dataclass(frozen=True)
class Result:
    """An export and its checks."""

    exported: Exported
    checks: tuple[Check, ...]

    def to_json(self) -> dict[str, Any]:
        """The same as plain data."""
        checks = [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks]
        return self.exported.to_json() | ({"checks": checks} if checks else {})

    def __str__(self) -> str:
        ran = any(c.passed and c.name.startswith("onnxruntime") for c in self.checks)
        told = ["ran on hardware" if ran else "rule-checked only"] if self.checks else []
        return "\n".join([str(self.exported), *map(str, self.checks), *told])


def run(source: Path, folder: Path, target: str | None, recipe: str | None, check: bool) -> Result:
    """Export a folder. Raises `QpassError` if a check fails."""
    exported = export_onnx(source, folder, target or "ort-cpu", recipe)
    checks = tuple(verify(exported)) if check else ()
    failed = [str(c) for c in checks if c.passed is False]
    if failed:
        raise QpassError(f"{exported.path} was written, but: {'; '.join(failed)}")
    return Result(exported, checks)
