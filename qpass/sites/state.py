"""A KV cache that the program itself holds: its storage becomes integer data and scales, in the place of a float tensor.

The state is a graph input that attention reads and that the graph writes, or joins to new tokens and returns. Quantization is
along the last axis, so whatever moves, cuts or overwrites along the others is done to each stored part alike; what is written is
quantized first, and whatever else reads the state gets it dequantized (qpass::read_cache), which the rewrite of attention then
takes away.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from qpass.errors import QpassError
from qpass.graph.attention import read_whole
from qpass.graph.flow import Flow
from qpass.graph.provenance import stand_for
from qpass.graph.rows import ALONG, WHOLE, WRITES, keeps_rows
from qpass.graph.vocabulary import CASTS, CATS, SHAPES, argument, op_name, shape_of, source_of, value_of, writes_to
from qpass.recipe import of_single_tokens
from qpass.sites.core import Edit, Site, Skip
from qpass.spec import QuantSpec

_aten = torch.ops.aten

_VIEWS_OF_HEADS = {"reshape", "view", "expand", "unsqueeze", "repeat_interleave"} | CASTS


@dataclass
class State:
    """A cache that becomes parts. `parts`: their placeholders (8-bit floats lie as bytes). `scale`: the one of a static spec."""

    node: Node
    spec: QuantSpec
    site: Site
    columns: int
    dtype: torch.dtype
    parts: list[Node] = field(default_factory=list)
    scale: Node | None = None


def find(
    flow: Flow, candidates: Collection[Node], names: Mapping[Node, str], specs: tuple[QuantSpec, QuantSpec],
    calibrated: Collection[str] = (),
) -> tuple[list[State], list[Skip]]:  # fmt: skip
    """The states among `candidates`, inputs of the graph that are no Parameters; and those that stay in float, and why.

    `calibrated`: names of the inputs whose static scales are known.
    """
    found: dict[Node, State] = {}
    skips: list[Skip] = []
    specs = of_single_tokens(specs[0]), of_single_tokens(specs[1])
    for node, attention in flow.attentions.items():
        whole = read_whole(node)
        k, v = (attention.k, attention.v) if whole is None else (whole.k, whole.v)
        producers = flow.linears_behind(k)
        weight = flow.linears[producers[0]].weight if producers else node
        name = names.get(weight, f"cache of {node.name}")
        for role, operand, spec in (("k", k, specs[0]), ("v", v, specs[1])):
            held = _held_behind(operand, set())
            if held is None or held not in candidates or held in found:
                continue
            value, site = value_of(held), Site("kv", name, (role,))
            reason = _why_not(flow, held, spec, held.name in calibrated)
            if reason:
                skips.append(Skip(site, reason))
            elif _is_kept(flow, held):
                found[held] = State(held, spec, site, value.shape[-1], value.dtype)
    return list(found.values()), skips


def _held_behind(value: Any, seen: set[Node]) -> Node | None:
    """The graph input that `value` is a cut, a copy or a continuation of."""
    while isinstance(value, Node) and value.op in ("call_function", "call_method"):
        name = op_name(value)
        if value in seen:
            return None
        seen.add(value)
        if name in CATS:
            parts = [_held_behind(x, seen) for x in value.args[0]]  # type: ignore[union-attr]
            return next((p for p in parts if p is not None), None)
        if name not in ALONG and name not in WRITES and name not in _VIEWS_OF_HEADS and writes_to(value) is None:
            return None
        value = source_of(value)
    return value if isinstance(value, Node) and value.op == "placeholder" else None


def _is_kept(flow: Flow, held: Node) -> bool:
    """Whether the graph writes to the input, or returns what continues it."""
    return held in flow.written or any(_held_behind(out, set()) is held for out in flow.outputs)


def _why_not(flow: Flow, held: Node, spec: QuantSpec, calibrated: bool) -> str | None:
    value = value_of(held)
    if not isinstance(value, Tensor) or not value.is_floating_point() or not isinstance(value.shape[-1], int):
        return "the cache is no float tensor of known width"
    if (spec.static and not calibrated) or str(spec.granularity).startswith("t"):
        return f"{spec} needs more than a cache (scales from data, a window in float): use qpass.KVCache, or another format"
    if spec.group_size > value.shape[-1]:
        return f"{spec}: the group is larger than a head of {value.shape[-1]}"
    for write in flow.written.get(held, ()):
        if op_name(write) not in WRITES:
            return (
                f"the cache is changed by {op_name(write)}, which has no quantized form: write to it with index_copy_"
            )
        target: Any = write
        while isinstance(target, Node) and target is not held:
            if not _keeps_last_axis(target) and op_name(target) not in WHOLE:
                return f"{op_name(write)} writes a part of the last axis, along which the cache shares its scales"
            target = source_of(target)
        where = WRITES[op_name(write)]
        source = argument(write, *where) if where is not None else held
        if not isinstance(source, Node) or (shape_of(source) or ())[-1:] != value.shape[-1:]:
            return f"{op_name(write)} writes one value to many places; write whole rows of {value.shape[-1]}"
    return None


# --- rewriting ----------------------------------------------------------------------------------------------------------


class Rewriter:
    """Replaces each state, whose parts are inputs of the graph already, by these. `evaluate` records the value of a new node."""

    def __init__(self, graph: Graph, states: Sequence[State], evaluate: Callable[[Node], None]) -> None:
        self.graph, self.states, self.evaluate = graph, states, evaluate
        self.of: dict[Node, tuple[State, list[Node]]] = {s.node: (s, s.parts) for s in states}
        self.added: list[Node] = []

    def run(self) -> list[Edit]:
        """Rewrite all; -> one edit for each state. Raises `QpassError` for a write that does not reach what is stored."""
        removed: list[Node] = []
        for state in self.states:
            stand_for(state.parts, [state.node])
        for node in list(self.graph.nodes):
            known = len(self.added)
            if node.op == "output":
                node.args = (self._returned(node.args[0]),)
            elif any(n in self.of for n in node.all_input_nodes) and self._transfer(node):
                removed.append(node)
            stand_for(self.added[known:], [node])
        for node in reversed([*[s.node for s in self.states], *removed]):
            assert not node.users, node.users
            self.graph.erase_node(node)
        names = tuple(n.name for n in removed)
        kept = set(self.graph.nodes)
        added = tuple(n.name for n in self.added if n in kept)
        inputs = tuple(p.name for s in self.states for p in s.parts)
        held = tuple(s.node.name for s in self.states)
        return [Edit("hold_quantized", ", ".join(s.site.name for s in self.states), held + names, inputs + added)]

    def _insert(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        self.evaluate(node)
        self.added.append(node)
        return node

    def _transfer(self, node: Node) -> bool:
        """Do to the parts what `node` does to a state; False if it reads floats, which it is given."""
        name, first = op_name(node), node.args[0] if node.args else None
        with self.graph.inserting_before(node):
            if name in CATS and self._joins(node):
                state = next(self.of[n][0] for n in node.all_input_nodes if n in self.of)
                pieces = [self._stored(x, state) for x in first]  # type: ignore[union-attr]
                dim = argument(node, 1, "dim", 0)
                self.of[node] = (
                    state,
                    [self._insert(_aten.cat.default, list(p), dim) for p in zip(*pieces, strict=True)],
                )
                return True
            if isinstance(first, Node) and first in self.of:
                state, parts = self.of[first]
                if name in WRITES and (_keeps_last_axis(node) or name in WHOLE):
                    self.of[node] = state, self._write(node, name, state, parts)
                    return True
                if _is_size_of_rows(node):
                    node.args = (parts[0], *node.args[1:])
                    return False
                if name in ALONG and _keeps_last_axis(node) and not _adds_axis(node):
                    self.of[node] = state, [self._again(node, p) for p in parts]
                    return True
                if writes_to(node) is not None:
                    self.of[node] = state, self._write_all(node, first)
                    return True
            if any(n in self.of and _is_written_through(node) for n in node.all_input_nodes):
                raise QpassError(
                    f"{node.name}: {name} makes a view of a quantized cache that is written to later; write to the cache itself, "
                    "whole rows: cache.index_copy_(dim, positions, rows)"
                )
            floats = {n: self._read(n) for n in node.all_input_nodes if n in self.of}
        node.args = torch.fx.node.map_arg(node.args, lambda n: floats.get(n, n))
        node.kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: floats.get(n, n))
        return False

    def _write_all(self, node: Node, held: Node) -> list[Node]:
        """A write of another form: the floats are written to, and all of them quantized again."""
        state, parts = self.of[held]
        floats = self._read(held)
        others = {n: self._read(n) for n in node.all_input_nodes if n in self.of and n is not held}
        new = self.graph.node_copy(node, lambda n: floats if n is held else others.get(n, n))
        new.meta = {}
        self.evaluate(new)
        self.added.append(new)
        for part, piece in zip(parts, self._stored(floats, state), strict=True):
            self._insert(_aten.copy_.default, part, piece)
        return parts

    def _again(self, node: Node, part: Node, **changed: Any) -> Node:
        """The same call on a part, with other arguments where `changed` (position -> value) says so."""
        args = [changed.get(f"_{i}", a) for i, a in enumerate(node.args)]
        args[0] = part
        if op_name(node) == "expand":
            sizes = args[1] if isinstance(args[1], list | tuple) else args[1:]
            args = [part, [*list(sizes)[:-1], -1]]
        new = self.graph.node_copy(node)
        new.args, new.meta = tuple(args), {}
        self.evaluate(new)
        self.added.append(new)
        return new

    def _write(self, node: Node, name: str, state: State, parts: list[Node]) -> list[Node]:
        where = WRITES[name]
        if where is None:
            return [self._again(node, p) for p in parts]
        source = argument(node, *where)
        pieces = self._stored(source, state, like=shape_of(node.args[0]))  # type: ignore[arg-type]
        done = []
        for part, piece in zip(parts, pieces, strict=True):
            changed = {f"_{where[0]}": piece}
            if name in ("scatter", "scatter_"):  # one index for all of a row
                index = self._insert(_aten.slice.Tensor, argument(node, 2, "index"), -1, 0, 1)
                changed["_2"] = self._insert(_aten.expand.default, index, list(_sizes(self._insert, piece)))
            done.append(self._again(node, part, **changed))
        # An assignment gives nothing: what it wrote to goes on to be read.
        return parts if name == "setitem" else done

    def _stored(self, value: Any, state: State, like: Any = None) -> list[Node]:
        """Parts of a float, or of another state."""
        if value in self.of:
            return self.of[value][1]
        given = () if state.scale is None else (state.scale,)
        quantized = self._insert(torch.ops.qpass.quantize.default, value, str(state.spec), *given)
        parts = [self._insert(operator.getitem, quantized, i) for i in range(len(state.parts))]
        dtypes = [value_of(p).dtype for p in state.parts]
        same = [value_of(p).dtype == d for p, d in zip(parts, dtypes, strict=True)]
        return [p if s else self._insert(_aten.view.dtype, p, d) for p, s, d in zip(parts, same, dtypes, strict=True)]

    def _read(self, node: Node) -> Node:
        state, parts = self.of[node]
        slots: list[Node | None] = [None, state.scale, None, None]
        for (slot, dtype), part in zip(state.spec.stored_parts.items(), parts, strict=True):
            same = value_of(part).dtype == dtype
            slots[slot] = part if same else self._insert(_aten.view.dtype, part, dtype)
        return self._insert(torch.ops.qpass.read_cache.default, *slots, state.columns, str(state.spec), state.dtype)

    def _joins(self, node: Node) -> bool:
        """Whether a cat is of states and floats along another axis than the last."""
        dim, rank = argument(node, 1, "dim", 0), len(shape_of(node) or ())
        return isinstance(dim, int) and dim % rank != rank - 1

    def _returned(self, outputs: Any) -> Any:
        """The graph's outputs, with the parts of a state in its place."""
        flat: list[Any] = []
        for value in outputs:
            flat += self.of[value][1] if value in self.of else [value]
        return tuple(flat)


