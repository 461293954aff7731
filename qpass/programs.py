"""A captured graph as a program that is run call by call, and stops where weights are read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qpass.graph.calls import LinearCall
from qpass.graph.flow import memory_behind
from qpass.graph.torch_private import exit_autocast, is_graph_fragment
from qpass.graph.vocabulary import op_name, written_by
from qpass.qtensor import QTensor
from qpass.sites.core import Plan
from qpass.sites.group import WeightGroup, group_weights
from qpass.spec import QuantSpec

#: A place where this many times as much is held as at the narrowest is not a narrow one.
_NARROW = 1.5


@dataclass(frozen=True)
class Stop:
    """Where a graph reads a group of weights: at node number `at`, with input `x`, [.., K], or [.., K, tokens] if `columns`."""

    group: WeightGroup
    weights: tuple[Node, ...]
    x: Node
    at: int
    columns: bool


@dataclass(frozen=True)
class Program:
    """A captured graph with its stops, in order.

    `last_use`: node -> number of the last that reads it, but for the output. `weights`: inputs that are Parameters.
    `of_weights`: what is computed of these alone, which is done anew whenever it is read. `written`: what owns memory that the
    graph writes to. `fragment`: it begins or ends at a graph break.
    """

    module: GraphModule
    plan: Plan
    nodes: tuple[Node, ...]
    last_use: Mapping[Node, int]
    stops: tuple[Stop, ...]
    weights: frozenset[Node]
    of_weights: frozenset[Node]
    written: frozenset[Node]
    fragment: bool

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
                stops.append(Stop(group, weights, call.x, min(number[m.node] for m in matches), call.columns))
        stops.sort(key=lambda stop: stop.at)
        of_weights = set(parameters)
        for node in nodes:
            inputs = node.all_input_nodes
            if node.op in ("call_function", "call_method") and inputs and of_weights.issuperset(inputs):
                of_weights.add(node)
        written = frozenset(memory_behind(target) for node in nodes for target in written_by(node))
        last_use = {
            read: number[node]
            for node in nodes
            if node.op != "output" and node not in of_weights
            for read in node.all_input_nodes
        }
        return cls(
            module,
            plan,
            nodes,
            last_use,
            tuple(stops),
            frozenset(parameters),
            frozenset(of_weights - set(parameters)),
            written,
            is_graph_fragment(module),
        )

    def with_specs(self, parameters: Mapping[Node, Tensor], spec_of: Callable[[Tensor], QuantSpec]) -> Program:
        """The same graph, its weights to be stored otherwise, and so read in other groups."""
        specs = {m.site: spec_of(parameters[m.weight]) for m in self.plan.matches if m.weight is not None}
        return Program.of(self.module, replace(self.plan, specs={**self.plan.specs, **specs}), parameters)

    def copied(self, values: Mapping[Node, Any]) -> dict[Node, Any]:
        """`values`, with copies of those that the graph writes to."""
        return {n: v.clone() if n in self.written and isinstance(v, Tensor) else v for n, v in values.items()}


class Run:
    """One call of a program, as far as it has come. `given`: its arguments. `mask`: [B, S], which tokens count; None for all."""

    def __init__(self, program: Program, given: Sequence[Any], mask: Tensor | None) -> None:
        arguments = dict(zip(program.module.graph.find_nodes(op="placeholder"), given, strict=True))
        self.program, self.mask, self.at = program, mask, 0
        self.weights = {node: value for node, value in arguments.items() if node in program.weights}
        self.values = program.copied({n: v for n, v in arguments.items() if n not in program.weights})
        self._autocasts: list[Node] = []  # entered and not left, where the run has come to
        self.narrowest = math.inf  # bytes held at the narrowest mark
        self._mark = 0, self.program.copied(self.values), list(self._autocasts)

    @property
    def is_narrow(self) -> bool:
        """Whether little more is held than at the narrowest mark."""
        return self.nbytes <= _NARROW * self.narrowest

    def mark(self) -> None:
        """From here on `back` leads here."""
        self._mark = self.at, self.program.copied(self.values), list(self._autocasts)
        self.narrowest = min(self.narrowest, self.nbytes)

    def back(self) -> None:
        """Forget what was computed since the last mark."""
        self.at, values, autocasts = self._mark
        self.values, self._autocasts = self.program.copied(values), list(autocasts)

    @property
    def nbytes(self) -> int:
        """Bytes of the values that are held."""
        return sum(v.nbytes for v in self.values.values() if isinstance(v, Tensor))

    def before(self, number: int) -> None:
        """Compute everything before node `number`."""
        for entered in self._autocasts:
            self._execute(entered)
        while self.at < number:
            self._step(self.program.nodes[self.at])
            self._forget(self.program.nodes[self.at])
            self.at += 1
        for entered in reversed(self._autocasts):
            exit_autocast(self.values[entered])

    def whole(self, wanted: Sequence[Node], watch: Callable[[Node, Any], Any]) -> list[Any]:
        """The values of `wanted` nodes, with everything computed; `watch` is given each value and gives what it becomes."""
        found: dict[Node, Any] = {}
        for number, node in enumerate(self.program.nodes):
            self._step(node)
            if node in self.values:
                self.values[node] = watch(node, self.values[node])
            if node in wanted:
                found[node] = self._read(node)
            self._forget(node)
            self.at = number + 1
        return [found[node] for node in wanted]

    def _forget(self, node: Node) -> None:
        """Drop what nothing behind `node` reads."""
        for n in (*node.all_input_nodes, node):
            if self.program.last_use.get(n, -1) <= self.at:
                self.values.pop(n, None)

    def _step(self, node: Node) -> None:
        if (
            node.op in ("placeholder", "output")
            or node in self.program.of_weights
            or op_name(node) == "_set_grad_enabled"
        ):
            return
        if op_name(node) == "_enter_autocast":
            self._autocasts.append(node)
        elif op_name(node) == "_exit_autocast":
            self._autocasts.remove(node.all_input_nodes[0])
        self._execute(node)

    def _execute(self, node: Node) -> None:
        self.values[node] = self._value_of(node)

    def _value_of(self, node: Node) -> Any:
        if node.op == "get_attr":
            value: Any = self.program.module
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return value
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self._read)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def _read(self, node: Node) -> Any:
        if node in self.program.of_weights:
            return self._value_of(node)
        if node not in self.weights:
            return self.values[node]
        weight = self.weights[node]
        return weight.dequantize() if isinstance(weight, QTensor) else weight.detach()

    def rows(self, stop: Stop) -> Tensor:
        """The inputs [tokens, K] of a group of weights, without the padding."""
        self.before(stop.at)
        x = self._read(stop.x)
        return self.without_padding(x.mT if stop.columns else x)

    def without_padding(self, x: Tensor) -> Tensor:
        """[.., K] -> [tokens, K]."""
        return tokens_of(x, self.mask)


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """[.., K] -> [tokens, K], those that the mask [B, S] leaves in; all of what is not made of the masked tokens."""
    flat: Tensor = x.reshape(-1, x.shape[-1])
    lead = tuple(x.shape[:-1])
    if mask is None or not (lead == tuple(mask.shape) or (len(lead) == 1 and lead[0] == mask.numel())):
        return flat
    return flat[mask.reshape(-1).bool()]
