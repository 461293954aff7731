"""Which kind each linear and each embedding is, from data flow alone. One rule a kind, applied in order; first wins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch.fx import Node

from qpass.graph.attention import read_whole
from qpass.graph.flow import Flow, rearranged, tokenwise_linears
from qpass.graph.vocabulary import CATS, SELECTIONS, op_name, shape_of, source_of

#: A table of fewer rows than this is no vocabulary (types of tokens, segments).
_VOCABULARY = 8
#: Rows of a linear that computes gates or coefficients (hyper-connections, per-head decays): far fewer than columns.
_FEW = 32
#: linear node -> (kind, roles), in the order found
Kinds = dict[Node, tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class Context:
    """What earlier graphs told: rows and identities of the embedding tables seen. A head behind a graph break is alone.

    `fragment`: the graph ends or begins at a graph break.
    """

    vocabularies: frozenset[int] = frozenset()
    tables: frozenset[int] = frozenset()
    fragment: bool = False


def qkv(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linears that an attention's q, k and v are made of. A fused one has all its roles.

    Also those before them in latent attention (DeepSeek): a projection to fewer features, read by these linears alone,
    or by those that choose which tokens to attend to.
    """
    found: dict[Node, set[str]] = {}
    chosen = {
        n for node in flow.graph.nodes if op_name(node) in SELECTIONS for n in flow.linears_behind(source_of(node))
    }
    for attention in flow.attentions.values():
        for role, operand in (("q", attention.q), ("k", attention.k), ("v", attention.v)):
            for node in flow.linears_mixed_in(operand):
                found.setdefault(node, set()).add(role)
    direct = dict(found)
    for node in {n for reader in direct for n in flow.linears_behind(flow.linears[reader].x)}:
        rows, columns = flow.linears[node].sizes(flow.parameters)
        if rows < columns and flow.readers[node] <= direct.keys() | chosen and node not in flow.added:
            found.setdefault(node, set()).update(*(direct[n] for n in flow.readers[node] if n in direct))
    return {node: ("qkv", tuple(sorted(roles, key="qkv".index))) for node, roles in found.items()}


