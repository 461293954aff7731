"""What feeds what: one forward pass over a graph that records, for each value, the nearest producers with weights."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Graph, Node

from qpass.graph.calls import (
    AttentionCall,
    EmbeddingCall,
    LinearCall,
    is_float_tensor,
    read_attention,
    read_embedding,
    read_gather,
    read_linear,
)
from qpass.graph.experts import read_experts
from qpass.graph.vocabulary import (
    ADDS,
    CASTS,
    DROPOUTS,
    FLIPS,
    MATMULS,
    SHAPES,
    TOKEN_MIXERS,
    op_name,
    shape_of,
    source_of,
    value_of,
    writes,
    writes_to,
    written_by,
)

#: Operands of an add of linears: q, k, and what a convolution makes of them.
_MIXED = 4


@dataclass
class Flow:
    """The result of `analyze`.

    origins: for a value, the nearest linears, embeddings, attentions, residual adds and inputs that it is made of, with
    nothing of that kind in between: it sees through norms, rotary embedding, activations, soft-capping, cache updates.
    residuals: adds of two values of different origin; added: all that is an operand of one, in the same width (a step of
    a state-space layer adds wider things). mixed: adds of linears only (convolved or averaged heads) -> these linears.
    readers: value -> the linears whose input is made of it. adapters: low-rank pairs (down, up) added to a linear of the
    same input. positions: linear -> its number in graph order.
    """

    graph: Graph
    parameters: Mapping[Node, Tensor]
    linears: dict[Node, LinearCall] = field(default_factory=dict)
    positions: dict[Node, int] = field(default_factory=dict)
    embeddings: dict[Node, EmbeddingCall] = field(default_factory=dict)
    attentions: dict[Node, AttentionCall] = field(default_factory=dict)
    origins: dict[Node, frozenset[Node]] = field(default_factory=dict)
    written: dict[Node, list[Node]] = field(default_factory=dict)
    added: set[Node] = field(default_factory=set)
    residuals: set[Node] = field(default_factory=set)
    mixed: dict[Node, frozenset[Node]] = field(default_factory=dict)
    adapters: dict[Node, Node] = field(default_factory=dict)
    readers: dict[Node, set[Node]] = field(default_factory=dict)

    def of(self, value: object) -> frozenset[Node]:
        """Origins of a node; nothing for a constant or an absent operand."""
        return self.origins.get(value, frozenset()) if isinstance(value, Node) else frozenset()

    def linears_behind(self, value: object) -> list[Node]:
        """The linears among the origins of `value`, in graph order."""
        return self.in_order(self.of(value))

    def width(self, node: Node) -> object:
        """Features of a value: the outputs of a linear, else its last dimension."""
        if node in self.linears:
            return self.linears[node].sizes(self.parameters)[0]
        return (shape_of(node) or (None,))[-1]

    def linears_mixed_in(self, value: object) -> list[Node]:
        """The linears behind `value`; if there are none, those behind the adds of linears that it is made of."""
        origins = self.of(value)
        behind = frozenset().union(*(self.mixed.get(n, frozenset()) for n in origins))
        return self.linears_behind(value) or self.in_order(behind)

    def in_order(self, nodes: Iterable[Node]) -> list[Node]:
        """The linears among `nodes`, in graph order."""
        return sorted((n for n in nodes if n in self.linears), key=self.positions.__getitem__)

    @property
    def outputs(self) -> list[Node]:
        """What the graph returns."""
        return self.graph.output_node().all_input_nodes


def analyze(graph: Graph, parameters: Mapping[Node, Tensor]) -> Flow:
    """Linears, embeddings and attentions of `graph`, and the origins of every value. `parameters`: placeholder -> tensor."""
    flow = Flow(graph, parameters)
    for node in graph.nodes:
        flow.origins[node] = _origins(flow, node)
        target = writes_to(node)
        if target is not None:
            root = memory_behind(target)
            flow.written.setdefault(root, []).append(node)
            flow.origins[root] = flow.of(root) | flow.of(node)
    for node, linear in flow.linears.items():
        for origin in flow.of(linear.x):
            flow.readers.setdefault(origin, set()).add(node)
    return flow


def tokenwise_linears(flow: Flow, value: Node, width: object = None) -> list[Node]:
    """The linears that `value` is made of token by token, in graph order; none if tokens were mixed on the way.

    `width`: of the residual stream; at adds of this width the search ends.
    """
    queue: list[object] = [value]
    seen: set[Node] = set()
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if node in flow.linears or node in flow.embeddings or not flow.of(node):
            continue
        factors = [n for n in node.all_input_nodes if any(o.op not in ("placeholder", "get_attr") for o in flow.of(n))]
        if op_name(node) in TOKEN_MIXERS or (op_name(node) in MATMULS and len(factors) > 1) or node in flow.attentions:
            return []
        # In-place writes into the memory that this value looks at.
        if any(op_name(w) in TOKEN_MIXERS for w in flow.written.get(node, ())):
            return []
        if node not in flow.residuals or flow.width(node) != width:
            queue.extend(node.all_input_nodes)
    return flow.in_order(seen)


def rearranged(node: Node) -> Node:
    """The node whose values `node` holds in another arrangement (dropout does nothing in inference)."""
    while op_name(node) in SHAPES | CASTS | FLIPS | DROPOUTS and isinstance(source_of(node), Node):
        node = source_of(node)
    return node


def memory_behind(node: Node) -> Node:
    """The node that owns the memory a view looks at."""
    while op_name(node) in SHAPES | CASTS and isinstance(source_of(node), Node):
        node = source_of(node)
    return node


def memory_of(nodes: Iterable[Node]) -> set[int]:
    """What holds the values of these nodes: views of one tensor have it in common."""
    found = set()
    for node in nodes:
        value = value_of(node)
        value = value_of(memory_behind(node)) if value is None else value
        for tensor in value if isinstance(value, list | tuple) else [value]:
            with suppress(NotImplementedError):  # of vmap, and sparse: no memory that a view could look at
                found |= {tensor.untyped_storage()._cdata} if isinstance(tensor, Tensor) else set()
    return found


@dataclass(frozen=True)
class Order:
    """Positions of the nodes of a graph, and of those that write to memory, with that memory; empty where it is not known."""

    of: Mapping[Node, int]
    writes: tuple[tuple[int, frozenset[int]], ...]

    @classmethod
    def in_graph(cls, graph: Graph) -> Order:
        of = {node: i for i, node in enumerate(graph.nodes)}
        return cls(of, tuple((i, frozenset(memory_of(written_by(node)))) for node, i in of.items() if writes(node)))

    def may_move(self, nodes: Collection[Node], last: Node) -> bool:
        """Whether `nodes` may be computed at the place of `last`: what they read is not written to from the first of them on."""
        first = min(nodes, key=lambda n: self.of.get(n, 0))
        return not self.is_written([source for n in nodes for source in n.all_input_nodes], first, last)

    def is_written(self, nodes: Iterable[Node], first: Node, last: Node) -> bool:
        """Whether what holds the values of `nodes` may be written to from `first` on, before `last`."""
        begin, end, memory = self.of.get(first, 0), self.of[last], memory_of(nodes)
        at = bisect_left(self.writes, (begin, frozenset[int]()))
        return any(not written or written & memory for i, written in self.writes[at:] if i < end)


def _origins(flow: Flow, node: Node) -> frozenset[Node]:
    if node.op in ("placeholder", "get_attr"):
        return frozenset() if node in flow.parameters else frozenset({node})
    linear = read_linear(node, flow.parameters) or read_experts(node, flow.parameters)
    if linear is not None:
        flow.positions[node] = len(flow.linears)
        flow.linears[node] = linear
        return frozenset({node})
    embedding = read_embedding(node, flow.parameters) or read_gather(node, flow.parameters)
    if embedding is not None:
        if any(n in flow.linears for n in flow.of(embedding.indices)):  # biases of the experts that a router chose
            return frozenset()
        flow.embeddings[node] = embedding
        return frozenset({node})
    attention = read_attention(node, lambda n: n in flow.linears or n in flow.attentions)
    if attention is not None and not _mixes_layers(flow, attention):
        flow.attentions[node] = attention
        return frozenset({node})
    if op_name(node) in ADDS and len(node.all_input_nodes) == 2:
        a, b = node.all_input_nodes
        if is_float_tensor(node) and shape_of(a) == shape_of(b):
            return _add_origins(flow, node, flow.of(a), flow.of(b))
    return frozenset().union(*(flow.of(n) for n in node.all_input_nodes))


def _mixes_layers(flow: Flow, attention: AttentionCall) -> bool:
    """Whether a learned query weighs the outputs of several layers: tokens stay apart."""
    keys = flow.of(attention.k)
    return attention.q is not None and not flow.of(attention.q) and any(n not in flow.linears for n in keys)


def _add_origins(flow: Flow, node: Node, a: frozenset[Node], b: frozenset[Node]) -> frozenset[Node]:
    """A residual add is an origin itself. Rotary embedding adds two values of one origin; an adapter belongs to its base."""

    def producers(origins: frozenset[Node]) -> frozenset[Node]:
        return frozenset(n for n in origins if n.op not in ("placeholder", "get_attr")) or origins

    if not a or not b or producers(a) == producers(b):
        return a | b
    for base, low_rank in ((a, b), (b, a)):
        pair = _adapter(flow, producers(base), producers(low_rank))
        if pair is not None:
            down, up = pair
            flow.adapters[down] = flow.adapters[up] = next(iter(producers(base)))
            return base
    width = shape_of(node)[-1]  # type: ignore[index]
    flow.added |= {n for n in producers(a) | producers(b) if flow.width(n) == width}
    flow.residuals.add(node)
    mixed = [flow.mixed.get(n) or {n} & flow.linears.keys() for n in producers(a) | producers(b)]
    if all(mixed) and len(mixed) <= _MIXED:
        flow.mixed[node] = frozenset().union(*mixed)
    return frozenset({node})


def _adapter(flow: Flow, base: frozenset[Node], low_rank: frozenset[Node]) -> tuple[Node, Node] | None:
    if len(base) != 1 or len(low_rank) != 1:
        return None
    (base_node,), (up_node,) = base, low_rank
    if base_node not in flow.linears or up_node not in flow.linears:
        return None
    up, base_call = flow.linears[up_node], flow.linears[base_node]
    down = flow.linears.get(rearranged(up.x))  # nothing nonlinear in between
    if down is None or rearranged(down.x) is not rearranged(base_call.x):
        return None
    rank = down.sizes(flow.parameters)[0]
    return (down.node, up.node) if rank < min(base_call.sizes(flow.parameters)) else None
