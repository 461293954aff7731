"""A quantized linear takes in what stands around it: the norm and the scales before it, the gate and the residual behind it.

No site is quantized by it. But in a decode step of a small model the calls decide, as much as the bytes.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.flow import Writes
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import (
    CASTS,
    DROPOUTS,
    argument,
    op_name,
    shape_of,
    source_of,
    value_of,
)
from qpass.ops.around import GATES
from qpass.ops.triton.table import takes_in
from qpass.sites.core import Edit, erase_unused

_SPEC = 6  # of qpass::linear
_MULS, _SPLITS = {"mul", "multiply"}, {"split_with_sizes", "split", "chunk"}


@dataclass(frozen=True)
class Before:
    """x = base / sqrt(mean(base^2) + eps) * norm * column_scale, so far as they are there."""

    base: Node
    norm: Node | None = None
    eps: float | None = None
    column_scale: Node | None = None


@dataclass(frozen=True)
class After:
    """out = gate(first half of y) * second half + residual, so far as they are there."""

    out: Node
    gate: str = ""
    residual: Node | None = None


def rewrite(graph: Graph) -> list[Edit]:
    """norm, qpass::linear, gate and residual -> one qpass::linear, where nothing else reads what lies between them."""
    writes = Writes.of(graph)
    linears = [n for n in graph.nodes if n.target is torch.ops.qpass.linear.default]
    return [edit for node in linears if (edit := _rewrite(graph, node, writes)) is not None]


def _rewrite(graph: Graph, node: Node, writes: Writes) -> Edit | None:
    if not _is_taken_in(node):
        return None
    before, after = read_before(node), read_after(node)
    inputs = [n for n in (before.base, before.norm, before.column_scale) if n is not None]
    if any(writes.change(value, node) for value in inputs):
        before = Before(node.args[0])  # type: ignore[arg-type]
    later = [before.base, *inputs, *([] if after.residual is None else [after.residual])]
    if any(writes.change(value, after.out) for value in later):
        after = After(node)
    x, *stored = node.args
    if after.out is node and before.base is x:
        return None
    around = (before.norm, before.eps, before.column_scale, after.gate, after.residual)
    with graph.inserting_before(after.out):
        new = graph.call_function(node.target, (before.base, *stored, *around))  # type: ignore[arg-type]
    new.meta = dict(after.out.meta)
    after.out.replace_all_uses_with(new)
    removed = erase_unused(graph, after.out)
    stand_for([new], removed)
    return Edit("fuse", "", tuple(n.name for n in removed), (new.name,))


def _is_taken_in(linear: Node) -> bool:
    """Whether the kernels of the device do what is around it. A linear whose tokens are columns has no value of its own."""
    like, x = value_of(linear), shape_of(linear.args[0])  # type: ignore[arg-type]
    if like is None:
        return False
    if like.device.type == "cuda":
        return x is not None and takes_in(str(linear.args[_SPEC]), x[-1], like.dtype, math.prod(like.shape[:-1]))
    return like.device.type == "cpu"


# --- before it --------------------------------------------------------------------------------------------------------


def read_before(linear: Node) -> Before:
    """What the input of a linear is made of, if nothing else reads it."""
    x: Any = linear.args[0]
    value, vectors, core = x, [], None
    while isinstance(value, Node) and set(x.users) == {linear} and core is None:
        if op_name(value) in CASTS:
            value = source_of(value)
            continue
        core = _rms_core(value) or _rms_call(value)
        scaled = None if core else _scaled_by_vector(value)
        if scaled is None:
            break
        value, vector = scaled
        vectors.append(vector)
    if core is not None:
        value, weight, eps = core
        vectors += [] if weight is None else [weight]
    else:
        eps = None
    outer = vectors[0] if len(vectors) == 2 or (vectors and core is None) else None
    norm = vectors[-1] if vectors and vectors[-1] is not outer else None
    fits = len(vectors) <= 2 and (outer is None or value_of(outer).dtype == torch.float32)
    like, given = value_of(linear), value_of(value) if isinstance(value, Node) else None
    same = given is not None and given.dtype == like.dtype and given.shape[:-1] == like.shape[:-1]
    return Before(value, norm, eps, outer) if fits and same and (core or vectors) else Before(x)


def _rms_core(node: Node) -> tuple[Node, None, float] | None:
    """(x, None, eps) of x * rsqrt(mean(x^2, -1) + eps), in any order of the factors."""
    if op_name(node) not in _MULS or len(node.args) != 2:
        return None
    for x, factor in (node.args, node.args[::-1]):
        if not isinstance(factor, Node) or not isinstance(x, Node) or op_name(factor) != "rsqrt":
            continue
        total = source_of(factor)
        if not isinstance(total, Node) or op_name(total) != "add" or not isinstance(total.args[1], float):
            continue
        mean = total.args[0]
        if not isinstance(mean, Node) or not _is_mean_of_rows(mean):
            continue
        if (squared := _squared(source_of(mean))) is x:
            return _uncast(squared), None, total.args[1]
    return None


def _is_mean_of_rows(node: Node) -> bool:
    dims = argument(node, 1, "dim")
    return op_name(node) == "mean" and dims in (-1, [-1], (-1,)) and bool(argument(node, 2, "keepdim", False))


def _squared(node: Any) -> Node | None:
    name = op_name(node) if isinstance(node, Node) else ""
    if (name == "pow" and node.args[1] == 2) or name == "square" or (name in _MULS and node.args[0] is node.args[1]):
        return node.args[0]
    return None


def _uncast(node: Node) -> Node:
    """The value before it was made float32 for a norm."""
    while op_name(node) in CASTS and isinstance(source_of(node), Node):
        node = source_of(node)
    return node


def _rms_call(node: Node) -> tuple[Node, Node | None, float] | None:
    """(x, weight, eps) of torch's rms_norm over the last dimension."""
    if op_name(node) != "rms_norm" or len(argument(node, 1, "normalized_shape")) != 1:
        return None
    x = argument(node, 0, "input")
    eps = argument(node, 3, "eps")
    return x, argument(node, 2, "weight"), torch.finfo(value_of(x).dtype).eps if eps is None else eps


