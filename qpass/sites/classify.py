"""Which kind each linear and each embedding is, from data flow alone. One rule a kind, applied in order; first wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from qpass.graph.flow import Flow
from qpass.graph.vocabulary import FLIPS, SHAPES, SPLITS, op_name, shape_of

#: linear node -> (kind, roles), in the order found
Kinds = dict[Node, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Context:
    """What earlier graphs of the same model told.

    `fragment`: the graph is a part of a model, cut by a graph break. `vocabularies`: rows of the embedding tables seen.
    `tables`: identities of those tables. `open_attention`: the graph before computed q, k, v and no attention yet.
    """

    fragment: bool = False
    vocabularies: frozenset[int] = frozenset()
    tables: frozenset[int] = frozenset()
    open_attention: bool = False


def qkv(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linears that an attention's q, k and v are made of. A fused one has all its roles."""
    found: dict[Node, list[str]] = {}
    for attention in flow.attentions.values():
        for role, operand in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            for node in flow.linears_behind(operand):
                roles = found.setdefault(node, [])
                if role not in roles:
                    roles.append(role)
    return {node: ("qkv", tuple(roles)) for node, roles in found.items()}


def attn_out(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The first linear after an attention."""
    return {
        node: ("attn_out", ("o",))
        for node, call in flow.linears.items()
        if any(n in flow.attentions for n in flow.of(call.x))
    }


def vocab(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linear that the graph's output is made of, if its rows are the vocabulary or its weight is the embedding's."""
    tables = {id(flow.parameters[e.weight]) for e in flow.embeddings.values()} | context.tables
    rows = {flow.parameters[e.weight].shape[0] for e in flow.embeddings.values()} | context.vocabularies
    found: Kinds = {}
    for output in flow.outputs:
        for node in flow.linears_behind(output):
            call = flow.linears[node]
            weight = flow.parameters[call.weight]
            if id(weight) in tables or weight.shape[1 if call.transposed else 0] in rows:
                found[node] = ("vocab", ("vocab",))
    return found


def ffn(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """Linears that lead, through other linears and no residual add, to one that is added to the residual stream."""
    outputs = {n for o in flow.outputs for n in flow.of(o)} if context.fragment else set()
    found: Kinds = {}

    def producers(node: Node) -> list[Node]:
        return [n for n in flow.linears_behind(flow.linears[node].x) if n not in kinds and n not in flow.adapters]

    def include(node: Node, role: str) -> None:
        if node in found:
            return
        found[node] = ("ffn", (role,))
        inner = producers(node)
        for i, producer in enumerate(inner):
            include(producer, ("gate", "up")[i] if len(inner) == 2 else "up")

    for node in flow.linears:
        ends = node in flow.added or node in outputs
        if node not in kinds and node not in flow.adapters and ends and producers(node):
            include(node, "down")
    return found


def parted_qkv(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """After a graph break inside attention: linears of one input that leave the graph split into heads."""
    if not context.fragment:
        return {}
    leaving = {n for o in flow.outputs for n in flow.of(o)}
    groups: dict[Node, list[Node]] = {}
    for node, call in flow.linears.items():
        if node not in kinds and node not in flow.adapters and node in leaving:
            groups.setdefault(call.x, []).append(node)
    found: Kinds = {}
    for group in groups.values():
        shared = any(n in kinds and kinds[n][0] == "qkv" and flow.linears[n].x is flow.linears[group[0]].x for n in flow.linears)
        if len(group) >= 3:
            roles = [("q",), ("k",), ("v",)]
            found |= {n: ("qkv", roles[min(i, 2)]) for i, n in enumerate(group)}
        elif shared or all(_splits_heads(n) for n in group):
            found |= {n: ("qkv", ("v",) if shared else ("q", "k", "v")) for n in group}
    return found


def parted_attn_out(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """After a graph break inside attention: the first linear of what came out of it."""
    if not context.open_attention or flow.attentions:
        return {}
    for node, call in flow.linears.items():
        if node not in kinds and flow.of(call.x) and all(n.op == "placeholder" for n in flow.of(call.x)):
            return {node: ("attn_out", ("o",))}
    return {}


RULES: tuple[Callable[[Flow, Context, Kinds], Kinds], ...] = (qkv, parted_attn_out, attn_out, vocab, parted_qkv, ffn)


def classify(flow: Flow, context: Context) -> Kinds:
    """(kind, roles) of every linear; "adapter" for a low-rank path that stays in float."""
    kinds: Kinds = {}
    for rule in RULES:
        kinds |= {node: kind for node, kind in rule(flow, context, kinds).items() if node not in kinds}
    kinds |= {node: ("adapter", ()) for node in flow.adapters}
    return {node: kinds.get(node, ("linear", ())) for node in flow.linears}


def _splits_heads(node: Node) -> bool:
    """Whether the value is cut in three, or viewed with one more dimension, on its way."""
    rank = len(shape_of(node) or ())
    queue = list(node.users)
    while queue:
        user = queue.pop()
        name = op_name(user)
        if name in SPLITS or (name in SHAPES and len(shape_of(user) or ()) > rank):
            return True
        if name in SHAPES | FLIPS:
            queue.extend(user.users)
    return False
