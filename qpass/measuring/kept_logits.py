"""The logits of a float model, kept in a file, so that recipes are compared with them and not with the model in memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.artifact.manifest import sha256_of
from qpass.artifact.save import is_alive, stream_safetensors
from qpass.errors import QpassError
from qpass.measuring.evaluate import logits_of
from qpass.progress import track

_IDENTITY = "identity"


class KeptLogits:
    """Logits [1, S, V] in fp32 for windows of token ids [1, S]: called with a window it gives what the model gave.

    Raises `QpassError` for a file that is none of these, and for a window that is not in it.
    """

    def __init__(self, path: str | Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        try:
            self._file = safe_open(self.path, "pt")
        except (OSError, SafetensorError) as error:
            raise QpassError(f"{path}: no kept logits: {error}") from None
        self.identity = (self._file.metadata() or {}).get(_IDENTITY)
        self._names = set(self._file.keys())

    def __call__(self, ids: Tensor) -> Tensor:
        name = sha256_of(ids.cpu())
        if name not in self._names:
            raise QpassError(
                f"{self.path}: kept for other windows: other text, tokenizer or lengths; delete it to make it anew"
            )
        return self._file.get_tensor(name).to(ids.device)


def keep_logits(path: str | Path, identity: str, windows: Sequence[Tensor], load: Callable[[], Any]) -> KeptLogits:
    """The logits of `load()` for `windows` [1, S], from the file if they are there, or made now and written to it whole.

    `identity`: of the model; a file of another one is refused by `QpassError`. Takes 4 bytes a token and entry of the vocabulary.
    """
    path = Path(path)
    if path.exists():
        known = KeptLogits(path)
        if known.identity != identity:
            raise QpassError(f"{path}: logits of another model; give another file, or delete it")
        for window in windows:
            known(window)
        return known
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):  # by a process that was killed
        number = left.suffix.removeprefix(".")
        if number.isdigit() and not is_alive(int(number)):
            left.unlink(missing_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        model = load()
        with torch.no_grad():
            by_name = {sha256_of(window.cpu()): window for window in windows}
            vocabulary = logits_of(model, windows[0][:, :1]).shape[-1]
            shapes = {name: torch.empty(*w.shape, vocabulary, device="meta") for name, w in by_name.items()}
            progress = track(range(len(shapes)), "qpass: float model")

            def made(name: str) -> Tensor:
                next(progress)
                return logits_of(model, by_name[name]).float()

            stream_safetensors(shapes, made, unfinished, {_IDENTITY: identity})
            next(progress, None)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return KeptLogits(path)
