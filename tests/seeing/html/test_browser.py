"""The page of a diff in a real browser: what a person sees and does."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qpass.seeing.diff import Diff
from tests.models import NORM
from tests.seeing.html.diffs import HOSTILE, hostile, of_llama, with_layers
from tests.seeing.html.page import CSS, ENTER, ESCAPE, LEFT, MINUS, TIMES, Open, Page


@pytest.fixture(scope="module")
def llama() -> Diff:
    return of_llama()


# --- what is there --------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_diff(show: Open, llama: Diff) -> None:
    page = show(llama)
    graph = llama.graphs[0]
    assert page.texts("#totals .total") == [
        f"{sign} {graph.count(status)} {status}"
        for status, sign in (("removed", MINUS), ("added", "+"), ("changed", "~"), ("kept", "="))
    ]
    assert page.one("#title").text == llama.title == "LlamaForCausalLM"
    assert "smaller" in page.one("#bytes").text


def test_three_float_linears_stand_beside_the_operator_that_computes_them(show: Open, llama: Diff) -> None:
    row = show(llama).row("q_proj, k_proj, v_proj")
    before, after = ([e.text.split("\n") for e in row.find_elements(CSS, f".cell.{side} .line")]
                     for side in ("removed", "added"))  # fmt: skip
    linears = ["q_proj", "k_proj", "v_proj"]
    assert [line[-1] for line in before] == [*linears, *["input_layernorm"] * len(NORM), *linears]
    assert [line[1].split(" ")[0] for line in before] == ["input"] * 3 + NORM + ["linear"] * 3
    assert "qpass::linear(int4:g16)" in [line[1].split(" ")[0] for line in after]
    assert {line[0] for line in before} == {MINUS}
    assert {line[0] for line in after} == {"+"}


def test_both_panes_scroll_as_one(show: Open, llama: Diff) -> None:
    page = show(llama)
    cells = page.row("down_proj").find_elements(CSS, ".cell")
    for _ in range(2):
        left, right = (cell.rect for cell in cells)
        assert left["y"] == right["y"]
        assert left["x"] + left["width"] <= right["x"] + 1
        page.chrome.execute_script("document.getElementById('rows').scrollTop += 200")


def test_blocks_that_are_alike_are_one_until_unfolded(show: Open, llama: Diff) -> None:
    page = show(llama)
    row = page.row("layers.*")
    assert f"{TIMES} 2" in row.text
    assert len([p for p in page.texts(".path") if p == "self_attn"]) == 1
    row.click()
    assert page.row("layers.*").get_attribute("aria-expanded") == "true"
    page.row("model.layers.0"), page.row("model.layers.1").click()
    assert len([p for p in page.texts(".path") if p == "self_attn"]) == 1
    page.row("layers.*").click()
    assert not [p for p in page.texts(".path") if p == "model.layers.1"]


def test_what_is_unchanged_is_folded_too(show: Open, llama: Diff) -> None:
    page = show(llama)
    (run, *_) = (r for r in page.all(".row.kept") if "rsqrt" in r.text)
    count = int(run.text.split()[1])
    before = len(page.all(".row"))
    run.click()
    nodes = page.all(".row.kept-node")
    assert len(nodes) == count == len(page.all(".row")) - before
    assert len(nodes[0].find_elements(CSS, ".line")) == 2


def test_graphs_are_chosen(show: Open, llama: Diff) -> None:
    page = show(llama)
    options = page.all("#graphs option")
    assert len(options) == len(llama.graphs) == 2
    options[1].click()
    assert page.texts("#totals .total")[0] == f"{MINUS} {llama.graphs[1].count('removed')} removed"


@pytest.mark.parametrize("diff", [Diff(()), None], ids=["no graph", "no difference"])
def test_pages_with_nothing_to_show_say_so(show: Open, llama: Diff, diff: Diff | None) -> None:
    if diff is not None:
        assert "No graph was captured yet" in show(diff).one("#rows").text
        return
    kept = tuple(replace(n, status="kept", group=None) for n in llama.graphs[0].nodes if n.status != "removed")
    page = show(Diff((replace(llama.graphs[0], nodes=kept),)))
    page.one("#changed").click()
    assert "Nothing matches" in page.one("#rows").text


# --- details --------------------------------------------------------------------------------------------------------


def test_a_site_in_detail(show: Open, llama: Diff) -> None:
    page = show(llama)
    assert not page.one("#details").is_displayed()
    page.row("down_proj").click()
    details = page.one("#details")
    site = next(s for s in llama.sites if s.name == "model.layers.0.mlp.down_proj.weight")
    assert site.after is not None
    assert site.after.scales is not None
    assert site.name in details.text
    assert "float32 → int4:g16" in details.text
    assert f"{site.after.sqnr_db:.1f} dB" in details.text
    assert "32.8 kB" in details.text
    assert "6.14 kB" in details.text
    assert "Shown for one of 2 that are alike" in details.text
    bars = page.all("#details .histogram .bar")
    assert len(bars) == len(site.after.scales.counts)
    assert page.texts("#details figcaption") == [
        f"Scales: {site.after.scales.low:.4g} to {site.after.scales.high:.4g} {site.after.scales.total} scales"
    ]
    assert "modeling_llama.py:" in details.text
    assert any("torch.ops.qpass.linear.default" in code for code in page.texts("#details pre"))


@pytest.mark.parametrize("width", [500, 1400], ids=["narrow", "wide"])
def test_details_do_not_hide_what_they_are_about(show: Open, llama: Diff, width: int) -> None:
    page = show(llama)
    page.chrome.set_window_size(width, 900)
    page.press("n", "n", "n", ENTER)
    row, rows, details = (e.rect for e in (page.selected, page.one("#rows"), page.one("#details")))
    assert rows["y"] <= row["y"] + 1
    assert row["y"] < rows["y"] + rows["height"]
    assert details["y"] + details["height"] <= page.chrome.execute_script("return innerHeight") + 1
    page.chrome.set_window_size(1400, 900)


def test_a_link_leads_to_a_node_that_is_folded(show: Open, llama: Diff) -> None:
    page = show(llama)
    page.row("lm_head").click()
    (link, *_) = (b for b in page.all("#details .links .link") if b.text.startswith("hidden_states"))
    name = link.text
    link.click()
    assert page.selected.find_element(CSS, ".line").get_attribute("title") == name
    assert page.one("#details h2").text == name


def test_a_site_that_stays_in_float_says_why(show: Open, llama: Diff) -> None:
    page = show(llama)
    page.one("#skipped").click()
    assert page.all(".row.kept-node")
    assert all("o_proj" in p for p in page.texts(".kept-node .of-module"))
    page.all(".row.kept-node")[0].click()
    assert "the recipe leaves attn_out in float" in page.one("#details").text


# --- search, filters, keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("down_proj", ["down_proj"]),
        ("int8:channel", ["qpass::append", "scaled_dot_product_attention", "lm_head"]),
        ("MLP gate", ["gate_proj, up_proj"]),
    ],
    ids=["module", "format", "words"],
)
def test_search(show: Open, llama: Diff, text: str, found: list[str]) -> None:
    page = show(llama)
    page.search(text)
    assert page.texts(".row.group .group-head .path") == found
    assert "node" in page.one("#found").text
    page.search("no such thing")
    assert "Nothing matches" in page.one("#rows").text
    page.one("#search").send_keys(ESCAPE)
    assert len(page.all(".row.group")) > len(found)


def test_search_opens_the_layer_that_it_is_about(show: Open, llama: Diff) -> None:
    page = show(with_layers(llama, 6))
    page.search("layers.4.mlp")
    assert page.texts(".row.module > .path") == ["model", "model.layers.4", "mlp"]


def test_filters(show: Open, llama: Diff) -> None:
    page = show(llama)
    assert page.all(".row.kept")
    page.one("#changed").click()
    assert not page.all(".row.kept")
    groups = len(page.all(".row.group"))
    next(o for o in page.all("#kinds option") if o.text == "vocab").click()
    assert page.texts(".row.group .group-head .path") == ["lm_head"]
    next(o for o in page.all("#kinds option") if o.text == "all").click()
    assert len(page.all(".row.group")) == groups


def test_all_is_done_by_keys(show: Open, llama: Diff) -> None:
    page = show(llama)
    page.press("j")
    first = page.selected.text
    page.press("j", "k")
    assert page.selected.text == first
    page.press("n")
    assert "embed_tokens" in page.selected.text
    page.press("n", "p")
    assert "embed_tokens" in page.selected.text
    page.press(ENTER)
    assert page.one("#details").is_displayed()
    page.press("n")
    assert "q_proj" in page.one("#details h2").text
    page.press(ESCAPE)
    assert not page.one("#details").is_displayed()
    page.press(LEFT)
    assert page.selected.find_element(CSS, ".path").text == "self_attn"
    page.press(LEFT)
    assert page.selected.get_attribute("aria-expanded") == "false"
    page.press(" ")
    assert page.selected.get_attribute("aria-expanded") == "true"
    page.press("/", "x")
    assert page.one("#search").get_property("value") == "x"
    page.press(ESCAPE, "?")
    assert page.one("#help").is_displayed()
    page.press(ESCAPE)
    assert not page.one("#help").is_displayed()


def test_escape_while_typing_leaves_the_focus_in_the_rows(show: Open, llama: Diff) -> None:
    """Also when what was typed last is looked at: a moment after."""
    page = show(llama)
    page.press("/", "x", ESCAPE)
    first = page.all(".row")[0]
    time.sleep(0.3)  # more than a pause in typing
    assert page.chrome.switch_to.active_element == first
    assert page.one("#search").get_property("value") == ""


def test_the_selected_row_has_the_focus_and_shows_it(show: Open, llama: Diff) -> None:
    page = show(llama)
    page.press("j", "j", "j")
    assert page.chrome.switch_to.active_element == page.selected
    assert page.selected.value_of_css_property("outline-style") == "solid"
    assert len(page.all('[role="treeitem"][tabindex="0"]')) == 1
    for row in page.all("#rows > .row"):
        assert row.get_attribute("role") == "treeitem"
        assert int(row.get_attribute("aria-level")) >= 1


# --- colours, size, safety ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("chosen", [False, True], ids=["by the system", "by the button"])
def test_light_and_dark(show: Open, llama: Diff, scheme: str, chosen: bool) -> None:
    page = show(llama)
    system = {"light": "dark", "dark": "light"}[scheme] if chosen else scheme
    feature = {"name": "prefers-color-scheme", "value": system}
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    for _ in range(["auto", "light", "dark"].index(scheme) if chosen else 0):
        page.one("#theme").click()
    body = page.one("body")
    text, ground = (channels(body.value_of_css_property(p)) for p in ("color", "background-color"))
    assert (sum(ground) < sum(text)) == (scheme == "dark")
    for css in (
        ".dim",
        ".cell.removed .line",
        ".cell.added .dim",
        ".cell.added .sign",
        ".cell.removed .sign",
        ".total.changed",
    ):
        assert contrast(page, css) >= 4.5, css
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def channels(colour: str) -> list[float]:
    return [float(c) for c in colour[colour.index("(") + 1 : -1].split(",")][:3]


def contrast(page: Page, css: str) -> float:
    """WCAG's ratio between the text of the first such element and the nearest ground that is painted."""
    script = """let e = document.querySelector(arguments[0]); const text = getComputedStyle(e).color;
        while (getComputedStyle(e).backgroundColor === "rgba(0, 0, 0, 0)") e = e.parentElement;
        return [text, getComputedStyle(e).backgroundColor];"""
    light, dark = sorted((luminance(channels(c)) for c in page.chrome.execute_script(script, css)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(rgb: list[float]) -> float:
    linear = [c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_eighty_layers_make_no_more_elements_than_two(show: Open, llama: Diff) -> None:
    counts = []
    for layers in (2, 80):
        page = show(with_layers(llama, layers))
        counts.append(len(page.all("*")))
        assert f"{TIMES} {layers}" in page.row("layers.*").text
    assert counts[0] == counts[1] < 1000
    page.row("layers.*").click()
    assert "model.layers.79" in page.texts(".path")
    assert len(page.all("*")) < 2500


def test_hostile_names_are_shown_as_they_are(show: Open) -> None:
    page = show(hostile())
    assert page.one("#title").text == page.chrome.title == HOSTILE[0]
    everything = page.one("#rows").get_property("textContent")
    for name in HOSTILE:
        assert name in everything
    for identity in [row.get_attribute("data-id") for row in page.all(".row")]:
        page.chrome.execute_script("elementOf(arguments[0])?.click()", identity)
    page.search("window.hacked")
    assert page.all(".row.group")
    assert not page.all("#rows script, #rows img, #details script, #details img")


def test_in_a_notebook(chrome: Any, llama: Diff, tmp_path: Path) -> None:
    """The frame works, and what surrounds it is out of its reach."""
    path = tmp_path / "notebook.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body>{llama._repr_html_()}", encoding="utf-8")
    chrome.get_log("browser")
    chrome.get(path.as_uri())
    chrome.switch_to.frame(0)
    page = Page(chrome)
    assert page.one("#title").text == "LlamaForCausalLM"
    page.row("down_proj").click()
    assert page.one("#details").is_displayed()
    assert chrome.execute_script("return window.origin") == "null"
    chrome.switch_to.default_content()
    assert chrome.get_log("browser") == []
