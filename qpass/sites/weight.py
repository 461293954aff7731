"""Rewriting what computes with a Parameter: linears (several of one input as one operation), experts, embeddings."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.calls import EmbeddingCall, LinearCall, Route
from qpass.graph.vocabulary import set_value, shape_of, value_of
from qpass.sites.core import Edit, Match
from qpass.sites.group import WeightGroup

_aten = torch.ops.aten


class _Insert:
    """Adds calls to a graph and remembers them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        self.nodes.append(self.graph.call_function(target, args, kwargs))
        return self.nodes[-1]


def rewrite(graph: Graph, group: WeightGroup, matches: Sequence[Match], inputs: Sequence[Node | None]) -> list[Edit]:
    """Replace the matched calls of one group by one operator. `inputs`: the placeholders of its five stored parts."""
    call, insert = matches[0].call, _Insert(graph)
    with graph.inserting_before(call.node):  # the first of the group in graph order
        if isinstance(call, EmbeddingCall):
            outputs = [_embedding(insert, call, group, matches[0].site.shape[1], inputs[:4])]
        elif call.route is not None:
            outputs = [_experts(insert, call, call.route, group, inputs[:4])]
        else:
            outputs = _linears(insert, group, matches, inputs)
    for node in insert.nodes:  # where they belong, for whoever reads the graph
        node.meta.setdefault("nn_module_stack", call.node.meta.get("nn_module_stack"))
    edits = []
    for i, (match, output) in enumerate(zip(matches, outputs, strict=True)):
        output.meta = dict(match.node.meta)
        added = [n for n in insert.nodes if n not in outputs[1:]] if i == 0 else [output]
        edits.append(_replace(graph, match, added, output))
    return edits


def _embedding(
    insert: _Insert, call: EmbeddingCall, group: WeightGroup, columns: int, parts: Sequence[Node | None]
) -> Node:
    dtype, indices = value_of(call.node).dtype, _current(call.indices)
    if call.wraps:
        indices = insert(_aten.remainder.Scalar, indices, shape_of(call.weight)[0])  # type: ignore[index]
    return insert(torch.ops.qpass.embedding.default, indices, *parts, columns, str(group.spec), dtype)


def _linears(
    insert: _Insert, group: WeightGroup, matches: Sequence[Match], inputs: Sequence[Node | None]
) -> list[Node]:
    """One qpass::linear; its result in pieces, if it stands for several."""
    *parts, bias = inputs
    call: LinearCall = matches[0].call
    x = _input(insert, call)
    if call.rows is not None:
        whole = shape_of(inputs[0])[0]  # type: ignore[arg-type, index]
        parts = [_cut(insert, part, whole, call.rows) for part in parts]
    bias = _bias_of(call) if len(matches) == 1 else bias
    fused = insert(torch.ops.qpass.linear.default, x, *parts, bias, str(group.spec))
    if len(matches) == 1:
        return [_output(insert, call, fused)]
    rows = [m.site.shape[1 if t else 0] for m, t in zip(matches, group.transposed, strict=True)]
    fused.meta = dict(call.node.meta)
    set_value(fused, value_of(call.node).new_empty((*shape_of(call.node)[:-1], sum(rows))))  # type: ignore[index]
    pieces = insert(_aten.split_with_sizes.default, fused, rows, -1)
    return [insert(operator.getitem, pieces, i) for i in range(len(matches))]


def _cut(insert: _Insert, part: Node | None, whole: int, rows: tuple[int, int]) -> Node | None:
    """Rows of a stored part; a part that has one row for all of them is kept."""
    if part is None or shape_of(part)[0] != whole:  # type: ignore[index]
        return part
    cut = insert(_aten.slice.Tensor, part, 0, *rows)
    cut.meta = dict(part.meta)
    cut.meta.pop("qpass_input", None)
    set_value(cut, value_of(part)[rows[0] : rows[1]])
    return cut


def _experts(insert: _Insert, call: LinearCall, route: Route, group: WeightGroup, parts: Sequence[Node | None]) -> Node:
    """qpass::experts, with the id of an expert for each row of x, however the model says it."""
    x, device = _input(insert, call), value_of(call.node).device
    given = _current(route.value) if isinstance(route.value, Node) else route.value
    if route.how == "offsets":
        rows = insert(_aten.arange.default, insert(_aten.sym_size.int, x, 0), device=device)
        ids = insert(_aten.searchsorted.Tensor, given, rows, right=True)
    elif route.how == "ids":
        ids = insert(_aten.unsqueeze.default, given, 1)
    elif route.how == "each":
        ids = insert(_aten.unsqueeze.default, insert(_aten.arange.default, route.experts, device=device), 1)
    else:
        ids = insert(_aten.full.default, [1], given, dtype=torch.int64, device=device)
    return _output(
        insert, call, insert(torch.ops.qpass.experts.default, x, ids, *parts, route.experts, str(group.spec))
    )


def _input(insert: _Insert, call: LinearCall) -> Node:
    """[.., tokens, in] in the type that the linear computed in: autocast casts on the way in, unseen in the graph."""
    x, dtype = _current(call.x), value_of(call.node).dtype
    if value_of(call.x).dtype != dtype:
        x = insert(_aten.to.dtype, x, dtype)
    return insert(_aten.transpose.int, x, -2, -1) if call.columns else x


def _output(insert: _Insert, call: LinearCall, y: Node) -> Node:
    return insert(_aten.transpose.int, y, -2, -1) if call.columns else y


_REPLACED = "qpass_replaced_by"


def _current(node: Node) -> Node:
    """What stands in the graph for a node that was matched: an earlier rewrite may have replaced it."""
    while _REPLACED in node.meta:
        node = node.meta[_REPLACED]
    return node


def _bias_of(call: LinearCall | EmbeddingCall) -> Node | None:
    return _current(call.bias) if isinstance(call, LinearCall) and call.bias is not None else None


def _replace(graph: Graph, match: Match, added: Sequence[Node], output: Node) -> Edit:
    """Redirect the users of the matched node, then erase it and the casts and transpositions of its weight."""
    call = match.call
    match.node.replace_all_uses_with(output)
    match.node.meta[_REPLACED] = output
    activations = {_current(call.indices if isinstance(call, EmbeddingCall) else call.x), _bias_of(call)}
    removed, dead = [], [match.node]
    while dead:
        node = dead.pop()
        if node.users or node.op == "placeholder":
            continue
        dead += [n for n in node.all_input_nodes if n not in activations]
        removed.append(node.name)
        graph.erase_node(node)
    return Edit("convert", match.site.name, tuple(removed), tuple(n.name for n in added))
