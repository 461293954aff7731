"""Text files as windows of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.errors import QpassError

#: What separates the documents of a text file.
_END = "<|endoftext|>"


def check_text(path: str | Path) -> None:
    """Raises `QpassError` if there is no such file."""
    if not Path(path).is_file():
        raise QpassError(f"{path} is no file; give a text file")


def documents(path: str | Path) -> list[str]:
    """The documents of a text file: apart by lines of <|endoftext|>. Raises `QpassError` for what is no text."""
    check_text(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise QpassError(f"{path}: no text in UTF-8: {error}") from None
    return [document for document in text.split(f"{_END}\n") if document.strip()]


def tokenized(path: str | Path, tokenizer: Any) -> list[Tensor]:
    """The token ids [S] of each document, without special tokens."""
    rows = (tokenizer(text, add_special_tokens=False).input_ids for text in documents(path))
    return [torch.tensor(row, dtype=torch.long) for row in rows]


def read_windows(path: str | Path, tokenizer: Any, tokens: int, count: int) -> list[Tensor]:
    """At most `count` windows [1, tokens]: the first of each document, then the second, and so on. A document that is shorter
    is a window by itself. Raises `QpassError` if no document has two tokens."""
    rows = tokenized(path, tokenizer)
    windows = []
    for start in range(0, max((len(row) for row in rows), default=0), tokens):
        for row in rows:
            window = row[start : start + tokens]
            if len(window) == tokens or (start == 0 and len(window) > 1):
                windows.append(window[None])
    if not windows:
        raise QpassError(f"{path}: no document of two tokens or more; give more text")
    return windows[:count]
