"""Which operations leave the rows of a cache whole: those along other axes than the last, which shares its scales."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

#: What rearranges a tensor -> position and name of the argument that says which axes (None: none).
ALONG: dict[str, tuple[int, str] | None] = {
    "slice": (1, "dim"), "select": (1, "dim"), "narrow": (1, "dim"), "index_select": (1, "dim"), "unsqueeze": (1, "dim"),
    "transpose": (1, "dim0"), "permute": (1, "dims"), "roll": (2, "dims"), "getitem": (1, "index"), "clone": None,
    "contiguous": None, "alias": None, "detach": None, "expand": None,
}  # fmt: skip
#: What writes a tensor into another -> position and name of what is written.
WRITES = {
    "index_copy": (3, "source"), "index_copy_": (3, "source"), "index_put": (2, "values"), "index_put_": (2, "values"),
    "scatter": (3, "src"), "scatter_": (3, "src"), "slice_scatter": (1, "src"), "select_scatter": (1, "src"),
    "copy_": (1, "src"), "copy": (1, "src"), "setitem": (2, "value"), "zero_": None,
}  # fmt: skip
#: Writes that change all of a tensor.
WHOLE = ("copy_", "zero_")
#: Writes -> position and name of the argument that says which axes, where it is not (1, "dim").
_WRITTEN_ALONG = {"slice_scatter": (2, "dim"), "select_scatter": (2, "dim"), "setitem": (1, "index"), "index_put": (1, "indices"),
                  "index_put_": (1, "indices")}  # fmt: skip


def keeps_rows(name: str, rank: int, argument: Callable[[int, str], Any]) -> bool:
    """Whether the rearrangement or write `name` of a tensor of `rank` axes leaves the last axis whole and last.

    `argument`: (position, name) -> an argument of the call, or None; of nodes, their values.
    """
    if name.startswith("scatter"):
        return _scatters_rows(rank, argument)
    if name.startswith("index_put") and argument(3, "accumulate"):
        return False
    where = ALONG[name] if name in ALONG else _WRITTEN_ALONG.get(name, (1, "dim"))
    if where is None:
        return True
    along = argument(*where)
    if name in ("getitem", "setitem", "index_put", "index_put_"):
        index = list(along) if isinstance(along, list | tuple) else [along]
        if any(i is Ellipsis for i in index):
            return index[-1] is Ellipsis or _is_all(index[-1])
        taken = sum(_axes(i) for i in index if i is not None or name.startswith("index_put"))
        return taken < rank or _is_all(index[-1])
    if name == "permute":
        return bool(along[-1] % rank == rank - 1)
    if name == "transpose":
        return all(d % rank != rank - 1 for d in (along, argument(2, "dim1")))
    if name == "unsqueeze":
        return bool(along % (rank + 1) != rank)
    dims = along if isinstance(along, list | tuple) else [along]
    # A roll without axes moves across all of them.
    return bool(dims) and all(isinstance(d, int) and d % rank != rank - 1 for d in dims)


def _is_all(index: Any) -> bool:
    return isinstance(index, slice) and index == slice(None)


def _axes(index: Any) -> int:
    """Axes of a tensor that one index takes: as many as a mask has."""
    return index.dim() if isinstance(index, Tensor) and index.dtype == torch.bool else 1


def _scatters_rows(rank: int, argument: Callable[[int, str], Any]) -> bool:
    """Whether a scatter writes whole rows: its index, of the shape of what is written, is expanded along the last axis."""
    dim, index, source = argument(1, "dim"), argument(2, "index"), argument(3, "src")
    if argument(4, "reduce") is not None or dim % rank == rank - 1:
        return False
    if not isinstance(index, Tensor) or not isinstance(source, Tensor):
        return False
    return index.shape == source.shape and index.stride()[-1] == 0
