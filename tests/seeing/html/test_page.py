"""A page as a file: whole, by itself, and safe whatever the names are."""

from __future__ import annotations

import html
import json
import os
import re
from pathlib import Path

import pytest

import qpass.seeing.html
from qpass.seeing.diff import Diff
from qpass.seeing.html.page import as_script_data, in_notebook, page
from qpass.seeing.report import Report, SiteReport
from tests.seeing.html.diffs import HOSTILE, hostile

EMPTY = Report((), 0, 0)
PAGES = {"diff": hostile().to_html(), "report": EMPTY.to_html(), "empty diff": Diff(()).to_html()}


def data_of(text: str) -> object:
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(found)


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_nothing_is_loaded(text: str) -> None:
    for hint in ("src=", "href=", "@import", "url(", "http://", "https://", "import("):
        body = re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.S)
        assert hint not in body.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.parametrize("text", PAGES.values(), ids=PAGES)
def test_a_policy_forbids_all_that_is_not_the_pages_own(text: str) -> None:
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.strip().split(" ", 1) for rule in html.unescape(policy).split(";"))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for kind in ("style-src", "script-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/=]{44}'", rules[kind])
    assert len(re.findall(r"<script", text)) == 2


@pytest.mark.parametrize("name", HOSTILE, ids=["ends the script", "image", "attribute", "template"])
def test_hostile_names_are_data(name: str) -> None:
    written = as_script_data({name: [name]})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {name: [name]}
    report = Report((SiteReport("ffn", name, name, 1, 1, None, name),), 0, 0, (name,), name)
    for text in (hostile().to_html(), report.to_html()):
        assert len(re.findall(r"<script", text)) == 2
        assert "<img" not in text
        assert name in json.dumps(data_of(text), ensure_ascii=False).replace('\\"', '"')


def test_numbers_that_are_not_finite_are_null() -> None:
    assert json.loads(as_script_data([float("nan"), float("inf"), 1.5, {"x": (-float("inf"),)}])) == [
        None,
        None,
        1.5,
        {"x": [None]},
    ]


def test_a_lone_surrogate_in_a_name_is_no_obstacle(tmp_path: Path) -> None:
    page("diff", "\ud800", {"title": "\ud800", "graphs": [], "sites": []}, tmp_path / "x.html")
    assert (tmp_path / "x.html").read_bytes().decode()


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "diff.html"
    path.write_text("before")

    def fails(*_: object) -> None:
        raise OSError("full")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="full"):
            Diff(()).to_html(path)
    assert path.read_text() == "before"
    assert os.listdir(tmp_path) == ["diff.html"]
    text = Diff(()).to_html(path)
    assert path.read_text() == text
    with pytest.raises(FileNotFoundError):
        Diff(()).to_html(tmp_path / "none" / "diff.html")


def test_in_a_notebook_it_has_a_frame_of_its_own() -> None:
    frame = in_notebook(PAGES["diff"])
    (source,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(source) == PAGES["diff"]
    assert 'sandbox="allow-scripts"' in frame


def test_the_same_diff_gives_the_same_page() -> None:
    assert hostile().to_html() == PAGES["diff"]


def test_scripts_set_no_markup() -> None:
    for file in Path(qpass.seeing.html.__file__).parent.glob("*.js"):
        text = file.read_text()
        for hint in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function("):
            assert hint not in text, file