def _scaled_by_vector(node: Node) -> tuple[Node, Node] | None:
    """(x, v) of x [.., K] * v [K], where v is an input of the graph or a row of one."""
    if op_name(node) not in _MULS or len(node.args) != 2 or len(shape_of(node) or ()) < 2:
        return None
    for x, vector in (node.args, node.args[::-1]):
        given = isinstance(vector, Node) and isinstance(x, Node) and shape_of(x) == shape_of(node)
        if given and shape_of(vector) == (shape_of(node)[-1],) and _is_given(vector):  # type: ignore[index, arg-type]
            return x, vector  # type: ignore[return-value]
    return None


def _is_given(node: Node) -> bool:
    source = source_of(node) if op_name(node) == "select" else node
    return isinstance(source, Node) and source.op in ("placeholder", "get_attr")


# --- behind it --------------------------------------------------------------------------------------------------------


def read_after(linear: Node) -> After:
    """What becomes of the result of a linear, as far as nothing else reads it on the way."""
    gated = _gate(linear)
    out, gate = gated or (linear, "")
    end, result = _only_user(out), value_of(out)
    before = out
    while end is not None and op_name(end) in DROPOUTS and argument(end, 2, "training", True) is False:
        before, end = end, _only_user(end)
    if end is None or op_name(end) != "add" or end.kwargs.get("alpha", 1) != 1:
        return After(out, gate)
    summands = [a for a in end.args if a is not before]
    alike = len(summands) == 1 and all(_is_alike(value_of(n), result) for n in (end, *summands) if isinstance(n, Node))
    return After(end, gate, summands[0]) if alike and isinstance(summands[0], Node) else After(out, gate)


def _is_alike(a: Any, b: Any) -> bool:
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)


def _gate(linear: Node) -> tuple[Node, str] | None:
    """(product, gate) of gate(first) * second, the two halves of a linear's result."""
    pieces = _only_user(linear)
    last = len(shape_of(linear) or ()) - 1
    if pieces is None or op_name(pieces) not in _SPLITS or argument(pieces, 2, "dim", 0) not in (-1, last):
        return None
    halves = {n.args[1]: n for n in pieces.users if n.target is operator.getitem}
    first, second = halves.get(0), halves.get(1)
    if len(pieces.users) != 2 or first is None or second is None or shape_of(first) != shape_of(second):
        return None
    act, product = _only_user(first), _only_user(second)
    name = _gate_name(act)
    if not name or product is None or _only_user(act) is not product or op_name(product) not in _MULS:  # type: ignore[arg-type]
        return None
    return (product, name) if set(product.args) == {act, second} else None


def _gate_name(node: Node | None) -> str:
    """The name of an activation as qpass::linear knows it, "" if it does not."""
    name = "" if node is None else op_name(node)
    if node is not None and name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}[argument(node, 1, "approximate", "none")]
    return name if name in GATES else ""


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
