"""Tensors that a graph makes and changes, and gives back: a cache that is allocated in its first call, which is compiled.

A cache marks its memory as one that stays, but cannot while a graph is traced. Without the mark the next step, which changes it,
becomes no CUDA graph; and what a CUDA graph gives back is memory of the graph, valid until the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qpass.graph.vocabulary import CASTS, op_name, source_of, value_of, written_by

_FACTORIES = {
    "zeros", "ones", "full", "empty", "zeros_like", "full_like", "empty_like", "new_zeros", "new_full", "new_empty",
}  # fmt: skip
#: How rows are put into a cache; what else is made and changed, as the sums of experts, is made anew by the next call.
_WRITERS = {
    "index_copy_",
    "setitem",
    "qpass::append",
    "qpass::append_residual",
    "qpass::append_rotated",
    "qpass::write_rotated",
}


def made_and_changed(graph: Graph) -> list[int]:
    """Positions of such tensors among the outputs of a captured graph."""
    changed = {target: node for node in graph.nodes for target in written_by(node)}
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, Sequence)
    return [i for i, n in enumerate(outputs) if isinstance(n, Node) and n in changed and _is_cache(n, changed[n])]


def _is_cache(node: Node, writer: Node) -> bool:
    """Whether it is made to be written to by later calls, or a length that is brought to its device."""
    if op_name(node) in CASTS:
        return bool(value_of(source_of(node)).device != value_of(node).device)
    return op_name(node) in _FACTORIES and op_name(writer) in _WRITERS


def keep(outputs: Sequence[Any], positions: Sequence[int], lent: bool) -> list[Any]:
    """The outputs, with those at `positions` marked as memory that stays. `lent`: they are the memory of a CUDA graph."""
    outputs = list(outputs)
    kept: dict[int, Tensor] = {}  # an output may be there twice
    for i in positions:
        tensor = outputs[i]
        if id(tensor) not in kept:
            kept[id(tensor)] = tensor.clone() if lent else tensor
            torch._dynamo.mark_static_address(kept[id(tensor)])
        outputs[i] = kept[id(tensor)]
    return outputs
