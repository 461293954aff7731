"""Linears of a mixture of experts: a 3-D Parameter [experts, out, in] or [experts, in, out], in the ways it is applied."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from qpass.graph.calls import LinearCall, Route, parameter_behind
from qpass.graph.vocabulary import GATHERS, argument, op_name, shape_of

_GROUPED = {"grouped_mm", "_grouped_mm", "grouped_mm_fallback"}
_BATCHED = {"bmm", "matmul"}


def read_experts(node: Node, parameters: Collection[Node]) -> LinearCall | None:
    """The linear that `node` computes with a 3-D Parameter, and how its rows find their expert; None if it is none."""
    name = op_name(node)
    if name in _GROUPED:
        return _grouped(node, parameters)
    if name == "linear":
        return _one(node, argument(node, 0, "input"), argument(node, 1, "weight"), True, parameters)
    if name not in _BATCHED or len(node.args) < 2:
        return None
    left, right = node.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return (
        _one(node, left, right, False, parameters)
        or _batched(node, left, right, True, parameters)
        or _batched(node, right, left, False, parameters)
    )


def _grouped(node: Node, parameters: Collection[Node]) -> LinearCall | None:
    """grouped_mm(x [S, in], W [experts, in, out], offs): rows up to offs[e] belong to expert e."""
    x, offsets = argument(node, 0, "input"), argument(node, 2, "offs")
    found = parameter_behind(argument(node, 1, "weight"), parameters, dims=3)
    if (
        found is None
        or not isinstance(x, Node)
        or not isinstance(offsets, Node)
        or argument(node, 3, "bias") is not None
    ):
        return None
    weight, flipped = found
    return LinearCall(node, x, weight, None, not flipped, Route("offsets", offsets))


def _one(node: Node, x: Any, weight: Any, natural: bool, parameters: Collection[Node]) -> LinearCall | None:
    """linear(x, W[e]) or x @ W[e]: a constant expert; also through a transposition of the slice."""
    flips = natural
    while isinstance(weight, Node) and op_name(weight) in ("t", "T", "mT", "numpy_T"):
        weight, flips = weight.args[0], not flips
    if not isinstance(weight, Node) or not isinstance(x, Node) or len(shape_of(weight) or ()) != 2:
        return None
    index = weight.args[-1] if op_name(weight) in ("getitem", "select") and len(weight.args) > 1 else None
    if not isinstance(index, int) or (op_name(weight) == "select" and weight.args[1] != 0):
        return None
    found = parameter_behind(weight.args[0], parameters, dims=3)
    if found is None or (op_name(node) == "linear" and argument(node, 2, "bias") is not None):
        return None
    return LinearCall(node, x, found[0], None, flips == found[1], Route("one", index))


def _batched(node: Node, x: Node, weight: Node, right: bool, parameters: Collection[Node]) -> LinearCall | None:
    """x @ W (or W @ x) of equal batches: W is the Parameter itself, or its rows picked by expert: W[ids]."""
    if len(shape_of(x) or ()) != 3 or len(shape_of(weight) or ()) != 3:
        return None
    flipped = not right  # W @ x multiplies [out, in]
    while isinstance(weight, Node) and op_name(weight) in ("transpose", "mT"):
        weight, flipped = weight.args[0], not flipped  # type: ignore[assignment]
    found = parameter_behind(weight, parameters, dims=3)
    if found is not None:
        if not right:
            return None
        return LinearCall(node, x, found[0], None, flipped == found[1], Route("each", None))
    single = (shape_of(x) or ())[1 if right else 2] == 1
    ids = _picked(weight)
    found = parameter_behind(weight.args[0], parameters, dims=3) if ids is not None else None
    if found is None or ids is None or not single:
        return None
    return LinearCall(node, x, found[0], None, flipped == found[1], Route("ids", ids, 1 if right else 2))


def _picked(node: Node) -> Node | None:
    """ids of W[ids], for a vector of ids."""
    if op_name(node) not in GATHERS or len(node.args) < 2:
        return None
    index = node.args[-1]
    if op_name(node) == "index_select" and node.args[1] != 0:
        return None
    if isinstance(index, list | tuple):
        index = index[0] if len(index) == 1 else None
    return index if isinstance(index, Node) and len(shape_of(index) or ()) == 1 else None
