"""What qpass raises for input that it cannot work with, and for limits that do not hold."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class QpassError(Exception):
    """Something in the input cannot be quantized as asked; the first line says what, where and what to do."""


class Breach(QpassError):
    """A limit that was set does not hold: all is well formed, and the answer is no."""


_NAME, _PLACES = "QpassError: ", "\n\nAt:\n"


@contextmanager
def errors_through_cpp() -> Iterator[None]:
    """A QpassError that operators raise behind C++ (ops/cpu/binding.cpp) comes out of it as a RuntimeError that begins with the
    name; here it becomes a QpassError again."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith(_NAME):
            raise
        raise QpassError(str(error).removeprefix(_NAME).partition(_PLACES)[0]) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """The hint for a misspelt `word`: the closest known name, and all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}Known: {', '.join(names)}"
