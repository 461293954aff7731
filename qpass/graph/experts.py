"""Linears of a mixture of experts: a 3-D Parameter [experts, out, in] or [experts, in, out], in the ways it is applied."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch.fx import Node

from qpass.graph.calls import LinearCall, Route, is_index, parameter_behind
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
    return _call(node, x, found, False, Route("offsets", offsets, _count(argument(node, 1, "weight"))))


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
    count = _count(weight.args[0])
    return _call(node, x, found, flips, Route("one", index % count, count))


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
        return _call(node, x, found, flipped, Route("each", None, _count(weight)))
    single = (shape_of(x) or ())[1 if right else 2] == 1
    ids = _picked(weight)
    found = parameter_behind(weight.args[0], parameters, dims=3) if ids is not None else None
    if found is None or ids is None or not single:
        return None
    return _call(node, x, found, flipped, Route("ids", ids, _count(weight.args[0])), columns=not right)


def _call(
    node: Node, x: Node, found: tuple[Node, bool], natural: bool, route: Route, columns: bool = False
) -> LinearCall | None:
    """`natural`: what was found is applied as [out, in]. [experts * in, out] cannot be stored as rows of outputs: None."""
    weight, flipped = found
    transposed = natural == flipped
    if transposed and len(shape_of(weight) or ()) == 2:
        return None
    return LinearCall(node, x, weight, None, transposed, columns, route=route)


def _count(weights: Any) -> int:
    return int((shape_of(weights) or (0,))[0])


def _picked(node: Node) -> Node | None:
    """ids of W[ids], for a vector of ids."""
    if op_name(node) not in GATHERS or len(node.args) < 2:
        return None
    index = node.args[-1]
    if op_name(node) == "index_select" and node.args[1] != 0:
        return None
    if isinstance(index, list | tuple):
        index = index[0] if len(index) == 1 else None
    return index if isinstance(index, Node) and is_index(index) and len(shape_of(index) or ()) == 1 else None
