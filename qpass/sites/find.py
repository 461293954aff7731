"""All sites of one captured graph, and what is no site or cannot be one: the coverage contract starts here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.fx import Graph, Node

from qpass.graph.calls import EmbeddingCall, LinearCall
from qpass.graph.flow import analyze
from qpass.sites import kv
from qpass.sites.classify import Context, classify, tables_of_scores
from qpass.sites.core import Match, Site, Skip
from qpass.sites.reasons import IN_FLOAT, other_users, why_unused

#: One use of a Parameter: kind, roles, call.
Use = tuple[str, tuple[str, ...], LinearCall | EmbeddingCall]


def find_sites(
    graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], context: Context, kv_wanted: bool = False
) -> tuple[list[Match], list[Skip]]:
    """Every Parameter of two or more dimensions and every cache: as a Match, or as a Skip with its reason.

    `parameters`: placeholder -> tensor. `names`: placeholder -> display name. A tied Parameter has one Site with all its
    roles and one Match for each use.
    """
    flow = analyze(graph, parameters)
    kinds = classify(flow, context)
    uses: dict[Node, list[Use]] = {}
    scores = tables_of_scores(flow)
    for node, embedding in flow.embeddings.items():
        kind = "scores" if node in scores else "embedding"
        uses.setdefault(embedding.weight, []).append((kind, (kind,), embedding))
    for node, linear in flow.linears.items():
        uses.setdefault(linear.weight, []).append((*kinds[node], linear))

    matches: list[Match] = []
    skips: list[Skip] = []
    for placeholder, tensor in parameters.items():
        if tensor.dim() < 2 or not placeholder.users:
            continue
        if placeholder in flow.written:
            site = Site("other", names[placeholder], (), tuple(tensor.shape))
            skips.append(Skip(site, "the graph itself writes to this weight: stays in float"))
        elif placeholder not in uses:
            reason, expected = why_unused(placeholder, parameters)
            skips.append(Skip(Site("other", names[placeholder], (), tuple(tensor.shape)), reason, expected))
        else:
            found, left = _sites_of(placeholder, names[placeholder], tuple(tensor.shape), uses[placeholder])
            matches += found
            skips += left
    position = {node: i for i, node in enumerate(graph.nodes)}
    matches.sort(key=lambda m: position[m.node])
    caches, cache_skips = kv.find(flow, names, kv_wanted)
    return matches + caches, skips + cache_skips


def _sites_of(
    placeholder: Node, name: str, shape: tuple[int, ...], uses: Sequence[Use]
) -> tuple[list[Match], list[Skip]]:
    """The uses of one Parameter as matches of one site; what else reads it as skips."""
    kind = next((kind for kind, _, _ in uses if kind not in IN_FLOAT), uses[0][0])
    roles = tuple(dict.fromkeys(role for _, rs, _ in uses for role in rs))
    if kind in IN_FLOAT:
        return [], [Skip(Site("other", name, roles, shape), IN_FLOAT[kind], expected=True)]
    site, flipped = Site(kind, name, roles, shape), _transposed(uses[0][2])
    matched = [call for _, _, call in uses if _transposed(call) == flipped]
    skips = []
    if len(matched) < len(uses):
        skips.append(Skip(site, "used both as [out, in] and as [in, out]; the second use reads the float weight"))
    others = other_users(placeholder, {call.node for _, _, call in uses})
    if others:
        skips.append(Skip(site, f"also used by {', '.join(others)}, which reads the float weight"))
    return [Match(site, call.node, placeholder, call) for call in matched], skips


def _transposed(call: LinearCall | EmbeddingCall) -> bool:
    return isinstance(call, LinearCall) and call.transposed
