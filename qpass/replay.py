"""Calibration of weights: a captured graph is run over all batches at once, each weight quantized when its input is known.

So every weight sees inputs that went through the quantized weights before it, in a single pass; of the values in between only
those that are still needed are held, and nothing is computed behind the last weight.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from qpass import ranks
from qpass.algorithms.rounding import needs_hessian
from qpass.errors import QpassError
from qpass.graph.calls import LinearCall
from qpass.graph.flow import memory_behind
from qpass.graph.torch_private import exit_autocast, is_graph_fragment
from qpass.graph.vocabulary import op_name, written_by
from qpass.memory import return_freed_heap
from qpass.observers import InputStats
from qpass.progress import track
from qpass.qtensor import QTensor
from qpass.sites.core import Plan
from qpass.sites.group import WeightGroup, group_weights
from qpass.spec import QuantSpec
from qpass.weights import memory_of

#: Bytes of values that may be held between two weights. Above them a run goes back to the last narrow place (the residual
#: stream, not what lies inside of a feed-forward network) and computes the rest again.
BUDGET = 4 << 30
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


#: What identifies the weights of a group in all graphs.
Key = tuple[tuple[object, ...], ...]


@dataclass
class Place:
    """Where the runs read a group of weights. `weights`: the float ones, until they are quantized."""

    weights: list[Tensor]
    readers: list[tuple[Run, Stop]]
    again: bool = False  # a run reads one of them a second time

    @property
    def group(self) -> WeightGroup:
        """The weights, as the first reader has them."""
        return self.readers[0][1].group

    @property
    def inputs(self) -> frozenset[tuple[int, Node]]:
        """What is read: equal for groups that read the same, for which one Hessian serves."""
        return frozenset((id(run), stop.x) for run, stop in self.readers)


def places_of(runs: Sequence[Run]) -> dict[Key, Place]:
    """Each group of weights, in an order that no run has to go back for.

    Raises `QpassError` if there is none: calls of the model that use the weights in different orders.
    """
    places: dict[Key, Place] = {}
    queues: list[list[Key]] = []
    for run in runs:
        queue: list[Key] = []
        seen: set[tuple[object, ...]] = set()
        for stop in run.program.stops:
            weights = [run.weights[w] for w in stop.weights]
            key = tuple(memory_of(w) for w in weights)
            place = places.setdefault(key, Place(weights, []))
            place.again |= any(one in seen for one in key)
            for other in (places[k] for k in queue if set(k) & set(key)):
                other.again = True
            seen |= set(key)
            if key not in queue:  # of a weight that is used again, the first use counts
                place.readers.append((run, stop))
                queue.append(key)
        queues.append(queue)
    ordered: list[Key] = []
    while any(queues):
        heads = [queue[0] for queue in queues if queue]
        free = [k for k in heads if all(k not in queue[1:] for queue in queues)]
        if not free:
            names = places[heads[0]].readers[0][1].group.names
            raise QpassError(
                f"calibration: the batches use {names[0]} and others in different orders; give batches for one kind of call"
            )
        ordered.append(free[0])
        for queue in queues:
            if queue and queue[0] == free[0]:
                queue.pop(0)
    return {key: places[key] for key in ordered}


@torch.no_grad()
def quantize_in_order(
    runs: Sequence[Run],
    places: Mapping[Key, Place],
    convert: Callable[[WeightGroup, list[Tensor], InputStats | None], Sequence[QTensor]],
    is_known: Callable[[WeightGroup], bool] = lambda group: False,
) -> None:
    """Quantize the weights of all places, each with what the runs give of its input.

    `convert`: (group, its float weights, stats of their input) -> QTensors, which the runs go on with. `is_known`: it gives
    those of a group without stats.
    With torch.distributed each rank has runs of its own, and all have what all give. Raises `QpassError` for an input with NaN or
    inf, naming the site.
    """
    ranks.check_same("use weights", [str((place.group.names, str(place.group.spec))) for place in places.values()])
    done: set[tuple[object, ...]] = set()
    readers: dict[frozenset[tuple[int, Node]], list[Place]] = {}
    for place in places.values():
        readers.setdefault(place.inputs, []).append(place)
    collected: dict[frozenset[tuple[int, Node]], InputStats] = {}
    for key in track(list(places), "qpass: calibrating"):
        place = places[key]
        alike = readers[place.inputs]
        alike.remove(place)
        new = [i for i, one in enumerate(key) if one not in done]  # others are the second use of a tied weight
        weights, place.weights = [place.weights[i] for i in new], []
        done |= set(key)
        if not new:
            continue
        group = place.group.subset(new)
        stats = collected.pop(place.inputs, None)
        if stats is None and not is_known(group):
            stats = _collect(place, runs, any(needs_hessian(p.group.spec) for p in (place, *alike)))
        if stats is not None:
            stats.partial = place.again
            if alike:
                collected[place.inputs] = stats
        stored = convert(group, weights, stats)
        del stats
        return_freed_heap()
        for run in runs:
            for node, value in run.weights.items():
                for weight, quantized in zip(weights, stored, strict=True):
                    if value is weight:
                        run.weights[node] = quantized


def _collect(place: Place, runs: Sequence[Run], hessian: bool) -> InputStats:
    """What the runs give to the weights of a place; they come as far as it."""
    stats: InputStats | None = None
    for run, stop in place.readers:
        rows = run.rows(stop)
        stats = stats or InputStats.empty(rows.shape[-1], rows.device, hessian)
        stats.add(rows)
        del rows
        if run.is_narrow or sum(r.nbytes for r in runs) <= BUDGET:
            run.mark()
        else:
            run.back()  # computed again behind the weights that are quantized now
    assert stats is not None
    stats = stats.over_ranks()
    if not stats.tokens:
        _no_token(place.group)
    if not bool(torch.isfinite(stats.squares).all()):
        raise QpassError(
            f"{place.group.names[0]}: its input in calibration holds NaN, inf, or numbers whose squares overflow; "
            "leave that batch out (a module has quantized the weights before it by now: load it again)"
        )
    return stats


def _no_token(group: WeightGroup) -> None:
    """A static scale cannot be had from nothing; codes can."""
    says = f"{group.names[0]}: no token of the calibration reached it"
    if group.spec.activations is not None and group.spec.activations.static:
        raise QpassError(f"{says} (all masked out, or an expert that was not chosen?); add batches that do")
    warnings.warn(f"{says}; it is rounded to nearest", stacklevel=2)
