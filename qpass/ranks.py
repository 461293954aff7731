"""Calibration in several processes (torchrun): each runs its part of the data, and all see the statistics of all of it.

Sums differ from those of one process by rounding; every rank has the same numbers, so all quantize to the same codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from qpass.errors import QpassError


def count() -> int:
    """Processes that calibrate together; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them."""
    return dist.get_rank() if count() > 1 else 0


def total(x: Tensor) -> Tensor:
    """The sum over all ranks."""
    return _reduced(x, dist.ReduceOp.SUM)


def lowest(x: Tensor) -> Tensor:
    """The elementwise minimum over all ranks."""
    return _reduced(x, dist.ReduceOp.MIN)


def highest(x: Tensor) -> Tensor:
    """The elementwise maximum over all ranks."""
    return _reduced(x, dist.ReduceOp.MAX)


def rows_of_all(x: Tensor) -> Tensor:
    """[n, ..] with n of each rank -> the rows of all, in the order of ranks."""
    if count() == 1:
        return x
    found: list[Tensor] = [x] * count()
    dist.all_gather_object(found, x.cpu())
    return torch.cat(found).to(x.device)


def check_same(what: str, names: Sequence[str]) -> None:
    """Raises `QpassError` on every rank if they do not agree: they would wait for each other for good."""
    if count() == 1:
        return
    found: list[Sequence[str]] = [()] * count()
    dist.all_gather_object(found, list(names))
    other = next((i for i, theirs in enumerate(found) if list(theirs) != list(found[0])), None)
    if other is not None:
        raise QpassError(
            f"calibration: ranks 0 and {other} do not {what} alike ({len(found[0])} and {len(found[other])} of them); give each "
            "rank batches for the same kind of calls, at least one"
        )


def _reduced(x: Tensor, operation: object) -> Tensor:
    if count() == 1:
        return x
    x = x.contiguous().clone()
    dist.all_reduce(x, operation)
    return x
