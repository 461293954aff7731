"""One mask for all attentions that read it: what no kernel makes whole, the compiler makes again for each of them.

Nothing is rewritten by it that a diff would show.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch.fx import GraphModule, Node

from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import op_name, set_value, source_of, value_of

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
            with graph_module.graph.inserting_after(mask):
                shared = graph_module.graph.call_function(torch.ops.qpass.once.default, (mask,))
            set_value(shared, value_of(mask))
            stand_for([shared], [mask])
            for node in attentions:
                node.update_arg(_MASK, shared)
    graph_module.graph.lint()
    graph_module.recompile()


def _before_expansion(mask: Any) -> Any:
    """The operator expands a mask itself."""
    while isinstance(mask, Node) and op_name(mask) == "expand":
        mask = source_of(mask)
    return mask
