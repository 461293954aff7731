"""The whole graph of a model that Dynamo captures in pieces: graph breaks are no breaks to torch.export's plain tracing."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.utils._pytree import tree_leaves

from qpass.graph.expand import inline_no_grad
from qpass.graph.torch_private import outside_of_capture, trace_aten


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
    """Trace one call of `model`; arguments that are no tensors or constants (caches) are left out. None if it cannot be.

    Where the code branches on values (a loop over the experts that were chosen), the graph is that of this one call.
    """
    plain = (Tensor, bool, int, float, str, type(None))
    kept = {k: v for k, v in kwargs.items() if isinstance(v, plain)}
    compiled, model._compiled_call_impl = model._compiled_call_impl, None
    try:
        with torch.no_grad(), outside_of_capture(), redirect_stderr(StringIO()):  # a failure prints the whole graph
            try:
                return _exported(model, args, kept)
            except Exception:  # it depends on values
                return _as_called(model, args, kept)
    except Exception:  # whatever the tracer stumbles over: the pieces are then read one by one
        return None
    finally:
        model._compiled_call_impl = compiled


def _exported(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WholeGraph:
    program = torch.export.export(_TensorsOut(model), (args, kwargs), strict=False)
    params: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    inline_no_grad(program.graph_module)
    placeholders = {n.name: n for n in program.graph.find_nodes(op="placeholder")}
    inputs = program.graph_signature.inputs_to_parameters.items()
    return _whole(
        model, program.graph, {placeholders[name]: params[target.removeprefix("model.")] for name, target in inputs}
    )


def _as_called(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> WholeGraph:
    flat = _TensorsOut(model)
    params = dict(flat.named_parameters())  # a tied one once: functional_call ties it again
    graph = trace_aten(
        lambda values: torch.func.functional_call(flat, dict(zip(params, values, strict=True)), (args, kwargs)),
        [[p.detach() for p in params.values()]],
        "real",
    ).graph
    placeholders = graph.find_nodes(op="placeholder")
    return _whole(model, graph, dict(zip(placeholders, params.values(), strict=True)))


def _whole(model: nn.Module, graph: Graph, parameters: dict[Node, Tensor]) -> WholeGraph:
    first_name = {id(p): name for name, p in model.named_parameters()}  # a tied Parameter has several
    return WholeGraph(graph, parameters, {node: first_name[id(p)] for node, p in parameters.items()})
