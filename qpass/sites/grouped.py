"""Grouped queries over a float cache: attention reads the few heads that are stored, not a copy of them for every query head.

No site is quantized by it. But a decode step with float keys and values would write and read them Hq / Hk times, more bytes than
a quantized feed-forward has.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.attention import read_whole
from qpass.graph.flow import memory_behind
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import CASTS, SDPA, argument, op_name, shape_of, source_of, value_of, writes_to
from qpass.sites.core import Edit, erase_unused
from qpass.sites.kv import as_one

#: A tensor of such values is stored in the format of that name.
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def rewrite(graph: Graph) -> list[Edit]:
    """repeat heads of K and V, attention -> one qpass::attention of K and V as they are, on CPU tensors."""
    return [edit for node in list(graph.nodes) if (edit := _rewrite(graph, node)) is not None]


def _rewrite(graph: Graph, node: Node) -> Edit | None:
    if op_name(node) not in SDPA or argument(node, 4, "dropout_p", 0.0):
        return None
    q, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    grouped = argument(node, 7, "enable_gqa", False)
    k, v = (x if grouped else _before_repeating(x) for x in (key, value))
    if k is None or v is None or any(len(shape_of(x) or ()) != 4 for x in (q, k, v)):
        return None
    kinds = {(value_of(x).dtype, value_of(x).device.type) for x in (q, k, v)}
    dtype, device = kinds.pop()
    columns = shape_of(v)[3]  # type: ignore[index]
    fits = not kinds and dtype in _FLOATS and device == "cpu" and isinstance(columns, int)
    copies = {copy: kept for copy, kept in ((key, k), (value, v)) if copy is not kept}
    if not fits or _heads(q) == _heads(k) or _written_between(graph, copies, node):
        return None
    rest = (argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False), argument(node, 6, "scale"))
    parts = ((k, None, None, None, _FLOATS[dtype]), (v, None, None, None, columns, _FLOATS[dtype]))
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.qpass.attention.default, (q, *parts[0], *parts[1], *rest))
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    removed = erase_unused(graph, node)
    stand_for([new], removed)
    return Edit("share_key_heads", "", tuple(n.name for n in removed), (new.name,))


def rewrite_every(graph: Graph) -> list[Edit]:
    """Each attention over floats [B, H, S, D] that can be read in full, fused or written out, -> one qpass::attention."""
    edits = []
    for node in list(graph.nodes):
        whole = read_whole(node)
        if whole is None or any(len(shape_of(x) or ()) != 4 for x in (whole.q, whole.k, whole.v)):
            continue
        k, v = _before_repeating(whole.k), _before_repeating(whole.v)
        if k is None or v is None:
            k, v = whole.k, whole.v
        dtype, columns = value_of(k).dtype, shape_of(v)[3]  # type: ignore[index]
        if (
            dtype not in _FLOATS
            or value_of(v).dtype != dtype
            or _written_between(graph, {whole.k: k, whole.v: v}, node)
        ):
            continue
        before = set(graph.nodes)
        with graph.inserting_before(node):
            none = (None,) * 3
            new = as_one(graph, whole, (k, *none, _FLOATS[dtype]), (v, *none, columns, _FLOATS[dtype]), None)
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        added = [n for n in graph.nodes if n not in before]
        removed = erase_unused(graph, node)  # the scores, and copies for the query heads, too
        stand_for(added, removed)
        edits.append(Edit("attention_as_one", "", tuple(n.name for n in removed), tuple(n.name for n in added)))
    return edits


def _heads(node: Node) -> Any:
    return shape_of(node)[1]  # type: ignore[index]


def _before_repeating(value: Any) -> Node | None:
    """The [B, Hk, S, D] whose every head `value` [B, Hq, S, D] holds Hq / Hk times in a row; None if it is not made so."""
    if op_name(value) == "repeat_interleave":
        same = argument(value, 2, "dim") in (1, -3) and isinstance(argument(value, 1, "repeats"), int)
        return source_of(value) if same else None
    node, expanded = value, False
    while isinstance(node, Node) and op_name(node) in {"reshape", "view", "flatten", "expand"} | CASTS:
        expanded |= op_name(node) == "expand"
        node = source_of(node)
    if not expanded or not isinstance(node, Node) or not _inserts_group(node):
        return None
    base = source_of(node)
    before, after = shape_of(base), shape_of(value)
    same = before is not None and after is not None and len(before) == len(after) == 4
    ratio = same and after[1] % before[1] == 0 and (before[0], *before[2:]) == (after[0], *after[2:])  # type: ignore[index]
    return base if ratio and value_of(base).dtype == value_of(value).dtype else None


def _inserts_group(node: Node) -> bool:
    """[B, H, S, D] -> [B, H, 1, S, D]"""
    if op_name(node) == "unsqueeze":
        return argument(node, 1, "dim") in (2, -3) and len(shape_of(node) or ()) == 5
    if node.target is not operator.getitem or not isinstance(node.args[1], tuple):
        return False
    whole = slice(None)
    return (*node.args[1], *[whole] * (5 - len(node.args[1]))) == (whole, whole, None, whole, whole)


def _written_between(graph: Graph, copies: Mapping[Node, Node], attention: Node) -> bool:
    """Whether K or V changes in place after it was copied (copy -> what it is a copy of) and before the attention."""
    order = {n: i for i, n in enumerate(graph.nodes)}
    copied = {memory_behind(kept): order[copy] for copy, kept in copies.items()}
    changed = [(n, memory_behind(target)) for n in graph.nodes if (target := writes_to(n)) is not None]
    return any(root in copied and copied[root] < order[n] < order[attention] for n, root in changed)
