"""Rewriting what computes with a Parameter: linears (several of one input as one operation) and embeddings."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.fx import Graph, Node

from qpass.graph.calls import EmbeddingCall, LinearCall
from qpass.graph.flow import memory_behind
from qpass.graph.vocabulary import shape_of, value_of, writes_to
from qpass.sites.core import Edit, Match, Plan
from qpass.spec import QuantSpec

#: Kinds whose linears of one input become one operation: q, k, v; gate, up.
FUSED_KINDS = ("qkv", "ffn")


@dataclass(frozen=True)
class WeightGroup:
    """Parameters that are quantized to one spec and stored as one: rows of `weights` below each other, in order.

    `weights`, `biases`: names of the placeholders (a lone linear keeps its bias for itself: None). `names`: display names.
    `transposed`: which are [in, out].
    """

    weights: tuple[str, ...]
    names: tuple[str, ...]
    transposed: tuple[bool, ...]
    biases: tuple[str | None, ...]
    spec: QuantSpec

    @property
    def has_bias(self) -> bool:
        """Whether the biases are stored as one with the group."""
        return any(b is not None for b in self.biases)

    def subset(self, indices: Sequence[int]) -> WeightGroup:
        """The group of some of its members."""
        weights, names = (tuple(x[i] for i in indices) for x in (self.weights, self.names))
        return WeightGroup(
            weights,
            names,
            tuple(self.transposed[i] for i in indices),
            tuple(self.biases[i] for i in indices),
            self.spec,
        )


def group_weights(plan: Plan, parameters: Mapping[Node, object]) -> list[tuple[WeightGroup, list[Match]]]:
    """The plan's weight matches as groups: linears of one input, kind and spec together, everything else by itself.

    A Parameter is in one group only: where its uses would be grouped in different ways, they stay by themselves.
    """
    together: dict[object, list[Match]] = {}
    written = _written_memory(plan)
    for match in plan.matches:
        if match.weight is None:
            continue
        call, spec = match.call, plan.specs[match.site]
        key: object = match.node
        if match.site.kind in FUSED_KINDS and isinstance(call, LinearCall) and _may_join(call, parameters, written):
            key = (call.x, match.site.kind, spec)
        together.setdefault(key, []).append(match)
    partners: dict[Node, set[tuple[str, ...]]] = {}
    for group in together.values():
        for match in group:
            partners.setdefault(match.weight, set()).add(tuple(m.weight.name for m in group))  # type: ignore[union-attr, arg-type]
    grouped: list[tuple[WeightGroup, list[Match]]] = []
    for group in together.values():
        weights = [m.weight for m in group]
        if len(set(weights)) == len(weights) and all(len(partners[w]) == 1 for w in weights):  # type: ignore[index]
            grouped.append((_as_group(group, plan), group))
        else:
            grouped += [(_as_group([m], plan), [m]) for m in group]
    return grouped


def rewrite(graph: Graph, group: WeightGroup, matches: Sequence[Match], inputs: Sequence[Node | None]) -> list[Edit]:
    """Replace the matched calls of one group by one operator. `inputs`: the placeholders of its five stored parts."""
    *parts, bias = inputs
    call = matches[0].call
    if isinstance(call, EmbeddingCall):
        dtype = value_of(call.node).dtype
        columns = matches[0].site.shape[1]
        with graph.inserting_before(call.node):
            args = (_current(call.indices), *parts, columns, str(group.spec), dtype)
            new = graph.call_function(torch.ops.qpass.embedding.default, args)
        new.meta = dict(call.node.meta)
        return [_replace(graph, matches[0], [new], new)]
    with graph.inserting_before(call.node):  # the first of the group in graph order
        x = _as_computed(graph, call)
        args = (x, *parts, _bias_of(call) if len(matches) == 1 else bias, str(group.spec))
        fused = graph.call_function(torch.ops.qpass.linear.default, args)
        fused.meta = dict(call.node.meta)
        if len(matches) == 1:
            return [_replace(graph, matches[0], [fused], fused)]
        rows = [m.site.shape[1 if t else 0] for m, t in zip(matches, group.transposed, strict=True)]
        value = value_of(call.node)
        fused.meta["example_value"] = value.new_empty((*shape_of(call.node)[:-1], sum(rows)))  # type: ignore[index]
        pieces = graph.call_function(torch.split, (fused, rows), {"dim": -1})
        outputs = [graph.call_function(operator.getitem, (pieces, i)) for i in range(len(matches))]
    edits = []
    for i, (match, output) in enumerate(zip(matches, outputs, strict=True)):
        output.meta = dict(match.node.meta)
        edits.append(_replace(graph, match, [fused, pieces, output] if i == 0 else [output], output))
    return edits


def _as_computed(graph: Graph, call: LinearCall) -> Node:
    """The input in the type that the linear computed in: under autocast it was cast on the way in, unseen in the graph."""
    x, dtype = _current(call.x), value_of(call.node).dtype
    return x if value_of(call.x).dtype == dtype else graph.call_method("to", (x, dtype))


_REPLACED = "qpass_replaced_by"


def _current(node: Node) -> Node:
    """What stands in the graph for a node that was matched: an earlier rewrite may have replaced it."""
    while _REPLACED in node.meta:
        node = node.meta[_REPLACED]
    return node


def _as_group(matches: Sequence[Match], plan: Plan) -> WeightGroup:
    calls = [m.call for m in matches]
    return WeightGroup(
        tuple(m.weight.name for m in matches),  # type: ignore[union-attr]
        tuple(m.site.name for m in matches),
        tuple(isinstance(c, LinearCall) and c.transposed for c in calls),
        tuple(c.bias.name if len(calls) > 1 and c.bias is not None else None for c in calls),
        plan.specs[matches[0].site],
    )


def _bias_of(call: LinearCall | EmbeddingCall) -> Node | None:
    return _current(call.bias) if isinstance(call, LinearCall) and call.bias is not None else None


def _may_join(call: LinearCall, parameters: Mapping[Node, object], written: set[Node]) -> bool:
    """Not if the bias is computed, or something writes to the input: between two linears of a group, perhaps."""
    return (call.bias is None or call.bias in parameters) and memory_behind(call.x) not in written


def _written_memory(plan: Plan) -> set[Node]:
    if not plan.matches:
        return set()
    targets = (writes_to(node) for node in plan.matches[0].node.graph.nodes)
    return {memory_behind(target) for target in targets if target is not None}


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
