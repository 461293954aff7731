"""The whole graph of a model that Dynamo captures in pieces: graph breaks are no breaks to torch.export's plain tracing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from qpass.graph.torch_private import outside_of_capture


@dataclass(frozen=True)
class WholeGraph:
    """A graph in ATen's spelling, its Parameters (placeholder -> tensor) and their names in the model."""

    graph: Graph
    parameters: dict[Node, Tensor]
    names: dict[Node, str]


class _TensorsOut(nn.Module):
    """The model with its outputs as a flat list of tensors; caches and other objects are left out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        out = self.model(*args, **kwargs)
        return [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]


def trace_whole(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> WholeGraph | None:
    """Trace one call of `model`; arguments that are no tensors or constants (caches) are left out. None if it cannot be."""
    plain = (Tensor, bool, int, float, str, type(None))
    kept = {k: v for k, v in kwargs.items() if isinstance(v, plain)}
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with torch.no_grad(), outside_of_capture():
            program = torch.export.export(_TensorsOut(model), (args, kept), strict=False)
    except Exception:  # whatever the tracer stumbles over: the pieces are then read one by one
        return None
    finally:
        model._compiled_call_impl = compiled
    params: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    first_name = {id(p): name for name, p in model.named_parameters()}  # a tied Parameter has several
    placeholders = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    inputs = program.graph_signature.inputs_to_parameters.items()
    parameters = {placeholders[name]: params[target.removeprefix("model.")] for name, target in inputs}
    return WholeGraph(program.graph, parameters, {node: first_name[id(p)] for node, p in parameters.items()})
