"""Rewriting what computes with a Parameter: linears (several of one input as one operation), experts, embeddings."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.compute import multiplies_fp8, multiplies_integers
from qpass.graph.calls import EmbeddingCall, LinearCall, Route
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import set_value, shape_of, value_of
from qpass.sites.core import REPLACED, Edit, Match, current
from qpass.sites.group import WeightGroup
from qpass.spec import QuantSpec

_aten = torch.ops.aten


class _Insert:
    """Adds calls to a graph and remembers them."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes: list[Node] = []

    def __call__(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        self.nodes.append(self.graph.call_function(target, args, kwargs))
        return self.nodes[-1]


@dataclass(frozen=True)
class Stored:
    """Placeholders of a group: what operators read of the weight, what is done to its input, the biases as one."""

    parts: Sequence[Node | None]
    column_scale: Node | None
    input_scale: Node | None
    input_zero_point: Node | None
    bias: Node | None


def rewrite(graph: Graph, group: WeightGroup, matches: Sequence[Match], inputs: Sequence[Node | None]) -> list[Edit]:
    """Replace the matched calls of one group by one operator. `inputs`: the placeholders of its stored parts (GROUP_PARTS)."""
    call, insert = matches[0].call, _Insert(graph)
    stored = Stored(inputs[:4], *inputs[4:])
    with graph.inserting_before(call.node):  # the first of the group in graph order
        if isinstance(call, EmbeddingCall):
            outputs = [_embedding(insert, call, group, matches[0].site.shape[1], stored)]
        elif call.route is not None:
            outputs = [_experts(insert, call, call.route, group, stored)]
        else:
            outputs = _linears(insert, group, matches, stored)
    edits = []
    for match, output in zip(matches, outputs, strict=True):
        output.meta = dict(match.node.meta)
    stand_for(insert.nodes, [match.node for match in matches])
    for i, (match, output) in enumerate(zip(matches, outputs, strict=True)):
        added = [n for n in insert.nodes if n not in outputs[1:]] if i == 0 else [output]
        edits.append(_replace(graph, match, added, output))
    return edits


def _embedding(insert: _Insert, call: EmbeddingCall, group: WeightGroup, columns: int, stored: Stored) -> Node:
    dtype, indices = value_of(call.node).dtype, current(call.indices)
    if call.wraps:
        indices = insert(_aten.remainder.Scalar, indices, shape_of(call.weight)[0])  # type: ignore[index]
    rows = insert(torch.ops.qpass.embedding.default, indices, *stored.parts, columns, str(group.spec), dtype)
    return rows if stored.column_scale is None else _cast(insert, _scaled(insert, rows, stored), dtype)


def _linears(insert: _Insert, group: WeightGroup, matches: Sequence[Match], stored: Stored) -> list[Node]:
    """One operator; its result in pieces, if it stands for several linears."""
    call: LinearCall = matches[0].call
    parts, spec, dtype = stored.parts, group.spec, value_of(call.node).dtype
    if call.rows is not None:
        whole = shape_of(parts[0])[0]  # type: ignore[arg-type, index]
        parts = [_cut(insert, part, whole, call.rows) for part in parts]
    bias = _bias_of(call) if len(matches) == 1 else stored.bias
    if spec.activations is not None and spec.activations.in_blocks:
        x = _cast(insert, _scaled(insert, _input(insert, call, dtype), stored), dtype)
        fused = insert(torch.ops.qpass.block_linear.default, x, *parts, bias, str(spec))
    elif spec.activations is not None and _is_quantized(spec.activations, stored) and _multiplies_codes(spec, parts[0]):
        codes, *of_input = _codes(insert, _input(insert, call, None), spec.activations, stored)
        zero = of_input[1] if len(of_input) > 1 else None
        fused = insert(torch.ops.qpass.integer_linear.default, codes, of_input[0], zero, *parts, bias, str(spec), dtype)
    else:
        fused = insert(torch.ops.qpass.linear.default, _ready(insert, call, group, stored), *parts, bias, str(spec))
    if len(matches) == 1:
        return [_output(insert, call, fused)]
    rows = [m.site.shape[1 if t else 0] for m, t in zip(matches, group.transposed, strict=True)]
    fused.meta = dict(call.node.meta)
    set_value(fused, value_of(call.node).new_empty((*shape_of(call.node)[:-1], sum(rows))))  # type: ignore[index]
    pieces = insert(_aten.split_with_sizes.default, fused, rows, -1)
    return [insert(operator.getitem, pieces, i) for i in range(len(matches))]


def _multiplies_codes(spec: QuantSpec, data: Node | None) -> bool:
    """Whether the products are of codes; of fp8 only on a GPU that has them."""
    return multiplies_integers(spec) or (data is not None and multiplies_fp8(spec, value_of(data).device.type))


def _is_quantized(activations: QuantSpec, stored: Stored) -> bool:
    """A static input without a scale was found too wide for one."""
    return not activations.static or stored.input_scale is not None


def _codes(insert: _Insert, x: Node, activations: QuantSpec, stored: Stored) -> list[Node]:
    """Codes, scale and, if there is one, zero point of the input."""
    x = _scaled(insert, x, stored)
    given = [n for n in (stored.input_scale, stored.input_zero_point) if n is not None]
    made = insert(
        torch.ops.qpass.quantize_input.default, x, stored.input_scale, stored.input_zero_point, str(activations)
    )
    count = 1 if given else 3 if activations.has_zero_point else 2
    return [insert(operator.getitem, made, i) for i in range(count)] + given


def _ready(insert: _Insert, call: LinearCall, group: WeightGroup, stored: Stored) -> Node:
    """The input as floats, after its columns were scaled and it was rounded, if the spec says so."""
    dtype, activations = value_of(call.node).dtype, group.spec.activations
    x = _scaled(insert, _input(insert, call, dtype), stored)
    if activations is not None and activations.in_blocks:
        x = insert(torch.ops.qpass.round_blocks.default, _cast(insert, x, dtype), str(activations))
    elif activations is not None and _is_quantized(activations, stored):
        x = insert(
            torch.ops.qpass.round_input.default, x, stored.input_scale, stored.input_zero_point, str(activations)
        )
    return x if stored.column_scale is None else _cast(insert, x, dtype)


def _scaled(insert: _Insert, x: Node, stored: Stored) -> Node:
    """In float32, which the compiler keeps in registers."""
    if stored.column_scale is None:
        return x
    row = insert(_aten.select.int, stored.column_scale, 0, 0)
    set_value(row, value_of(stored.column_scale)[0])
    scaled = insert(_aten.mul.Tensor, x, row)
    if value_of(x) is not None:
        set_value(scaled, value_of(x) * value_of(row))
    return scaled


def _cast(insert: _Insert, x: Node, dtype: torch.dtype) -> Node:
    return x if dtype == torch.float32 else insert(_aten.to.dtype, x, dtype)


def _cut(insert: _Insert, part: Node | None, whole: int, rows: tuple[int, int]) -> Node | None:
    """Rows of a stored part; a part that has one row for all of them is kept."""
    if part is None or shape_of(part)[0] != whole:  # type: ignore[index]
        return part
    cut = insert(_aten.slice.Tensor, part, 0, *rows)
    cut.meta = dict(part.meta)
    cut.meta.pop("qpass_input", None)
    set_value(cut, value_of(part)[rows[0] : rows[1]])
    return cut


def _experts(insert: _Insert, call: LinearCall, route: Route, group: WeightGroup, stored: Stored) -> Node:
    """qpass::experts, with the id of an expert for each row of x, however the model says it."""
    x, device = _ready(insert, call, group, stored), value_of(call.node).device
    given = current(route.value) if isinstance(route.value, Node) else route.value
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
        insert, call, insert(torch.ops.qpass.experts.default, x, ids, *stored.parts, route.experts, str(group.spec))
    )


