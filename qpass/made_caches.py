"""Tensors that a graph makes and changes, and gives back: a cache that is allocated in its first call, which is compiled.

A cache marks its memory as one that stays, but cannot while a graph is traced. Without the mark the next step, which changes it,
becomes no CUDA graph; and what a CUDA graph gives back is memory of the graph, valid until the next step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.vocabulary import CASTS, op_name, source_of, value_of, written_by

_FACTORIES = {
    "zeros",
    "ones",
    "full",
    "empty",
    "zeros_like",
    "full_like",
    "empty_like",
    "new_zeros",
    "new_full",
    "new_empty",
}


def made_and_changed(graph: Graph) -> list[int]:
    """Positions of such tensors among the outputs of a captured graph."""
    changed = {target for node in graph.nodes for target in written_by(node)}
    outputs = graph.output_node().args[0]
    assert isinstance(outputs, Sequence)
    return [i for i, n in enumerate(outputs) if isinstance(n, Node) and n in changed and _is_new(n)]


def _is_new(node: Node) -> bool:
    """Whether the memory is the graph's own, and not that of an input."""
    if op_name(node) not in CASTS:
        return op_name(node) in _FACTORIES
    before, after = value_of(source_of(node)), value_of(node)
    return bool(before.device != after.device or before.dtype != after.dtype)


def keep(outputs: Sequence[Any], positions: Sequence[int], lent: bool) -> list[Any]:
    """The outputs, with those at `positions` marked as memory that stays. `lent`: they are the memory of a CUDA graph."""
    outputs = list(outputs)
    for i in positions:
        outputs[i] = outputs[i].clone() if lent else outputs[i]
        torch._dynamo.mark_static_address(outputs[i])
    return outputs
