"""A product that Inductor's own kernel does best, for one row on a GPU, is written out for it: table.py says which.

It is no rewrite of a site: what is computed stays as it was, and a diff shows the linear.
"""

from __future__ import annotations

import math

import torch
from torch.fx import Graph, GraphModule, Node

from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import SPLITS, op_name, set_value, shape_of, value_of
from qpass.ops.triton.table import written_out

_aten = torch.ops.aten


def write_out_products(graph_module: GraphModule) -> None:
    """qpass::linear of one row -> the sum over x * W^T, which Inductor makes one reduction that reads W in its codes."""
    linears = [n for n in graph_module.graph.nodes if n.target is torch.ops.qpass.linear.default and is_written_out(n)]
    for node in linears:
        _write_out(graph_module.graph, node)
    if linears:
        graph_module.graph.lint()
        graph_module.recompile()


def is_written_out(linear: Node) -> bool:
    """Whether a qpass::linear is better left to Inductor, with what stands around it."""
    value, (_, data, _, _, _, _, spec, *around) = value_of(linear), linear.args
    if value is None or any(around) or any(op_name(user) in SPLITS for user in linear.users):
        return False  # several linears are one operator, and q, k and v or gate and up are read in pieces
    shape = shape_of(data)  # type: ignore[arg-type]
    return shape is not None and written_out(str(spec), value.device.type, math.prod(value.shape[:-1]), *shape)


def _write_out(graph: Graph, linear: Node) -> None:
    x, data, scale, _, _, bias, *_ = linear.args
    like = value_of(linear)
    with graph.inserting_before(linear):
        added: list[Node] = []

        def insert(target: object, *args: object) -> Node:
            added.append(graph.call_function(target, args))  # type: ignore[arg-type]
            return added[-1]

        wide = insert(_aten.unsqueeze.default, insert(_aten.to.dtype, x, torch.float32), -2)
        products = insert(_aten.mul.Tensor, wide, insert(_aten.to.dtype, data, torch.float32))
        y = insert(_aten.sum.dim_IntList, products, [-1])
        y = insert(_aten.mul.Tensor, y, insert(_aten.to.dtype, insert(_aten.view.default, scale, [-1]), torch.float32))
        y = y if bias is None else insert(_aten.add.Tensor, y, bias)
        y = insert(_aten.to.dtype, y, like.dtype)
    stand_for(added, [linear])
    set_value(y, like)
    linear.replace_all_uses_with(y)
    graph.erase_node(linear)
