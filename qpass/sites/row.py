"""Quantized linears that follow one another become one call on the CPU, where a decode step of a small model is made of calls.

It is no rewrite of a site: what is computed stays as it was, and a diff shows the linears.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from qpass.graph.flow import Order
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import set_value, value_of
from qpass.ops.steps import LETTERS, Step

_LINEAR = torch.ops.qpass.linear.default


def join_linears(graph_module: GraphModule) -> None:
    """qpass::linear, each of the result of the one before it -> one qpass::linears at the place of the last of them.

    It gives the result of the last, and of one other that is read elsewhere."""
    graph = graph_module.graph
    order, joined = Order.in_graph(graph), set[Node]()
    rows = []
    for node in graph.nodes:
        if _is_linear(node) and node not in joined:
            row = _row_from(node, order)
            joined.update(row)
            rows += [row] if len(row) > 1 else []
    for row in rows:
        _join(graph, row)
    graph.lint()
    graph_module.recompile()


def _is_linear(node: Node) -> bool:
    value = value_of(node) if node.target is _LINEAR else None
    return value is not None and value.device.type == "cpu"


def _row_from(first: Node, order: Order) -> list[Node]:
    row = [first]
    while True:
        following = [n for n in row[-1].users if _is_linear(n) and n.args[0] is row[-1]]
        if len(following) != 1 or not order.may_move(row, following[0]):
            return row
        last, longer = order.of[following[0]], [*row, *following]
        read = [[user for user in node.users if user not in longer] for node in row]
        if sum(map(bool, read)) > 1 or any(order.of[user] < last for users in read for user in users):
            return row
        row = longer


def _join(graph: Graph, row: Sequence[Node]) -> None:
    steps, tensors = [], list[Node]()
    for node in row:
        _, *parts_and_bias, spec, norm, eps, column_scale, gate, residual = (*node.args, *_NOTHING_AROUND)[:_ARGUMENTS]
        before = row.index(residual) if residual in row else None
        all_tensors = (*parts_and_bias, norm, column_scale, residual if before is None else None)
        given = {letter: tensor for letter, tensor in zip(LETTERS, all_tensors, strict=True) if tensor is not None}
        kept = node is not row[-1] and any(user not in row for user in node.users)
        steps.append(Step(str(spec), "".join(given), eps, str(gate), before, kept))  # type: ignore[arg-type]
        tensors += given.values()  # type: ignore[arg-type]
    read = [row[-1], *(node for node, step in zip(row, steps, strict=True) if step.kept)]
    with graph.inserting_before(row[-1]):
        new = graph.call_function(torch.ops.qpass.linears.default, (row[0].args[0], tensors, "|".join(map(str, steps))))
        results = [graph.call_function(operator.getitem, (new, i)) for i in range(len(read))]
    stand_for([new, *results], row)
    for node, result in zip(read, results, strict=True):
        set_value(result, value_of(node))
        node.replace_all_uses_with(result, delete_user_cb=lambda user: user not in row)
    for node in reversed(row):
        graph.erase_node(node)


#: The arguments of qpass::linear, and the last of them where they are not given.
_ARGUMENTS, _NOTHING_AROUND = 12, (None, None, None, "", None)
