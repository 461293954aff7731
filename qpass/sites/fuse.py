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

from qpass.graph.flow import Order
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import (
    CASTS,
    DROPOUTS,
    SPLITS,
    argument,
    op_name,
    operands,
    shape_of,
    source_of,
    value_of,
    writes,
)
from qpass.ops.around import GATES
from qpass.ops.triton.table import takes_in
from qpass.sites.core import Edit, erase_unused
from qpass.sites.written import is_written_out

_DTYPES = {torch.float32, torch.bfloat16, torch.float16}
_SPEC = 6  # of qpass::linear
_MULS = {"mul", "multiply"}


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
    """norm, qpass::linear, gate and residual -> one qpass::linear, where nothing else reads what lies between."""
    order = Order.in_graph(graph)
    linears = [n for n in graph.nodes if n.target is torch.ops.qpass.linear.default]
    return [edit for node in linears if (edit := _rewrite(graph, node, order)) is not None]


def _rewrite(graph: Graph, node: Node, order: Order) -> Edit | None:
    if not _is_taken_in(node):
        return None
    x, *stored = node.args
    before, after = read_before(node), read_after(node)
    inside = _between(x, before)  # type: ignore[arg-type]
    if inside and not order.may_move(inside, node):
        before, inside = Before(x), []  # type: ignore[arg-type]
    if not order.may_move([*inside, node], after.out):
        after = After(node)
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
    if like is None or like.dtype not in _DTYPES:
        return False
    if like.device.type == "cuda":
        return (
            x is not None
            and not is_written_out(linear)
            and takes_in(str(linear.args[_SPEC]), x[-1], like.dtype, math.prod(like.shape[:-1]))
        )
    return like.device.type == "cpu"


# --- before it --------------------------------------------------------------------------------------------------------


def read_before(linear: Node) -> Before:
    """What the input of a linear is made of, if nothing else reads that input."""
    x: Any = linear.args[0]
    value, vectors, core, like = x, [], None, value_of(linear)
    while isinstance(value, Node) and set(x.users) == {linear} and core is None:
        if op_name(value) in CASTS:
            if not _keeps(value, like):
                break
            value = source_of(value)
            continue
        if _takes_all(value):
            value = source_of(value)
            continue
        core = _rms_core(value) or _rms_call(value)
        scaled = None if core else _scaled_by_vector(value)
        if scaled is None:
            break
        value, vector = scaled
        vectors.append(vector)
    eps = None
    if core is not None:
        value, weight, eps = core
        vectors += [] if weight is None else [weight]
    if len(vectors) > 2 or not (core or vectors):
        return Before(x)
    norm = vectors[-1] if core and vectors else vectors[1] if len(vectors) == 2 else None
    outer = vectors[0] if len(vectors) == 2 or not core else None
    given = value_of(value) if isinstance(value, Node) else None
    same = given is not None and given.dtype == like.dtype and given.shape[:-1] == like.shape[:-1]
    fits = same and (outer is None or value_of(outer).dtype == torch.float32)
    return Before(value, norm, eps, outer) if fits else Before(x)


def _takes_all(node: Node) -> bool:
    """Whether it is a slice of rows that leaves none out, as the last of one."""
    shape, index = shape_of(node), node.args[1] if node.target is operator.getitem else None
    slices = isinstance(index, tuple) and all(isinstance(i, slice) for i in index)
    known = shape is not None and all(isinstance(n, int) for n in shape)
    return slices and known and shape_of(source_of(node)) == shape


def _between(x: Node, before: Before) -> list[Node]:
    """The nodes that make x of what a linear is to read instead."""
    found: dict[Node, None] = {}
    queue = [x] if x is not before.base else []
    while queue:
        node = queue.pop()
        if (
            node not in found
            and node not in (before.base, before.norm, before.column_scale)
            and node.op != "placeholder"
        ):
            found[node] = None
            queue += node.all_input_nodes
    return list(found)


def _keeps(cast: Node, like: torch.Tensor) -> bool:
    """Whether a cast rounds to nothing less than the type of `like`, on its device."""
    value = value_of(cast)
    return value is not None and value.dtype in (torch.float32, like.dtype) and value.device == like.device


def _rms_core(node: Node) -> tuple[Node, None, float] | None:
    """(x, None, eps) of x * rsqrt(mean(x^2, -1) + eps), in any order of the factors."""
    factors = operands(node, *_MULS)
    for x, factor in (factors, factors[::-1]) if factors else ():
        if not isinstance(factor, Node) or not isinstance(x, Node) or op_name(factor) != "rsqrt" or factor.kwargs:
            continue
        total = operands(source_of(factor), "add")
        if total is None or not isinstance(total[1], float) or not _is_mean_of_rows(total[0]):
            continue
        if (squared := _squared(source_of(total[0]))) is x:
            return _uncast(squared), None, total[1]
    return None


