"""Text files become documents, and documents windows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qpass.errors import QpassError
from qpass.texts import documents, read_windows


class Characters:
    """A token a character."""

    def __call__(self, text: str, add_special_tokens: bool) -> Characters:
        assert not add_special_tokens
        self.input_ids = [ord(c) for c in text]
        return self


def text(path: Path, *parts: str) -> Path:
    path.write_text("<|endoftext|>\n".join(parts))
    return path


def test_documents_are_apart_by_lines_and_empty_ones_are_none(tmp_path: Path) -> None:
    assert documents(text(tmp_path / "t", "one\n", "", " \n", "two\n")) == ["one\n", "two\n"]


@pytest.mark.parametrize(
    ("count", "wanted"),
    [
        (1, ["abcd"]),
        (3, ["abcd", "mnop", "xy"]),
        (4, ["abcd", "mnop", "xy", "efgh"]),
        (9, ["abcd", "mnop", "xy", "efgh", "ijkl"]),
    ],
    ids=str,
)
def test_the_first_window_of_each_document_then_the_second(count: int, wanted: list[str], tmp_path: Path) -> None:
    """A short document is a window; what is left at the end of a long one is not."""
    windows = read_windows(text(tmp_path / "t", "abcdefghijkl", "mnopqr", "xy", "z"), Characters(), 4, count)
    assert ["".join(chr(i) for i in w[0]) for w in windows] == wanted
    assert all(w.shape[0] == 1 and w.dtype == torch.long for w in windows)


@pytest.mark.parametrize("content", [b"", b"x", b"\xff\xfe\x00"], ids=["empty", "one token", "no text"])
def test_what_holds_no_window_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(QpassError, match="t: no"):
        read_windows(tmp_path / "t", Characters(), 4, 1)
    with pytest.raises(QpassError, match="is no file"):
        read_windows(tmp_path / "nothing", Characters(), 4, 1)
