"""The pipeline: passes over a captured graph, as a list, and the driver that checks each one.

A pass is a function `(graph_module, plan) -> PassResult`. It edits the graph it is given and reports what it did; the
driver lints after each and recompiles at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from qpass.graph.provenance import stand_for
from qpass.graph.torch_private import mark_static_input
from qpass.graph.vocabulary import op_name
from qpass.qtensor import QTensor
from qpass.quantized import PART_NAMES
from qpass.sites import fuse as fusing
from qpass.sites import grouped, kv, rotary, weight
from qpass.sites.core import Edit, Plan
from qpass.sites.group import WeightGroup, group_weights

#: Where the values of a new graph input come from: `node.meta[INPUT]` of its placeholder is a GraphInput or a StateInput.
INPUT = "qpass_input"
#: What a group of weights is stored as.
GROUP_PARTS = (*PART_NAMES, "bias")


@dataclass(frozen=True)
class GraphInput:
    """A placeholder that a pass added: part number `part` (see GROUP_PARTS) of the stored weights of `group`."""

    group: WeightGroup
    part: int


@dataclass(frozen=True)
class StateInput:
    """A placeholder for part number `part` of the QState that was argument number `argument` of the captured graph."""

    argument: int
    part: int


@dataclass(frozen=True)
class PassResult:
    """The graph after a pass, the plan that goes with it, and the pass's own account of its edits."""

    graph_module: GraphModule
    plan: Plan
    edits: tuple[Edit, ...] = ()


Pass = Callable[[GraphModule, Plan], PassResult]


@dataclass(frozen=True)
class Convert:
    """Replace every matched call by a quantized operator, its weight by placeholders for the stored parts.

    `parameters`: placeholders that are Parameters. `fake_parts`: a group -> fake tensors of GROUP_PARTS.
    """

    parameters: Mapping[Node, Tensor]
    fake_parts: Callable[[WeightGroup], Sequence[Tensor | None]]

    def __call__(self, graph_module: GraphModule, plan: Plan) -> PassResult:
        graph = graph_module.graph
        groups = group_weights(plan, self.parameters)
        first = next(n for n in graph.nodes if n.op != "placeholder")
        weights = {n.name: n for n in self.parameters}
        inputs: dict[WeightGroup, list[Node | None]] = {}
        with graph.inserting_before(first):
            for group in dict.fromkeys(group for group, _ in groups):
                parts = enumerate(self.fake_parts(group))
                inputs[group] = [
                    None if t is None else _placeholder(graph, GraphInput(group, i), t, weights) for i, t in parts
                ]
        edits: list[Edit] = []
        for group, matches in groups:
            edits += weight.rewrite(graph, group, matches, inputs[group])
        edits += [kv.rewrite(graph, match) for match in plan.matches if match.weight is None]
        added = tuple(n.name for parts in inputs.values() for n in parts if n is not None)
        edits.append(Edit("convert", "", (), added))
        return PassResult(graph_module, plan, tuple(edits))


def share_key_heads(graph_module: GraphModule, plan: Plan) -> PassResult:
    """Attention over a float cache that is shared by groups of query heads reads it without a copy for each of them."""
    return PassResult(graph_module, plan, tuple(grouped.rewrite(graph_module.graph)))


def fuse(graph_module: GraphModule, plan: Plan) -> PassResult:
    """Quantized linears take in the norms before them, the gates and residuals behind them; caches the rotary embedding."""
    graph = graph_module.graph
    return PassResult(graph_module, plan, (*fusing.rewrite(graph), *rotary.rewrite(graph)))


def clean(graph_module: GraphModule, plan: Plan) -> PassResult:
    """Drop the placeholders of float weights that nothing reads any more, and switches of the grad mode.

    The graph runs as inference; a `no_grad` block inside the model would switch gradients on again at its end.
    """
    removed = []
    weights = {m.weight.name for m in plan.matches if m.weight is not None}
    biases = {b.name for m in plan.matches if (b := getattr(m.call, "bias", None)) is not None}
    for node in list(graph_module.graph.nodes):
        unread = node.op == "placeholder" and not node.users and node.name in weights | biases
        if unread or op_name(node) == "_set_grad_enabled":
            removed.append(node.name)
            graph_module.graph.erase_node(node)
    return PassResult(graph_module, plan, (Edit("clean", "", tuple(removed), ()),))


def run_passes(graph_module: GraphModule, plan: Plan, passes: Sequence[Pass]) -> PassResult:
    """Run each pass, lint after it, collect the edits; recompile at the end."""
    edits: list[Edit] = []
    for each in passes:
        result = each(graph_module, plan)
        result.graph_module.graph.lint()
        graph_module, plan = result.graph_module, result.plan
        edits += result.edits
    graph_module.recompile()
    return PassResult(graph_module, plan, _settled(edits))


def _settled(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """All edits as if done at once: where one took away what an earlier one had added, what it added is of that one."""
    account: list[Edit] = []
    by: dict[str, int] = {}  # name of an added node -> its edit
    for edit in edits:
        earlier = {by[name] for name in edit.removed if name in by}
        for i in earlier:
            left = (name for name in account[i].added if name not in edit.removed)
            account[i] = replace(account[i], added=(*left, *edit.added))
        by |= dict.fromkeys(edit.added, max(earlier, default=len(account)))
        removed = tuple(name for name in edit.removed if name not in by)
        account.append(replace(edit, removed=removed, added=() if earlier else edit.added))
    return tuple(account)


def _placeholder(graph: Graph, source: GraphInput, fake: Tensor, weights: Mapping[str, Node]) -> Node:
    part, first = GROUP_PARTS[source.part], source.group.weights[0]
    node = graph.placeholder(f"q_{first}_{part}")
    node.meta = {"example_value": fake, INPUT: source, "label": part}
    stand_for([node], [weights[name] for name in source.group.weights])
    mark_static_input(node)
    return node


def parameter_nodes(graph_module: GraphModule, inputs: Sequence[object]) -> dict[Node, Tensor]:
    """The placeholders whose real argument is a Parameter (a QTensor is always one)."""
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    pairs = zip(placeholders, inputs, strict=True)
    return {node: value for node, value in pairs if isinstance(value, torch.nn.Parameter | QTensor)}