def _is_mean_of_rows(node: Any) -> bool:
    if not isinstance(node, Node) or node.kwargs.get("out") is not None or node.kwargs.get("dtype") is not None:
        return False
    dims = argument(node, 1, "dim")
    return op_name(node) == "mean" and dims in (-1, [-1], (-1,)) and bool(argument(node, 2, "keepdim", False))


def _squared(node: Any) -> Node | None:
    if not isinstance(node, Node) or node.kwargs.get("out") is not None:
        return None
    name, product = op_name(node), operands(node, *_MULS)
    squares = (name == "pow" and argument(node, 1, "exponent") == 2) or name == "square"
    return source_of(node) if squares or (product is not None and product[0] is product[1]) else None


def _uncast(node: Node) -> Node:
    """The value before it was made float32 for a norm."""
    while op_name(node) in CASTS and isinstance(source_of(node), Node) and value_of(node).dtype == torch.float32:
        node = source_of(node)
    return node


def _rms_call(node: Node) -> tuple[Node, Node | None, float] | None:
    """(x, weight, eps) of torch's rms_norm over the last dimension; its own eps is that of float32 for shorter types too."""
    if op_name(node) != "rms_norm" or len(argument(node, 1, "normalized_shape")) != 1:
        return None
    eps = argument(node, 3, "eps")
    return (
        argument(node, 0, "input"),
        argument(node, 2, "weight"),
        torch.finfo(torch.float32).eps if eps is None else eps,
    )


def _scaled_by_vector(node: Node) -> tuple[Node, Node] | None:
    """(x, v) of x [.., K] * v [K], where v is an input of the graph or a row of one."""
    shape, factors = shape_of(node), operands(node, *_MULS)
    if shape is None or len(shape) < 2 or factors is None:
        return None
    for x, vector in (factors, factors[::-1]):
        if not isinstance(vector, Node) or not isinstance(x, Node) or not _is_given(vector):
            continue
        of_x, of_vector = shape_of(x), shape_of(vector)  # lengths first: comparing sizes of a dynamic graph guards them
        alike = of_x is not None and of_vector is not None and len(of_x) == len(shape) and len(of_vector) == 1
        if alike and of_vector == shape[-1:] and of_x == shape:
            return x, vector
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
    both = operands(end, "add")
    if end is None or both is None:
        return After(out, gate)
    summands = [a for a in both if a is not before]
    alike = len(summands) == 1 and all(_is_alike(value_of(n), result) for n in (end, *summands) if isinstance(n, Node))
    return After(end, gate, summands[0]) if alike and isinstance(summands[0], Node) else After(out, gate)


def _is_alike(a: Any, b: Any) -> bool:
    tensors = isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    return tensors and a.dtype == b.dtype and tuple(a.shape) == tuple(b.shape)


def _gate(linear: Node) -> tuple[Node, str] | None:
    """(product, gate) of gate(first) * second, the two halves of a linear's result."""
    pieces = _only_user(linear)
    last = len(shape_of(linear) or ()) - 1
    if pieces is None or op_name(pieces) not in SPLITS or argument(pieces, 2, "dim", 0) not in (-1, last):
        return None
    halves = {n.args[1]: n for n in pieces.users if n.target is operator.getitem}
    first, second = halves.get(0), halves.get(1)
    if len(pieces.users) != 2 or first is None or second is None:
        return None
    width, whole = (shape_of(first) or (0,))[-1], (shape_of(linear) or (0,))[-1]
    if not isinstance(whole, int) or 2 * width != whole:  # a third piece may go unread
        return None
    act, product = _only_user(first), _only_user(second)
    name = _gate_name(act)
    factors = operands(product, *_MULS)
    if not name or product is None or factors is None or writes(act):  # type: ignore[arg-type]
        return None
    return (product, name) if set(factors) == {act, second} and _only_user(act) is product else None  # type: ignore[arg-type]


def _gate_name(node: Node | None) -> str:
    """The name of an activation as qpass::linear knows it, "" if it does not."""
    name = "" if node is None else op_name(node)
    if node is not None and name == "gelu":
        return {"none": "gelu", "tanh": "gelu_tanh"}[argument(node, 1, "approximate", "none")]
    return name if name in GATES else ""


def _only_user(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
