"""The KV cache: an attention whose K and V are dequantized from integer storage reads that storage itself."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.calls import AttentionCall, is_float_tensor
from qpass.graph.flow import Flow, memory_behind, rearranged
from qpass.graph.vocabulary import CASTS, CATS, SDPA, argument, op_name, shape_of, source_of, value_of
from qpass.sites.core import Edit, Match, Site, Skip

_ONE_LINE = "pass past_key_values=qpass.KVCache(model.config, max_cache_len=...), or use qpass.quantize with a recipe that has kv"
_NOT_SDPA = (
    "the cache is quantized, but its attention is not F.scaled_dot_product_attention and reads it dequantized; "
    "load the model with attn_implementation='sdpa'"
)
_CROSS = "cross attention: its keys and values are written once, from another sequence; KVCache does not hold them"
_REPEATS = {"getitem", "unsqueeze", "expand", "reshape", "view", "repeat_interleave"} | CASTS


@dataclass(frozen=True)
class StoredRead:
    """One operand of an attention, read from storage: a qpass::dequantize node, and the slice of its tokens, if not all."""

    node: Node
    tokens: slice | None

    @property
    def spec(self) -> str:
        """The format that the storage is in."""
        return str(self.node.args[5])


@dataclass(frozen=True)
class CacheRead:
    """An attention over a quantized cache. Sizes: of the whole cache in floats and as stored; 0 if a shape is symbolic.

    `latent`: what is stored is compressed (DeepSeek); linears make K and V of it after it is dequantized.
    """

    attention: Node
    k: StoredRead
    v: StoredRead
    latent: bool = False

    @property
    def specs(self) -> tuple[str, str]:
        """Formats of K and V, or of the two latents."""
        return self.k.spec, self.v.spec

    @property
    def bytes_float(self) -> int:
        """Of the whole cache, had it stayed in float."""
        return _nbytes(self.k.node) + _nbytes(self.v.node)

    @property
    def bytes_stored(self) -> int:
        """Of codes, scales and zero points."""
        return sum(_nbytes(p) for read in (self.k, self.v) for p in read.node.args[:4] if isinstance(p, Node))


def _nbytes(node: Node) -> int:
    shape = shape_of(node) or ()
    return math.prod(shape) * value_of(node).dtype.itemsize if all(isinstance(n, int) for n in shape) else 0


def find(flow: Flow, names: dict[Node, str], wanted: bool) -> tuple[list[Match], list[Skip]]:
    """Caches of the graph: quantized ones as matches; float ones as skips. `wanted`: the recipe has a kv format."""
    matches, skips = [], []
    for node, attention in flow.attentions.items():
        producers = flow.linears_behind(attention.k)
        name = names[flow.linears[producers[0]].weight] if producers else f"cache of {node.name}"
        k, v = _stored_behind(attention.k), _stored_behind(attention.v)
        if k is not None and v is not None:
            site = Site("kv", name, ("k", "v"))
            if op_name(node) in SDPA and not argument(node, 4, "dropout_p", 0.0):
                matches.append(Match(site, node, None, CacheRead(node, k, v)))
            else:
                skips.append(Skip(site, _NOT_SDPA))
        elif len(latents := _latents_behind(flow, attention)) == 2:
            first, second = (StoredRead(n, None) for n in latents)
            matches.append(Match(Site("kv", name, ("k", "v")), node, None, CacheRead(node, first, second, latent=True)))
        elif _is_cross(flow, attention) and (_is_given(attention.k) or _has_float_cache(flow, attention.k)):
            skips.append(Skip(Site("kv", name, ("k", "v")), _CROSS, expected=True))
        elif _has_float_cache(flow, attention.k):
            why = "the caller owns a float cache" if wanted else "the recipe leaves kv in float"
            skips.append(Skip(Site("kv", name, ("k", "v")), f"{why}: {_ONE_LINE}", expected=not wanted))
    return matches, skips + _states(flow)


def _is_given(key: Any) -> bool:
    """Whether K is an input as it is."""
    return isinstance(key, Node) and rearranged(key).op in ("placeholder", "get_attr")


def _is_cross(flow: Flow, attention: AttentionCall) -> bool:
    """Whether the keys are made of something else than the queries, or were made in an earlier call."""
    queries, keys = (
        [flow.of(flow.linears[n].x) for n in flow.linears_mixed_in(side)] for side in (attention.q, attention.k)
    )
    return bool(queries) and not any(a & b for a in queries for b in keys)


def _states(flow: Flow) -> list[Skip]:
    """Memory that the graph keeps from call to call beside keys and values: states of state-space and linear attention."""
    caches: set[Node] = set()
    queue: list[Any] = [operand for a in flow.attentions.values() for operand in (a.k, a.v)]
    seen: set[Node] = set()
    while queue:
        node = queue.pop()
        if isinstance(node, Node) and node not in seen and node not in flow.residuals and node not in flow.attentions:
            seen.add(node)
            caches.add(memory_behind(node))
            queue += [*node.all_input_nodes, *flow.written.get(node, ())]
    kept = [n for n in flow.written if n.op in ("placeholder", "get_attr") and n not in caches]
    large = [n for n in kept if is_float_tensor(n) and len(shape_of(n) or ()) >= 3 and n not in flow.parameters]
    return [Skip(Site("kv", n.name), "a recurrent state, which is no KV cache: stays in float", True) for n in large]


def rewrite(graph: Graph, match: Match) -> Edit:
    """dequantize, slice of tokens, repeat for grouped heads, attention -> one qpass::attention of the stored parts.

    Latents stay where they are: only their storage is quantized.
    """
    call: CacheRead = match.call
    if call.latent:
        return Edit("convert", match.site.name, (), ())
    node = call.attention
    query, key, value = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    with graph.inserting_before(node):
        k, v = (_parts(graph, read) for read in (call.k, call.v))
        v_columns = call.v.node.args[4]
        rest = (argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False), argument(node, 6, "scale"))
        args = (query, *k, call.specs[0], *v, v_columns, call.specs[1], *rest)
        new = graph.call_function(torch.ops.qpass.attention.default, args)
    new.meta = dict(node.meta)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
    removed = [node.name]
    for operand, read in ((key, call.k), (value, call.v)):
        while not operand.users:
            parent = operand.args[0]
            removed.append(operand.name)
            graph.erase_node(operand)
            if operand is read.node:
                break
            operand = parent
    slices = [
        n.name for n in (*k, *v) if isinstance(n, Node) and n.op == "call_function" and n.target is operator.getitem
    ]
    return Edit("convert", match.site.name, tuple(removed), (*slices, new.name))


def _parts(graph: Graph, read: StoredRead) -> list[Any]:
    """The stored parts [B, H, S, *], cut to the tokens that are read."""
    if read.tokens is None:
        return list(read.node.args[:4])
    cut = (slice(None), slice(None), read.tokens)
    return [None if p is None else graph.call_function(operator.getitem, (p, cut)) for p in read.node.args[:4]]


def _stored_behind(value: Any) -> StoredRead | None:
    """The stored tensor that `value` [B, Hq, S, D] is, but for a slice of tokens and repeated heads (grouped queries)."""
    node, tokens = value, None
    while isinstance(node, Node) and op_name(node) in _REPEATS:
        shape = shape_of(node)
        if shape is None or len(shape) not in (4, 5):
            return None
        if op_name(node) == "getitem":
            cut = [i for i in _indices(node) if i not in (None, slice(None))]
            if cut and (tokens is not None or len(cut) > 1 or _indices(node)[2:3] != cut):
                return None
            tokens = cut[0] if cut else tokens
        node = source_of(node)
    if not isinstance(node, Node) or op_name(node) != "qpass::dequantize":
        return None
    stored, seen = shape_of(node), shape_of(value)
    if stored is None or seen is None or len(stored) != 4 or len(seen) != 4:
        return None
    same = stored[0] == seen[0] and (tokens is not None or stored[2] == seen[2]) and stored[3] == seen[3]
    return StoredRead(node, tokens) if same and seen[1] % stored[1] == 0 else None


def _latents_behind(flow: Flow, attention: AttentionCall) -> list[Node]:
    """Dequantized storage that K and V are computed from by linears."""
    queue: list[Any] = [attention.k, attention.v]
    seen: set[Node] = set()
    found: list[Node] = []
    while queue:
        node = queue.pop(0)
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if op_name(node) == "qpass::dequantize":
            found.append(node)
        elif node not in flow.attentions and node not in flow.residuals:
            queue += [*node.all_input_nodes, *flow.written.get(node, ())]
    return found


def _indices(node: Node) -> list[Any]:
    index: Any = node.args[1]
    return list(index) if isinstance(index, tuple | list) else [index]


def _has_float_cache(flow: Flow, key: Any) -> bool:
    """Whether K reads memory that the graph writes, is joined to an input, or is returned to the caller."""
    queue, seen = [key], set()
    returned = set(flow.outputs)
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in seen or node in flow.linears:
            continue
        seen.add(node)
        given = map(memory_behind, node.all_input_nodes)
        inputs = [n for n in given if n.op in ("placeholder", "get_attr") and len(shape_of(n) or ()) == 4]
        root = memory_behind(node)
        kept = root in flow.written and (root.op in ("placeholder", "get_attr") or root in returned)
        if kept or node in returned or (op_name(node) in CATS and inputs):
            return True
        queue.extend(node.all_input_nodes)
    return False
