"""What feeds what: one forward pass over a graph that records, for each value, the nearest producers with weights."""

from __future__ import annotations

from collections.abc import Mapping
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
    read_linear,
)
from qpass.graph.experts import read_experts
from qpass.graph.vocabulary import ADDS, CASTS, MATMULS, SHAPES, TOKEN_MIXERS, op_name, shape_of, writes_to

#: An adapter's inner width is below this share of the base's smaller side (LoRA: r << d).
_LOW_RANK = 0.25


@dataclass
class Flow:
    """The result of `analyze`.

    origins: for a value, the nearest linears, embeddings, attentions, residual adds and inputs that it is made of, with
    nothing of that kind in between: it sees through norms, rotary embedding, activations, soft-capping, cache updates.
    residuals: adds of two values of different origin; added: all that is an operand of one.
    adapters: low-rank pairs (down, up) added to a linear of the same input.
    """

    graph: Graph
    parameters: Mapping[Node, Tensor]
    linears: dict[Node, LinearCall] = field(default_factory=dict)
    embeddings: dict[Node, EmbeddingCall] = field(default_factory=dict)
    attentions: dict[Node, AttentionCall] = field(default_factory=dict)
    origins: dict[Node, frozenset[Node]] = field(default_factory=dict)
    written: dict[Node, list[Node]] = field(default_factory=dict)
    added: set[Node] = field(default_factory=set)
    residuals: set[Node] = field(default_factory=set)
    adapters: dict[Node, Node] = field(default_factory=dict)

    def of(self, value: object) -> frozenset[Node]:
        """Origins of a node; nothing for a constant or an absent operand."""
        return self.origins.get(value, frozenset()) if isinstance(value, Node) else frozenset()

    def linears_behind(self, value: object) -> list[Node]:
        """The linears among the origins of `value`, in graph order."""
        behind = self.of(value)
        return [n for n in self.linears if n in behind]

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
    return flow


def tokenwise_linears(flow: Flow, value: object) -> list[Node]:
    """The linears that `value` is made of token by token, in graph order; none if tokens were mixed on the way."""
    queue, seen = [value], set()
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
        if node not in flow.residuals:
            queue.extend(node.all_input_nodes)
    return [n for n in flow.linears if n in seen]


def memory_behind(node: Node) -> Node:
    """The node that owns the memory a view looks at."""
    while op_name(node) in SHAPES | CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _origins(flow: Flow, node: Node) -> frozenset[Node]:
    if node.op in ("placeholder", "get_attr"):
        return frozenset() if node in flow.parameters else frozenset({node})
    linear = read_linear(node, flow.parameters) or read_experts(node, flow.parameters)
    if linear is not None:
        flow.linears[node] = linear
        return frozenset({node})
    if (embedding := read_embedding(node, flow.parameters)) is not None:
        flow.embeddings[node] = embedding
        return frozenset({node})
    if (attention := read_attention(node, lambda n: n in flow.linears or n in flow.attentions)) is not None:
        flow.attentions[node] = attention
        return frozenset({node})
    if op_name(node) in ADDS and len(node.all_input_nodes) == 2:
        a, b = node.all_input_nodes
        if is_float_tensor(node) and shape_of(a) == shape_of(b):
            return _add_origins(flow, node, flow.of(a), flow.of(b))
    return frozenset().union(*(flow.of(n) for n in node.all_input_nodes))


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
    flow.added |= producers(a) | producers(b)
    flow.residuals.add(node)
    return frozenset({node})


def _adapter(flow: Flow, base: frozenset[Node], low_rank: frozenset[Node]) -> tuple[Node, Node] | None:
    if len(base) != 1 or len(low_rank) != 1:
        return None
    (base_node,), (up_node,) = base, low_rank
    if base_node not in flow.linears or up_node not in flow.linears:
        return None
    up = flow.linears[up_node]
    behind = flow.of(up.x)
    down = flow.linears.get(next(iter(behind))) if len(behind) == 1 else None
    if down is None or memory_behind(down.x) is not memory_behind(flow.linears[base_node].x):
        return None
    rank = min(flow.parameters[up.weight].shape)
    small = rank <= _LOW_RANK * min(flow.parameters[flow.linears[base_node].weight].shape)
    return (down.node, up.node) if small and rank == min(flow.parameters[down.weight].shape) else None