def _input(insert: _Insert, call: LinearCall, dtype: torch.dtype | None) -> Node:
    """[.., tokens, in] in the type that the linear computed in: autocast casts on the way in, unseen in the graph."""
    x = current(call.x)
    if dtype is not None and value_of(call.x).dtype != dtype:
        x = insert(_aten.to.dtype, x, dtype)
    return insert(_aten.transpose.int, x, -2, -1) if call.columns else x


def _output(insert: _Insert, call: LinearCall, y: Node) -> Node:
    return insert(_aten.transpose.int, y, -2, -1) if call.columns else y


def _bias_of(call: LinearCall | EmbeddingCall) -> Node | None:
    return current(call.bias) if isinstance(call, LinearCall) and call.bias is not None else None


def _replace(graph: Graph, match: Match, added: Sequence[Node], output: Node) -> Edit:
    """Redirect the users of the matched node, then erase it and the casts and transpositions of its weight."""
    call = match.call
    match.node.replace_all_uses_with(output)
    match.node.meta[REPLACED] = output
    activations = {current(call.indices if isinstance(call, EmbeddingCall) else call.x), _bias_of(call)}
    removed, dead = [], [match.node]
    while dead:
        node = dead.pop()
        if node.users or node.op == "placeholder":
            continue
        dead += [n for n in node.all_input_nodes if n not in activations]
        removed.append(node.name)
        graph.erase_node(node)
    return Edit("convert", match.site.name, tuple(removed), tuple(n.name for n in added))
