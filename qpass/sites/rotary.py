"""Rotary embedding of queries and keys, and the keys' way into a quantized cache, as one operator.

No site is quantized by it: it is two operators fewer in each layer of a decode step.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.flow import Order
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import CATS, op_name, operands, set_value, shape_of, source_of, value_of
from qpass.sites.core import Edit, erase_unused

_MULS = {"mul", "multiply"}
_K_LAST, _START = 17, 19  # of qpass::attention
_KEYS = 3  # of qpass::append


@dataclass(frozen=True)
class Rotary:
    """x * cos + (the halves of x exchanged, the first negative) * sin."""

    x: Node
    cos: Node
    sin: Node
    nodes: tuple[Node, ...]


def rewrite(graph: Graph) -> list[Edit]:
    """rotary embedding of q and k, qpass::append -> one qpass::append_rotated, where an attention reads both."""
    order = Order.in_graph(graph)
    attentions = [n for n in graph.nodes if n.target is torch.ops.qpass.attention.default and len(n.args) > _START]
    return [edit for node in attentions if (edit := _rewrite(graph, node, order)) is not None]


def _rewrite(graph: Graph, attention: Node, order: Order) -> Edit | None:
    q, k, append = attention.args[0], attention.args[_K_LAST], attention.args[_START]
    if not (isinstance(q, Node) and isinstance(k, Node) and isinstance(append, Node)):
        return None
    if op_name(append) != "qpass::append" or append.args[_KEYS] is not k:
        return None
    of_q, of_k = read_rotary(q), read_rotary(k)
    if of_q is None or of_k is None or (of_q.cos, of_q.sin) != (of_k.cos, of_k.sin) or q is k:
        return None
    inputs = (of_q.x, of_k.x, of_q.cos, of_q.sin)

    def comes_before(n: Node) -> bool:
        return order.of.get(n, len(order.of)) < order.of[append]

    there = all(map(comes_before, (*inputs, q, k)))
    early = any(comes_before(user) for n in (q, k) for user in n.users)
    if not there or early or not order.may_move([*of_q.nodes, *of_k.nodes], append):
        return None
    k_parts, v_parts, length, _, values, *rest = append.args
    with graph.inserting_before(append):
        new = graph.call_function(
            torch.ops.qpass.append_rotated.default,
            (k_parts, v_parts, length, of_q.x, of_k.x, values, of_q.cos, of_q.sin, *rest),
        )
        results = [graph.call_function(operator.getitem, (new, i)) for i in range(3)]
    for before, after in zip((append, q, k), results, strict=True):
        set_value(after, value_of(before))
        before.replace_all_uses_with(after)
    graph.erase_node(append)
    removed = [append, *erase_unused(graph, q), *erase_unused(graph, k)]
    stand_for([new, *results], removed)
    return Edit("rotate_and_append", "", tuple(n.name for n in removed), tuple(n.name for n in (new, *results)))


def read_rotary(node: Any) -> Rotary | None:
    """Rotary embedding of x [B, H, S, D] over all of D, as transformers writes it, in any order."""
    summands = operands(node, "add")
    for straight, crossed in (summands, summands[::-1]) if summands else ():
        for x, cos in _factors(straight):
            for half, sin in _factors(crossed):
                if _is_exchanged(half, x) and _are_angles(x, cos) and _are_angles(x, sin):
                    return Rotary(x, cos, sin, (node, straight, crossed, half))
    return None


def _factors(product: Any) -> list[tuple[Node, Node]]:
    a, b = operands(product, *_MULS) or (None, None)
    return [(a, b), (b, a)] if isinstance(a, Node) and isinstance(b, Node) else []


def _is_exchanged(node: Node, x: Node) -> bool:
    """Whether it is cat(-x[.., half:], x[.., :half])."""
    if (
        op_name(node) not in CATS
        or not node.args
        or not isinstance(node.args[0], list | tuple)
        or len(node.args[0]) != 2
    ):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    second, first = node.args[0]
    if dim not in (-1, 3) or not isinstance(second, Node) or op_name(second) != "neg":
        return False
    return _is_half(source_of(second), x, 1) and _is_half(first, x, 0)


def _is_half(node: Any, x: Node, which: int) -> bool:
    if not isinstance(node, Node) or node.target is not operator.getitem:
        return False
    source, index = node.args
    half = (shape_of(x) or (0,))[-1] // 2
    if isinstance(source, Node) and op_name(source) in ("chunk", "split"):
        return bool(source_of(source) is x and index == which and (shape_of(node) or (0,))[-1] == half)
    cut = slice(half, None, None) if which else slice(None, half, None)
    return source is x and isinstance(index, tuple) and index[0] is Ellipsis and index[1:] == (cut,)


def _are_angles(x: Node, angles: Node) -> bool:
    """Whether they are [B or 1, 1, S, D] for x [B, H, S, D], in its type."""
    shape, other = shape_of(x), shape_of(angles)
    if shape is None or other is None or len(shape) != 4 or len(other) != 4:
        return False
    same = other[0] in (1, shape[0]) and other[1] == 1 and other[2:] == shape[2:]
    return bool(same and value_of(x).dtype == value_of(angles).dtype)
