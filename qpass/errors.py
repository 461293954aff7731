"""What qpass raises for input that it cannot work with, and for limits that do not hold."""

from __future__ import annotations

import difflib
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class QpassError(Exception):
    """Something in the input cannot be quantized as asked; the first line says what, where and what to do."""


class Breach(QpassError):
    """A limit that was set does not hold: all is well formed, and the answer is no."""


_kept = threading.local()


def kept_for_cpp(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, which C++ calls: of a QpassError that it raises, C++ passes on no more than words."""

    def keeping(*args: Any) -> Any:
        try:
            return function(*args)
        except QpassError as error:
            _kept.error = error
            raise

    return keeping


@contextmanager
def errors_through_cpp() -> Iterator[None]:
    """A QpassError that operators raise behind C++ (ops/cpu/binding.cpp) comes out of it as a RuntimeError; here it is itself
    again."""
    _kept.error = None
    try:
        yield
    except RuntimeError:
        if _kept.error is None:
            raise
        raise _kept.error from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt `word`: the closest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
