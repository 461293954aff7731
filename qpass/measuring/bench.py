"""How fast a model is in float and under recipes, one after the other in this process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qpass.folders import check_data, load_float, load_quantized, recipe_for
from qpass.measuring.job import FLOAT
from qpass.measuring.speed import Speed, measure_speed
from qpass.printing import printed
from qpass.progress import working
from qpass.recipe import resolve_recipe


@dataclass(frozen=True)
class Bench:
    """(recipe, speed) of each; the float model first, if there is one. `print` shows a table, `to_json()` gives plain data."""

    rows: tuple[tuple[str, Speed], ...]

    def to_json(self) -> dict[str, Any]:
        """The rows as plain data."""
        return {"rows": [{"recipe": name} | speed.to_json() for name, speed in self.rows]}

    def __rich__(self) -> Any:
        from rich.table import Table

        first = self.rows[0][1]
        columns = ("recipe", "prompt tokens/s", "ms a step", "tokens/s", f"times {self.rows[0][0]}", "GB/s")
        table = Table(
            *columns, box=None, pad_edge=False, title=f"behind {first.context} tokens, batch 1", title_justify="left"
        )
        for column in table.columns[1:]:
            column.justify = "right"
        for name, speed in self.rows:
            cells = (
                speed.prompt_tokens_per_second,
                speed.step_seconds * 1e3,
                speed.tokens_per_second,
                first.step_seconds / speed.step_seconds,
                (speed.weight_bytes + speed.cache_bytes) / speed.step_seconds / 1e9,
            )
            table.add_row(name, *(f"{cell:,.2f}" for cell in cells))
        return table

    def __str__(self) -> str:
        return printed(self)


def bench(
    source: Path,
    recipes: Sequence[str] | None,
    context: int,
    steps: int,
    *,
    calibration: Path | None = None,
    dtype: str = "auto",
    inner: str = "inductor",
) -> Bench:
    """Time the model in folder `source`: in float and under `recipes`; None: an artifact, as it is."""
    for name in recipes or ():
        check_data(resolve_recipe(name, calibration is not None), name, calibration is not None)
    rows = []
    for name in ("artifact",) if recipes is None else (FLOAT, *recipes):
        if name == FLOAT:
            model, recipe = load_float(source, dtype), None
            if inner == "inductor":
                model.compile()
        else:
            given = None if recipes is None else name
            model = load_quantized(source, given, calibration=calibration, dtype=dtype, inner=inner)
            recipe = recipe_for(source, given, calibration is not None)
        with working(f"{name}: compiling and timing"):
            rows.append((name, measure_speed(model, recipe, context, steps)))
        del model
    return Bench(tuple(rows))