def attn_out(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The first linear after an attention, and one that follows it with nothing in between (a low-rank pair)."""
    found: Kinds = {}
    for node, call in flow.linears.items():
        if rearranged(call.x) in found or any(n in flow.attentions for n in flow.of(call.x)):
            found[node] = ("attn_out", ("o",))
    return found


def vocab(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linear that the graph's output is made of, if its rows are the vocabulary or its weight is the embedding's."""
    tables = {id(flow.parameters[e.weight]) for e in flow.embeddings.values()} | context.tables
    rows = {flow.parameters[e.weight].shape[0] for e in flow.embeddings.values() if flow.of(e.indices)}  # no positions
    rows = {n for n in rows | context.vocabularies if n >= _VOCABULARY}
    found: Kinds = {}
    for output in flow.outputs:
        for node in flow.linears_behind(output):
            call = flow.linears[node]
            size = call.sizes(flow.parameters)[0]  # tables and projections are padded, or have a few tokens more
            near = {n for n in rows if abs(size - n) <= 0.1 * n}
            # What is no score of each token may still be that of the last one, but no smaller table tells.
            scores = near if len(shape_of(node) or ()) > 2 else near & {max(rows, default=0)}
            if scores or id(flow.parameters[call.weight]) in tables:
                found[node] = ("vocab", ("vocab",))
    return found


def router(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """The linears whose scores choose among experts: fewer than features, and other linears depend on the choice."""
    found: Kinds = {}
    for node in flow.graph.nodes:
        scores = source_of(node) if op_name(node) in SELECTIONS else None
        behind = tokenwise_linears(flow, scores) if isinstance(scores, Node) else []
        if len(behind) == 1 and behind[0] not in found and flow.linears[behind[0]].route is None:
            experts, features = flow.linears[behind[0]].sizes(flow.parameters)
            used = _reaches_linear(flow, node) or (context.fragment and behind[0] not in vocab(flow, context, kinds))
            if 2 * experts <= features and used:
                found[behind[0]] = ("router", ())
    for node in reversed(flow.linears):  # a small network whose last linear chooses
        if flow.readers.get(node) and flow.readers[node] <= found.keys():
            found[node] = ("router", ())
    return found


def _reaches_linear(flow: Flow, node: Node) -> bool:
    """Whether a linear, or the choice of its expert, is computed from `node`; a choice that is returned is a next token."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop().users:
            if user in flow.linears:
                return True
            if user not in seen:
                seen.add(user)
                queue.append(user)
    return False


def few(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """Linears that make a few gates or coefficients: too small to pay, too sensitive to round."""
    found: Kinds = {}
    results = {
        n for output in flow.outputs for n in flow.of(output)
    }  # a classifier of two classes is what the model is for
    for node, call in flow.linears.items():
        rows, columns = call.sizes(flow.parameters)
        small = rows <= _FEW and _FEW // 4 * rows <= columns
        if (rows == 1 or small) and call.route is None and node not in results:
            found[node] = ("few", ())
    return found


def ffn(flow: Flow, context: Context, kinds: Kinds) -> Kinds:
    """Linears that lead, through other linears and no residual add, to one that is added to the residual stream.

    Each token by itself: a convolution, a scan or a product of activations in between belongs to a layer of another sort.
    """
    found: Kinds = {}

    def producers(node: Node, width: object) -> list[Node]:
        behind = tokenwise_linears(flow, flow.linears[node].x, width)
        return [n for n in behind if n not in kinds and n not in flow.adapters]

    def include(node: Node, role: str, width: object) -> None:
        if node in found:
            return
        found[node] = ("ffn", (role,))
        inner = producers(node, width)
        for i, producer in enumerate(inner):
            include(producer, ("gate", "up")[i] if len(inner) == 2 else "up", width)

    for node in flow.linears:
        width = flow.width(node)
        if node not in kinds and node not in flow.adapters and node in flow.added and producers(node, width):
            include(node, "down", width)
    return found


RULES: tuple[Callable[[Flow, Context, Kinds], Kinds], ...] = (
    router,
    qkv,
    attn_out,
    vocab,
    few,
    ffn,
)


def _parallel(flow: Flow, kinds: Kinds) -> Kinds:
    """Attention and feed-forward side by side in one linear: [q, k, v, up] before, cat(attention, activation) after."""
    found: Kinds = {}
    for node, (kind, roles) in kinds.items():
        joined = rearranged(flow.linears[node].x)
        if kind != "attn_out" or op_name(joined) not in CATS:
            continue
        for branch in joined.all_input_nodes:
            if not any(n in flow.attentions for n in flow.of(branch)):
                found[node] = (kind, (*roles, "down"))
                found |= {n: (kinds[n][0], (*kinds[n][1], "up")) for n in flow.linears_behind(branch) if n in kinds}
    return found


def tables_of_scores(flow: Flow) -> set[Node]:
    """The embeddings that are added to the scores of an attention, a column for each head, and go nowhere else: relative
    positions."""
    found: set[Node] = set()
    for node in flow.attentions:
        whole = read_whole(node)
        shape = () if whole is None else shape_of(whole.q) or ()
        if whole is None or len(shape) != 4:
            continue
        behind = {n for mask in (whole.sdpa_mask, *(m for m, _ in whole.masks)) for n in flow.of(mask)}
        tables = behind & flow.embeddings.keys() - flow.added - flow.readers.keys()
        found |= {n for n in tables if flow.width(n) == shape[1]}
    return found


def classify(flow: Flow, context: Context) -> Kinds:
    """(kind, roles) of every linear; "router", "few" and "adapter" for what stays in float."""
    kinds: Kinds = {}
    for rule in RULES:
        kinds |= {node: kind for node, kind in rule(flow, context, kinds).items() if node not in kinds}
    kinds |= _parallel(flow, kinds)
    kinds |= dict.fromkeys(flow.adapters, ("adapter", ()))
    return {node: kinds.get(node, ("linear", ())) for node in flow.linears}
