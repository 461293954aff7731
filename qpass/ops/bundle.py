"""Tensors that are given to an operator as one: the stored weights of a model are the same at each call, and hundreds.

A bundle is an int64 tensor [] whose value is the number under which this process keeps them, as long as it lives.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.ops.schemas import LIBRARY

_numbers = itertools.count(1)
_kept: dict[int, list[Tensor]] = {}
#: Called with the number of a bundle that is gone.
ON_GONE: list[Callable[[int], object]] = []


def bundle(tensors: Sequence[Tensor]) -> Tensor:
    """One tensor in the place of these, which it keeps."""
    number = next(_numbers)
    _kept[number] = list(tensors)
    made = torch.tensor(number, device="cpu")  # whatever device is the default
    weakref.finalize(made, _let_go, number)
    return made


def unbundle(number: int) -> list[Tensor]:
    """What the bundle of this number keeps. Raises `QpassError` if this process has none."""
    found = _kept.get(number)
    if found is None:
        raise QpassError(f"qpass::row: no bundle of tensors has the number {number} in this process")
    return found


def _let_go(number: int) -> None:
    _kept.pop(number, None)
    for tell in ON_GONE:
        tell(number)


LIBRARY.impl("unbundle", unbundle, "CompositeExplicitAutograd")
