"""The page of a report in a real browser."""

from __future__ import annotations

import pytest
import torch

import qpass
from qpass.seeing.report import Report, SiteReport
from tests.models import build, tokens
from tests.seeing.html.diffs import HOSTILE
from tests.seeing.html.page import TIMES, Open


@pytest.fixture(scope="module")
def report() -> Report:
    batches = [tokens(2, 9, seed=i) for i in range(2)]
    model = qpass.quantize(build("llama"), "w8a8", inner="eager", calibration=batches)
    with torch.no_grad():
        model(tokens())
    return qpass.report(model)


def test_a_report_has_its_charts(show: Open, report: Report) -> None:
    page = show(report)
    assert len(page.all("#bytes-chart .stack")) == 2
    assert len(page.all("#error-chart .strip")) == 9  # seven linears of a layer, the table, the projection
    assert len(page.all("#range-chart .strip")) == 8  # a table has no input
    one = next(s for s in report.sites if s.name == "model.layers.1.mlp.down_proj.weight")
    assert f"{one.name}: {one.sqnr_db:.2f} dB" in page.texts("#error-chart title")
    assert any(t.startswith(f"{one.name}: ") for t in page.texts("#range-chart title"))


def test_charts_without_data_are_left_out(show: Open) -> None:
    page = show(Report((SiteReport("ffn", "w", None, 4, 4, None, "because"),), 4, 0, (), "none"))
    for section in ("errors", "ranges", "notes"):
        assert not page.one(f"#{section}").is_displayed()
    assert "float: because" in page.one("#sites").text


def test_the_table_is_folded_sorted_and_searched(show: Open, report: Report) -> None:
    page = show(report)
    rows = page.texts("#sites tbody tr td:nth-child(2)")
    assert any(f"model.layers.*.mlp.up_proj.weight {TIMES} 2" in row for row in rows)
    next(r for r in page.all("#sites tr.folded") if "up_proj" in r.text).click()
    assert page.texts("#sites tr.member td:nth-child(2)") == [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    heading = next(b for b in page.all("#sites th button") if b.text == "before")
    heading.click()
    sizes = [int(t.replace(",", "")) for t in page.texts("#sites tbody tr:not(.member) td:nth-child(5)") if t]
    assert sizes == sorted(sizes)
    heading.click()
    assert page.one('th[aria-sort="descending"]').text == "before"
    page.search("lm_head")
    assert page.one("#found").text == "1 site"


def test_hostile_names_in_a_report(show: Open) -> None:
    sites = tuple(SiteReport("ffn", f"{name}.{i}.w", name, 4, 4, 3.0, name) for i, name in enumerate(HOSTILE))
    page = show(Report(sites, 4, 0, HOSTILE, HOSTILE[1]))
    text = page.one("main").get_property("textContent")
    for name in HOSTILE:
        assert name in text
    assert not page.all("main script, main img")
