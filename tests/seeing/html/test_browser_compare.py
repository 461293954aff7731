"""The page of a comparison in a real browser."""

from __future__ import annotations

from typing import Any

import pytest

from qpass.measuring.compare import Comparison
from qpass.measuring.evaluate import Evaluation
from qpass.measuring.job import Measured
from tests.seeing.html.diffs import HOSTILE
from tests.seeing.html.page import Open


def row(recipe: str, size: int, kl: float, **others: Any) -> Measured:
    found = Evaluation(kl, kl / 10, 20.0, 19.0, 0.9, 100, {}, (kl * 0.9, kl * 1.1, kl))
    return Measured(recipe, size, 10**9, found, 1.0, **others)


ROWS = (
    row("float", 40_000_000, 0.0, cache_bytes=6144.0, tokens_per_second=10.0),
    row("int8", 10_000_000, 0.001, cache_bytes=6144.0, tokens_per_second=30.0),
    row("worse", 9_000_000, 0.5),
    row("int4", 6_000_000, 0.1),
)


def test_the_frontier_is_drawn_and_named(show: Open) -> None:
    page = show(Comparison("a model", "100 tokens", ROWS))
    assert page.texts("#frontier .label") == ["int8", "worse", "int4"]
    assert page.texts("#frontier .best .label") == ["int8", "int4"]
    assert page.texts("#rows tbody td:first-child") == ["float", "int8", "worse", "int4"]
    assert [t for t in page.texts("#frontier title") if t.startswith("int8: 10.0 MB, KL 0.00100")]
    circles = page.all("#frontier circle")
    heights = dict(zip(page.texts("#frontier .label"), (float(c.get_attribute("cy")) for c in circles), strict=True))
    assert heights["worse"] < heights["int4"] < heights["int8"], "less loss is further down"


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:2]], ids=["float alone", "one recipe"])
def test_no_plot_of_a_single_point(rows: tuple[Measured, ...], show: Open) -> None:
    page = show(Comparison("a model", "100 tokens", rows))
    assert not page.one("#plot").is_displayed()
    assert len(page.all("#rows tbody tr")) == len(rows)


def test_hostile_names_in_a_comparison(show: Open) -> None:
    rows = tuple(row(name, 10**7 + i, 0.1 + i) for i, name in enumerate(HOSTILE))
    page = show(Comparison(HOSTILE[0], HOSTILE[1], rows))
    for name in HOSTILE:
        assert name in page.one("body").get_property("textContent")
    assert not page.all("main script, main img")
