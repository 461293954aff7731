"""Which kind each linear and each embedding is, from data flow alone. One rule a kind, applied in order; first wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from qpass.graph.flow import Flow, tokenwise_linears
from qpass.graph.vocabulary import SELECTIONS, op_name, shape_of

#: linear node -> (kind, roles), in the order found
Kinds = dict[Node, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Context:
    """What earlier graphs told: rows and identities of the embedding tables seen. A head behind a graph break is alone."""

    vocabularies: frozenset[int] = frozenset()
    tables: frozenset[int] = frozenset()


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
            # A score for each token has a dimension more than the tokens; a class of the whole text has not.
            per_token = len(shape_of(node) or ()) > 2 and weight.shape[-1 if call.transposed else -2] in rows
            if id(weight) in tables or per_token:
                found[node] = ("vocab", ("vocab",))
    return found


def router(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linear whose scores choose among experts, and gates of a single row: too small to pay, too sensitive to round."""
    found: Kinds = {}
    for node in flow.graph.nodes:
        if op_name(node) in SELECTIONS and node.args:
            behind = flow.linears_behind(node.args[0])
            if len(behind) == 1 and not any(n in flow.attentions for n in flow.of(node.args[0])):
                found[behind[0]] = ("router", ())
    for node, call in flow.linears.items():
        if (shape_of(node) or (0,))[-1] == 1 and call.route is None:
            found[node] = ("router", ())
    return found


def ffn(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """Linears that lead, through other linears and no residual add, to one that is added to the residual stream.

    Each token by itself: a convolution, a scan or a product of activations in between belongs to a layer of another sort.
    """
    found: Kinds = {}

    def producers(node: Node) -> list[Node]:
        behind = tokenwise_linears(flow, flow.linears[node].x)
        return [n for n in behind if n not in kinds and n not in flow.adapters]

    def include(node: Node, role: str) -> None:
        if node in found:
            return
        found[node] = ("ffn", (role,))
        inner = producers(node)
        for i, producer in enumerate(inner):
            include(producer, ("gate", "up")[i] if len(inner) == 2 else "up")

    for node in flow.linears:
        if node not in kinds and node not in flow.adapters and node in flow.added and producers(node):
            include(node, "down")
    return found


RULES: tuple[Callable[[Flow, Context, Kinds], Kinds], ...] = (qkv, attn_out, vocab, router, ffn)


def classify(flow: Flow, context: Context) -> Kinds:
    """(kind, roles) of every linear; "adapter" for a low-rank path that stays in float."""
    kinds: Kinds = {}
    for rule in RULES:
        kinds |= {node: kind for node, kind in rule(flow, context, kinds).items() if node not in kinds}
    kinds |= dict.fromkeys(flow.adapters, ("adapter", ()))
    return {node: kinds.get(node, ("linear", ())) for node in flow.linears}
