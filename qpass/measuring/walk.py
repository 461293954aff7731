"""A captured graph run node by node, each of its sites in a form of its own: as stored, in float, or in another format."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qpass.graph.calls import LinearCall
from qpass.graph.vocabulary import value_of
from qpass.measuring.evaluate import CHUNK
from qpass.numerics import fake_quantize
from qpass.ops.residual import quantized_before
from qpass.programs import Program, Run
from qpass.qtensor import QTensor
from qpass.sites.core import Match
from qpass.spec import QuantSpec

#: Position of an argument of qpass::read_cache: the first tokens as floats (before it: all as stored).
_FIRST = 7


@dataclass(frozen=True)
class Form:
    """How a weight's site computes: with which weight, and through whose activation spec and scales its input goes (None: in
    float). A stored weight is dequantized to `dtype` whenever it is read."""

    weight: Tensor
    rounding: QTensor | None = None
    dtype: torch.dtype | None = None

    @property
    def floats(self) -> Tensor:
        """The weight as it is multiplied."""
        return self.weight.dequantize(self.dtype) if isinstance(self.weight, QTensor) else self.weight.detach()


@dataclass(frozen=True)
class CacheForm:
    """How keys and values of a layer are read: as its cache stores them, rounded by other (K's, V's) specs, or else as floats."""

    stored: bool = False
    specs: tuple[QuantSpec, QuantSpec] | None = None

    @property
    def quantized(self) -> bool:
        """Whether they are no floats."""
        return self.stored or self.specs is not None


#: The form of every site: Parameters by name, caches by `cache_key`.
State = Mapping[str, Form | CacheForm]


def cache_key(name: str) -> str:
    """Of the cache whose keys the Parameter `name` produces."""
    return f"kv {name}"


@dataclass(frozen=True)
class Script:
    """A captured graph: its linears and embeddings; the nodes that read a cache: node -> (key, whether values); an attention
    over a cache -> the nodes from the reads to it. `window`: tokens that a cache keeps in float."""

    program: Program
    matches: Mapping[Node, Match]
    reads: Mapping[Node, tuple[str, bool]]
    attentions: Mapping[Node, Sequence[Node]]
    window: int

    @classmethod
    def of(cls, program: Program, window: int = 0) -> Script:
        """Values are kept for what is computed again, and outputs to the end."""
        number = {node: i for i, node in enumerate(program.nodes)}
        last_use = {**program.last_use, **dict.fromkeys(program.nodes[-1].all_input_nodes, len(program.nodes))}
        reads: dict[Node, tuple[str, bool]] = {}
        attentions = {}
        for match in program.plan.matches:
            if match.weight is not None:
                continue
            mine = {match.call.k.node: False, match.call.v.node: True}
            reads |= {node: (cache_key(match.site.name), is_value) for node, is_value in mine.items()}
            if match.call.attention is not None:
                between = _between(program.nodes, set(mine), match.node)
                attentions[match.node] = between
                for node in {n for b in between for n in b.all_input_nodes}:
                    last_use[node] = max(last_use.get(node, 0), number[match.node])
        matches = {m.node: m for m in program.plan.matches if m.weight is not None}
        return cls(replace(program, last_use=last_use), matches, reads, attentions, window)


def _between(nodes: Sequence[Node], starts: set[Node], end: Node) -> list[Node]:
    """All on a way from `starts` to `end`, both included, in order."""
    behind, ahead = set(starts), {end}
    for node in nodes:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
    for node in reversed(nodes):
        if ahead.intersection(node.users):
            ahead.add(node)
    return [node for node in nodes if node in behind and node in ahead]


class Walk(Run):
    """A run whose sites compute in the forms of `state`. `names`: identity of a Parameter -> its name."""

    def __init__(
        self, script: Script, given: Sequence[Any], mask: Tensor | None, names: Mapping[int, str], state: State
    ) -> None:
        super().__init__(script.program, given, mask)
        self.script, self.state = script, state
        self.names = {node: names[id(v)] for node, v in self.weights.items() if id(v) in names}
        self._instead: dict[Node, Any] = {}

    def fork(self, state: State) -> Walk:
        """The same run from here on, with other forms."""
        other = copy.copy(self)
        memo: dict[int, Any] = {}  # views of one memory stay views of one memory
        other.values = {
            n: copy.deepcopy(v, memo) if self.program.written and isinstance(v, Tensor | list | tuple) else v
            for n, v in self.values.items()
        }
        other._autocasts, other._instead, other.state = list(self._autocasts), {}, state
        return other

    def first_reads(self) -> dict[str, int]:
        """Site -> number of the first node that computes with it."""
        of_node: dict[Node, set[str]] = {node: {name} for node, name in self.names.items()}
        found: dict[str, int] = {}
        for number, node in enumerate(self.program.nodes):
            mine = set().union(*(of_node.get(n, ()) for n in node.all_input_nodes))
            if node in self.program.of_weights:
                of_node[node] = mine
                continue
            if node in self.script.reads:
                mine.add(self.script.reads[node][0])
            for key in mine:
                found.setdefault(key, number)
        return found

    def outputs(self) -> Any:
        """What the graph returns."""
        self.before(len(self.program.nodes) - 1)
        return torch.fx.node.map_arg(self.program.nodes[-1].args[0], self._read)

    def value(self, node: Node) -> Any:
        """Of a node that was computed and is needed yet."""
        return self._read(node)

    def _read(self, node: Node) -> Any:
        if node in self._instead:
            return self._instead[node]
        form = self.state.get(self.names.get(node, ""))
        return form.floats if isinstance(form, Form) else super()._read(node)

    def _value_of(self, node: Node) -> Any:
        if node in self._instead:
            return self._instead[node]
        if node in self.script.attentions and not self._instead:
            return self._attention(node)
        if node in self.script.reads:
            return self._cache(node, None)
        match = self.script.matches.get(node)
        if match is None or not isinstance(match.call, LinearCall):
            return super()._value_of(node)
        form = self.state.get(self.names.get(match.call.weight, ""))
        if isinstance(form, Form) and form.rounding is not None:
            self._instead = {match.call.x: _rounded(self._read(match.call.x), match.call, form.rounding)}
        try:
            return super()._value_of(node)
        finally:
            self._instead = {}

    def _attention(self, node: Node) -> Any:
        """As in a chunked prefill, and as qpass.evaluate calls the model: tokens of a chunk see each other as floats."""
        nodes = self.script.attentions[node]
        form = self.state.get(self.script.reads[nodes[0]][0])
        if not isinstance(form, CacheForm) or not form.quantized:
            return super()._value_of(node)
        rows: list[Tensor] = []
        begin, end = 0, 1
        while begin < end:
            for each in nodes:
                reads = each in self.script.reads
                self._instead[each] = self._cache(each, begin) if reads else super()._value_of(each)
            y, self._instead = self._instead[node], {}
            end = y.shape[-2]
            rows.append(y[..., begin : begin + CHUNK, :])
            begin += CHUNK
        return torch.cat(rows, -2)

    def _cache(self, node: Node, begin: int | None) -> Any:
        """Keys or values as a chunk of tokens from `begin` on sees them; None: every token as it is stored."""
        key, is_value = self.script.reads[node]
        form = self.state.get(key)
        args: list[Any] = [self._read(a) if isinstance(a, Node) else a for a in node.args]
        floats: Tensor = node.target(*args)  # type: ignore[operator]  # a single call sees all of its tokens so
        if not isinstance(form, CacheForm) or not form.quantized:
            return floats
        if form.specs is None:
            seen, window = node.target(*args[:_FIRST]), self.script.window  # type: ignore[operator]
        else:
            seen, window = fake_quantize(floats, form.specs[is_value]), 0
        if begin is not None:
            start = int(quantized_before(torch.tensor(begin + 1), window)) if window else begin
            seen[:, :, start:] = floats[:, :, start:]
            if args[_FIRST] is not None and window:
                firsts = args[_FIRST].shape[2]
                seen[:, :, :firsts] = floats[:, :, :firsts]
        return seen


def _rounded(x: Tensor, call: LinearCall, weight: QTensor) -> Tensor:
    """The input as it comes back from codes. Its columns are scaled before that and, as the weight comes back from storage for
    columns that are not, back again."""
    q, spec = weight.quantized, weight.spec.activations
    assert spec is not None
    x = (x.mT if call.columns else x).to(value_of(call.node).dtype)
    scaled = x if q.column_scale is None else x * q.column_scale[0]
    if spec.in_blocks:
        back = torch.ops.qpass.round_blocks(scaled, str(spec))
    else:
        back = torch.ops.qpass.round_input(scaled, q.input_scale, q.input_zero_point, str(spec))
    back = (back if q.column_scale is None else back / q.column_scale[0]).to(x.dtype)
    return back.mT if call.columns else back
