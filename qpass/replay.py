"""Calibration of weights: a captured graph is run over all batches at once, each weight quantized when its input is known.

So every weight sees inputs that went through the quantized weights before it, in a single pass; of the values in between only
those that are still needed are held, and nothing is computed behind the last weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qpass.algorithms import InputStats
from qpass.errors import QpassError
from qpass.graph.calls import LinearCall
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.sites.core import Plan
from qpass.sites.group import WeightGroup, group_weights
from qpass.weights import memory_of


@dataclass(frozen=True)
class Stop:
    """Where a graph knows the input of a group of weights: `x` is [.., K], or [.., K, tokens] if `columns`."""

    group: WeightGroup
    weights: tuple[Node, ...]
    x: Node
    columns: bool


@dataclass(frozen=True)
class Program:
    """A captured graph with its stops, in order. `last_use`: node -> number of the last that reads it, but for the output."""

    module: GraphModule
    nodes: tuple[Node, ...]
    number: Mapping[Node, int]
    last_use: Mapping[Node, int]
    stops: tuple[Stop, ...]

    @classmethod
    def of(cls, module: GraphModule, plan: Plan, parameters: Mapping[Node, Tensor]) -> Program:
        """`plan`: of this very graph."""
        nodes = tuple(module.graph.nodes)
        number = {node: i for i, node in enumerate(nodes)}
        stops = []
        for group, matches in group_weights(plan, parameters):
            call = matches[0].call
            if isinstance(call, LinearCall):
                weights = tuple(m.weight for m in matches if m.weight is not None)
                stops.append(Stop(group, weights, call.x, call.columns))
        stops.sort(key=lambda stop: number[stop.x])
        last_use = {n: max((number[user] for user in n.users if user.op != "output"), default=-1) for n in nodes}
        return cls(module, nodes, number, last_use, tuple(stops))


class Run:
    """One call of a program, as far as it has come. `mask`: [B, S], which tokens count; None for all."""

    def __init__(self, program: Program, args: Sequence[Any], mask: Tensor | None) -> None:
        self.program, self.mask, self.at = program, mask, 0
        placeholders = program.module.graph.find_nodes(op="placeholder")
        self.values: dict[Node, Any] = dict(zip(placeholders, args, strict=True))

    def to(self, node: Node) -> Any:
        """Compute up to `node`, and give its value."""
        program = self.program
        while self.at <= program.number[node]:
            current = program.nodes[self.at]
            self._execute(current)
            for n in (*current.all_input_nodes, current):
                if program.last_use[n] <= self.at and n is not node:
                    self.values.pop(n, None)
            self.at += 1
        return self.values[node]

    def _execute(self, node: Node) -> None:
        if node.op in ("placeholder", "output"):
            return
        if node.op == "get_attr":
            value: Any = self.program.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
        else:
            args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._float_of)
            if node.op == "call_method":
                value = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                value = node.target(*args, **kwargs)  # type: ignore[operator]
        self.values[node] = value

    def _float_of(self, node: Node) -> Any:
        value = self.values[node]
        return value.dequantize() if isinstance(value, QTensor) else value

    def rows(self, stop: Stop) -> Tensor:
        """The inputs [tokens, K] of a group of weights, without the padding."""
        x = self.to(stop.x)
        x = x.mT if stop.columns else x
        rows: Tensor = x.reshape(-1, x.shape[-1])
        if self.mask is None or self.mask.numel() != len(rows):
            return rows
        return rows[self.mask.reshape(-1).bool()]


#: What identifies the weights of a group in all graphs.
Key = tuple[tuple[object, ...], ...]


def stops_of(runs: Sequence[Run]) -> dict[Key, list[tuple[Run, Stop]]]:
    """Each group of weights, in the order of the graphs, with where each run knows its input."""
    stops: dict[Key, list[tuple[Run, Stop]]] = {}
    for run in runs:
        for stop in run.program.stops:
            key = tuple(memory_of(run.values[w]) for w in stop.weights)
            stops.setdefault(key, []).append((run, stop))
    return stops


@torch.no_grad()
def quantize_in_order(
    runs: Sequence[Run],
    stops: Mapping[Key, Sequence[tuple[Run, Stop]]],
    convert: Callable[[WeightGroup, list[Tensor], InputStats], Sequence[QTensor]],
) -> None:
    """Quantize the weights of all stops, each with what the runs give of its input.

    `convert`: (group, its float weights, stats of their input) -> QTensors, which the runs go on with.
    Raises `QpassError` for an input with NaN or inf, naming the site.
    """
    done: set[tuple[object, ...]] = set()
    for key in track(list(stops), "qpass: calibrating"):
        new = [i for i, one in enumerate(key) if one not in done]  # others are the second use of a tied weight
        if not new:
            continue
        done |= set(key)
        run, first = stops[key][0]
        weights = [run.values[first.weights[i]] for i in new]
        stats: InputStats | None = None
        for run, stop in stops[key]:
            rows = run.rows(stop)
            stats = stats or InputStats.empty(rows.shape[-1], rows.device)
            stats.add(rows)
        assert stats is not None
        if not bool(torch.isfinite(stats.hessian).all()):
            raise QpassError(
                f"{first.group.names[0]}: its input in calibration holds NaN, inf, or numbers whose squares overflow; the "
                "weights before it are quantized already: load the model again"
            )
        stored = convert(first.group.subset(new), weights, stats)
        for run in runs:
            for node, value in run.values.items():
                for weight, quantized in zip(weights, stored, strict=True):
                    if value is weight:
                        run.values[node] = quantized
