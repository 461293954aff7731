"""What the compiler must make at once and whole: it makes what is needed where it is needed, and as often.

Nothing is rewritten by it that a diff would show.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import op_name, set_value, source_of, value_of, writes, written_by

_MASK = 12  # of qpass::attention


def share_masks(graph_module: GraphModule) -> None:
    """mask, expanded or not, of several qpass::attention -> qpass::once of it, as it was before it was expanded."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in graph_module.graph.find_nodes(op="call_function", target=torch.ops.qpass.attention.default):
        mask = _before_expansion(node.args[_MASK])
        if isinstance(mask, Node) and mask.op != "placeholder":
            readers[mask].append(node)
    for mask, attentions in readers.items():
        if len(attentions) > 1:
            shared = _once(graph_module, mask)
            for node in attentions:
                node.update_arg(_MASK, shared)
    graph_module.graph.lint()
    graph_module.recompile()


def keep_readers_apart(graph_module: GraphModule) -> None:
    """What an operator of qpass writes to, and others read before it, as the length of a cache -> they read qpass::once of it.

    Inductor of torch 2.13 reads where it computes, which may be after the operator: that it has written it knows too late.
    """
    order = {node: i for i, node in enumerate(graph_module.graph.nodes)}
    for writer in [n for n in order if op_name(n).startswith("qpass::")]:
        for target in written_by(writer):
            before = [n for n in target.users if n is not writer and order[n] < order[writer]]
            if before and not any(writes(n) for n in before):
                copy = _once(graph_module, target)
                target.replace_all_uses_with(copy, delete_user_cb=lambda n, before=before: n in before)  # type: ignore[misc]
    graph_module.graph.lint()
    graph_module.recompile()


def _once(graph_module: GraphModule, x: Node) -> Node:
    """A copy, at the place of x: of an input behind all of them."""
    graph = graph_module.graph
    last = graph.find_nodes(op="placeholder")[-1] if x.op == "placeholder" else x
    with graph.inserting_after(last):
        copy = graph.call_function(torch.ops.qpass.once.default, (x,))
    set_value(copy, value_of(x))
    stand_for([copy], [x])
    return copy


def _before_expansion(mask: Any) -> Any:
    """The operator expands a mask itself."""
    while isinstance(mask, Node) and op_name(mask) == "expand":
        mask = source_of(mask)
    return mask
