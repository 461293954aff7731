"""What the compiler must make at once and whole: it makes what is needed where it is needed, and as often.

Nothing is rewritten by it that a diff would show.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qpass.graph.flow import Order, memory_of
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import op_name, set_value, source_of, value_of, written_by

_MASK = 12  # of qpass::attention


def share_masks(graph_module: GraphModule) -> None:
    """mask, expanded or not, of several qpass::attention -> qpass::once of it, as it was before it was expanded."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.qpass.attention.default):
        mask = _before_expansion(node.args[_MASK])
        if isinstance(mask, Node) and mask.op != "placeholder":
            readers[mask].append(node)
    order = Order.in_graph(graph_module.graph)
    for mask, attentions in readers.items():
        if len(attentions) > 1 and not order.is_written([mask], attentions[0], attentions[-1]):
            shared = _once(graph_module, mask, attentions[0])
            for node in attentions:
                node.update_arg(_MASK, shared)
    graph_module.graph.lint()
    graph_module.recompile()


def keep_readers_apart(graph_module: GraphModule) -> None:
    """What an operator of qpass writes to, and others read before it, as the length of a cache -> they read qpass::once of it.

    Inductor of torch 2.13 reads where it computes, which may be after the operator: that it has written it knows too late.
    """
    graph = graph_module.graph
    order = Order.in_graph(graph)
    first: dict[Node, Node] = {}  # what is written to -> by whom first
    for node in order.of:
        if op_name(node).startswith("qpass::"):
            first |= {target: node for target in written_by(node) if target not in first}
    for target, writer in first.items():
        memory, begin = memory_of([target]), next(n for n in order.of if n.op != "placeholder")
        if order.is_written([target], begin, writer):
            continue
        before = [n for n, i in order.of.items() if i < order.of[writer]]
        for alias in [n for n in before if memory_of([n]) & memory]:
            readers = [n for n in alias.users if order.of.get(n, len(order.of)) < order.of[writer]]
            readers = [n for n in readers if not memory_of([n]) & memory]
            if readers:
                copy = _once(graph_module, alias, min(readers, key=order.of.__getitem__))
                for reader in readers:
                    reader.replace_input_with(alias, copy)
    graph.lint()
    graph_module.recompile()


def _once(graph_module: GraphModule, x: Node, reader: Node) -> Node:
    """A copy, right before what reads it."""
    with graph_module.graph.inserting_before(reader):
        copy = graph_module.graph.call_function(torch.ops.qpass.once.default, (x,))
    set_value(copy, value_of(x))
    stand_for([copy], [x])
    return copy


def _before_expansion(mask: Any) -> Any:
    """The operator expands a mask itself."""
    while isinstance(mask, Node) and op_name(mask) == "expand":
        mask = source_of(mask)
    return mask