def _is_written_through(view: Node) -> bool:
    """Whether something writes to memory that `view`, which shares its input's, looks at."""
    if op_name(view) not in SHAPES:
        return False
    return any(writes_to(user) is view or _is_written_through(user) for user in view.users)


def _is_size_of_rows(node: Node) -> bool:
    """Whether it is a size along another axis than the last, which every part has too."""
    rank = len(shape_of(source_of(node)) or ()) if node.args else 0
    return op_name(node) == "sym_size" and len(node.args) == 2 and int(node.args[1]) % rank != rank - 1  # type: ignore[arg-type]


def _adds_axis(node: Node) -> bool:
    """Whether it begins the repeating of heads for grouped queries: what attention reads, not the cache any more."""
    return len(shape_of(node) or ()) > len(shape_of(source_of(node)) or ())


def _sizes(insert: Callable[..., Node], node: Node) -> list[Any]:
    shape = shape_of(node) or ()
    return [n if isinstance(n, int) else insert(_aten.sym_size.int, node, i) for i, n in enumerate(shape)]


def _keeps_last_axis(node: Node) -> bool:
    rank = len(shape_of(source_of(node)) or ())

    def given(position: int, name: str) -> Any:
        return torch.fx.node.map_arg(argument(node, position, name), value_of)

    return keeps_rows(op_name(node), rank, given)
