"""All sites of one captured graph, and what is no site or cannot be one: the coverage contract starts here."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Graph, Node

from qpass.graph.calls import EmbeddingCall, LinearCall, parameter_behind
from qpass.graph.flow import analyze
from qpass.graph.vocabulary import op_name
from qpass.sites import kv
from qpass.sites.classify import Context, classify
from qpass.sites.core import Match, Site, Skip


def find_sites(
    graph: Graph, parameters: Mapping[Node, Tensor], names: dict[Node, str], context: Context, kv_wanted: bool = False
) -> tuple[list[Match], list[Skip]]:
    """Every Parameter of two or more dimensions and every cache: as a Match, or as a Skip with its reason.

    `parameters`: placeholder -> tensor. `names`: placeholder -> display name. A tied Parameter has one Site with all its
    roles and one Match for each use.
    """
    flow = analyze(graph, parameters)
    kinds = classify(flow, context)
    uses: dict[Node, list[tuple[str, tuple[str, ...], LinearCall | EmbeddingCall]]] = {}
    for embedding in flow.embeddings.values():
        uses.setdefault(embedding.weight, []).append(("embedding", ("embedding",), embedding))
    for node, linear in flow.linears.items():
        uses.setdefault(linear.weight, []).append((*kinds[node], linear))

    matches: list[Match] = []
    skips: list[Skip] = []
    for placeholder, tensor in parameters.items():
        if tensor.dim() < 2 or not placeholder.users:
            continue
        shape = tuple(tensor.shape)
        if placeholder in flow.written:
            reason = "the graph itself writes to this weight: stays in float"
            skips.append(Skip(Site("other", names[placeholder], (), shape), reason))
            continue
        if placeholder not in uses:
            skips.append(Skip(Site("other", names[placeholder], (), shape), _why_unused(placeholder, parameters), True))
            continue
        kind = uses[placeholder][0][0]
        roles = tuple(dict.fromkeys(role for _, rs, _ in uses[placeholder] for role in rs))
        if kind == "adapter":
            site = Site("other", names[placeholder], roles, shape)
            skips.append(Skip(site, "adapter: a low-rank path beside a linear stays in float", expected=True))
            continue
        if any(isinstance(c, LinearCall) and c.route is not None for _, _, c in uses[placeholder]):
            reason = f"weights of {shape[0]} experts: no operator for them yet, they stay in float"
            skips.append(Skip(Site("other", names[placeholder], roles, shape), reason, True))
            continue
        if kind == "router":
            site = Site("other", names[placeholder], roles, shape)
            reason = (
                "chooses among experts, or is a gate or score of one row: small, and rounding costs more than it saves"
            )
            skips.append(Skip(site, reason, expected=True))
            continue
        site = Site(kind, names[placeholder], roles, shape)
        flipped = _transposed(uses[placeholder][0][2])
        for _, _, call in uses[placeholder]:
            if _transposed(call) == flipped:
                matches.append(Match(site, call.node, placeholder, call))
            else:
                reason = "used both as [out, in] and as [in, out]; the second use reads the float weight"
                skips.append(Skip(site, reason))
    position = {node: i for i, node in enumerate(graph.nodes)}
    matches.sort(key=lambda m: position[m.node])
    caches, cache_skips = kv.find(flow, names, kv_wanted)
    return matches + caches, skips + cache_skips


def _transposed(call: LinearCall | EmbeddingCall) -> bool:
    return isinstance(call, LinearCall) and call.transposed


def _why_unused(placeholder: Node, parameters: Mapping[Node, Tensor]) -> str:
    """Why a Parameter of two or more dimensions is no site."""
    users = sorted({op_name(user) or str(user.target) for user in placeholder.users})
    dims = parameters[placeholder].dim()
    if "_transformer_encoder_layer_fwd" in users:
        return "inside torch's fused encoder layer; call torch.backends.mha.set_fastpath_enabled(False) first"
    if any("conv" in user for user in users):
        return "convolution: no site of a transformer"
    if dims > 2:
        return f"a {dims}-D weight used by {', '.join(users)}: stays in float"
    if parameter_behind(placeholder, parameters) and any(user in ("linear", "matmul", "mm", "addmm") for user in users):
        return f"used by {', '.join(users)} as something other than a weight of its last dimension: stays in float"
    return f"used by {', '.join(users)}, which computes no linear and no embedding: stays in float"
