"""Rotary embedding of queries and keys, and the keys' way into a cache, as one operator.

No site is quantized by it: it is two operators fewer in each layer of a decode step.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.flow import Order, memory_of
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import CATS, op_name, operands, set_value, shape_of, source_of, value_of, writes
from qpass.sites.core import Edit, erase_unused

_MULS = {"mul", "multiply"}
_K_SPEC, _V_DATA, _K_LAST, _START = 5, 6, 17, 19  # of qpass::attention
_KEYS = 3  # of qpass::append


@dataclass(frozen=True)
class Rotary:
    """x * cos + (the halves of x exchanged, the first negative) * sin."""

    x: Node
    cos: Node
    sin: Node
    nodes: tuple[Node, ...]


def rewrite(graph: Graph) -> list[Edit]:
    """rotary embedding of q and k, qpass::append -> one qpass::append_rotated, where an attention reads both; with index_copy_
    into a cache of floats in the place of qpass::append -> qpass::write_rotated, on CPU tensors."""
    order = Order.in_graph(graph)
    edits = []
    for node in graph.find_nodes(op="call_function", target=torch.ops.qpass.attention.default):
        edits += [edit for each in (_rewrite, _rewrite_floats) if (edit := each(graph, node, order)) is not None]
    return edits


def _rewrite(graph: Graph, attention: Node, order: Order) -> Edit | None:
    if len(attention.args) <= _START:
        return None
    q, k, append = attention.args[0], attention.args[_K_LAST], attention.args[_START]
    if not (isinstance(q, Node) and isinstance(k, Node) and isinstance(append, Node)):
        return None
    if op_name(append) != "qpass::append" or append.args[_KEYS] is not k:
        return None
    both = _read_both(q, k)
    if both is None:
        return None
    of_q, of_k = both
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


def _rewrite_floats(graph: Graph, attention: Node, order: Order) -> Edit | None:
    args: Any = attention.args
    q, cache_k, cache_v = args[0], args[1], args[_V_DATA]
    if args[_K_SPEC] not in ("fp32", "bf16") or value_of(attention).device.type != "cpu" or cache_k is cache_v:
        return None
    write_k, write_v = (_copied_into(cache, attention, order) for cache in (cache_k, cache_v))
    if write_k is None or write_v is None or write_k.args[2] is not write_v.args[2]:
        return None
    copied: Any = (*write_k.args[2:], write_v.args[3])
    positions, k, values = copied
    both = _read_both(q, k)
    if both is None or set(q.users) != {attention} or set(k.users) != {write_k} or _tokens(values) != _tokens(k):
        return None
    of_q, of_k = both
    first, last = sorted((write_k, write_v), key=order.of.__getitem__)
    inputs = (of_q.x, of_k.x, of_q.cos, of_q.sin, positions, values, q, k)
    there = all(order.of.get(n, len(order.of)) < order.of[last] for n in inputs)
    between = [n for n, i in order.of.items() if order.of[first] < i < order.of[last]]
    read = memory_of(n for node in between for n in node.all_input_nodes) & memory_of((cache_k, cache_v))
    if not there or read or any(map(writes, between)) or not order.may_move([*of_q.nodes, *of_k.nodes], first):
        return None
    with graph.inserting_before(last):
        new = graph.call_function(
            torch.ops.qpass.write_rotated.default,
            (cache_k, cache_v, positions, of_q.x, of_k.x, values, of_q.cos, of_q.sin),
        )
    set_value(new, value_of(q))
    q.replace_all_uses_with(new)
    for node in (first, last):
        graph.erase_node(node)
    removed = [first, last, *erase_unused(graph, q), *erase_unused(graph, k)]
    stand_for([new], removed)
    return Edit("rotate_and_write", "", tuple(n.name for n in removed), (new.name,))


def _copied_into(cache: Any, attention: Node, order: Order) -> Node | None:
    """The index_copy_ of tokens to a cache [B, H, S, D], if nothing else reads or writes it before an attention does."""
    users = cache.users if isinstance(cache, Node) else {}
    if any(n not in order.of for n in users):  # a layer that shares its cache was rewritten before
        return None
    before = [n for n in users if n is not attention and order.of[n] < order.of[attention]]
    node = before[0] if len(before) == 1 else None
    if node is None or op_name(node) != "index_copy_" or node.users or node.args[0] is not cache:
        return None
    return node if len(node.args) == 4 and node.args[1] in (2, -2) and len(shape_of(node.args[0]) or ()) == 4 else None


def _tokens(x: Any) -> tuple[Any, ...]:
    """Sequences, heads, tokens of [B, H, S, D]."""
    return (shape_of(x) or ())[:3] if isinstance(x, Node) else ()


def _read_both(q: Any, k: Any) -> tuple[Rotary, Rotary] | None:
    """The rotary embeddings of queries and of keys, by the same angles."""
    of_q, of_k = read_rotary(q), read_rotary(k)
    if of_q is None or of_k is None or (of_q.cos, of_q.sin) != (of_k.cos, of_k.sin) or q is k:
        return None
    return of_q, of_k


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
