"""The KV cache: an attention whose K and V are dequantized from integer storage reads that storage itself."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.attention import Attention, read_whole
from qpass.graph.calls import AttentionCall, is_float_tensor
from qpass.graph.flow import Flow, memory_behind, rearranged
from qpass.graph.provenance import stand_for
from qpass.graph.vocabulary import CASTS, CATS, op_name, shape_of, source_of, value_of
from qpass.sites.core import Edit, Match, Site, Skip, current, erase_unused

_ONE_LINE = "pass past_key_values=qpass.KVCache(model.config, max_cache_len=...), or use qpass.quantize with a recipe that has kv"
_UNKNOWN = (
    "the cache is quantized, but its attention holds something unknown between the product of queries and keys and the "
    "softmax, and reads it dequantized; load the model with attn_implementation='sdpa', or 'eager'"
)
_CROSS = "cross attention: its keys and values are written once, from another sequence; KVCache does not hold them"
_REPEATS = {"getitem", "unsqueeze", "expand", "reshape", "view", "repeat_interleave"} | CASTS


@dataclass(frozen=True)
class StoredRead:
    """One operand of an attention, read from storage: a qpass::read_cache node, and the slice of its tokens, if not all."""

    node: Node
    tokens: slice | None
    parts: tuple[Node | None, ...]
    columns: int
    spec: str
    #: first, last, start: the tokens that are there as floats too.
    floats: tuple[Any, Any, Any]

    @classmethod
    def of(cls, node: Node, tokens: slice | None = None) -> StoredRead:
        """What a read_cache node says; a node that is erased says nothing any more."""
        floats = (*node.args[7:], None, None, None)[:3]
        return cls(node, tokens, node.args[:4], node.args[4], str(node.args[5]), floats)  # type: ignore[arg-type]


@dataclass(frozen=True)
class CacheRead:
    """An attention over a quantized cache. Sizes: of the whole cache in floats and as stored; 0 if a shape is symbolic.

    `attention`: in full, to be read as one operator; None if only the storage is quantized: of latents (DeepSeek), which
    linears make K and V of after they are dequantized, and of a sliding window to which several tokens are added.
    """

    node: Node
    k: StoredRead
    v: StoredRead
    attention: Attention | None

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
        return sum(_nbytes(p) for read in (self.k, self.v) for p in read.parts if p is not None)

    @property
    def bytes_per_token(self) -> float:
        """Stored bytes that one token of one sequence takes in this layer."""
        batch, _, tokens, _ = shape_of(self.k.node) or (0, 0, 0, 0)
        known = isinstance(batch, int) and isinstance(tokens, int) and batch * tokens
        return self.bytes_stored / (batch * tokens) if known else 0.0


def _nbytes(node: Node) -> int:
    shape = shape_of(node) or ()
    return math.prod(shape) * value_of(node).dtype.itemsize if all(isinstance(n, int) for n in shape) else 0


def find(flow: Flow, names: dict[Node, str], wanted: bool) -> tuple[list[Match], list[Skip]]:
    """Caches of the graph: quantized ones as matches; float ones as skips. `wanted`: the recipe has a kv format."""
    matches, skips = [], []
    for node, attention in flow.attentions.items():
        producers = flow.linears_behind(attention.k)
        name = names[flow.linears[producers[0]].weight] if producers else f"cache of {node.name}"
        whole = read_whole(node)
        k, v = (None, None) if whole is None else (_stored_behind(whole.k), _stored_behind(whole.v))
        site = Site("kv", name, ("k", "v"))
        if whole is not None and k is not None and v is not None and _reads_alike(k, v):
            matches.append(Match(site, node, None, CacheRead(node, k, v, whole)))
        elif len(reads := _reads_behind(flow, attention)) == 2:
            first, second = (StoredRead.of(n) for n in reads)
            if whole is None and _stored_behind(attention.v) is not None:
                skips.append(Skip(site, _UNKNOWN))
            else:
                matches.append(Match(site, node, None, CacheRead(node, first, second, None)))
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
    """read_cache, slice of tokens, repeat for grouped heads, attention -> one qpass::attention of the stored parts.

    Where only the storage is quantized, nothing changes.
    """
    call: CacheRead = match.call
    whole, node = call.attention, call.node
    if whole is None:
        return Edit("convert", match.site.name, (), ())
    before = set(graph.nodes)
    heads = (shape_of(call.k.node) or ())[1]
    with graph.inserting_before(node):
        (k_first, k_last, start), (v_first, v_last, _) = call.k.floats, call.v.floats
        k, v = (_parts(graph, read) for read in (call.k, call.v))
        floats = (k_first, v_first, k_last, v_last, start)
        out = as_one(graph, whole, (*k, call.specs[0]), (*v, call.v.columns, call.specs[1]), heads, floats)
    out.meta = dict(node.meta)
    node.replace_all_uses_with(out)
    added = [n for n in graph.nodes if n not in before]
    removed = erase_unused(graph, node)
    stand_for(added, removed)
    return Edit("convert", match.site.name, tuple(n.name for n in removed), tuple(n.name for n in added))


_aten = torch.ops.aten


def as_one(
    graph: Graph, whole: Attention, k: Sequence[Any], v: Sequence[Any], heads: Any,
    floats: Sequence[Any] = (None,) * 5,
) -> Node:  # fmt: skip
    """The operator qpass::attention of an attention that was read. `k`, `v`: its arguments for the two halves; `floats`: the
    tokens that are there as floats; `heads`: of K, where batch and heads are one dimension."""
    flat = len(shape_of(whole.q) or ()) == 3
    query = current(whole.q)
    q = graph.call_function(_aten.unflatten.int, (query, 0, [-1, heads])) if flat else query
    sinks = whole.sinks
    if sinks is not None:  # [B, H, Q, 1] -> [H]
        sinks = graph.call_function(operator.getitem, (sinks, (0, slice(None), 0, 0)))
    rest = (_mask(graph, whole, heads if flat else 0), whole.is_causal, whole.scale, *floats, whole.soft_cap, sinks)
    new = graph.call_function(torch.ops.qpass.attention.default, (q, *k, *v, *rest))
    leaves_flat = len(shape_of(whole.node) or ()) == 3  # scores may have taken on four dimensions between two products
    return graph.call_function(_aten.flatten.using_ints, (new, 0, 1)) if leaves_flat else new


def _mask(graph: Graph, whole: Attention, heads: int) -> Node | None:
    """One mask for all: booleans, True where a score counts, or floats. `heads`: those in the first of three dimensions."""

    def insert(target: Any, *args: Any) -> Node:
        return graph.call_function(target, args)

    if not whole.masks:
        return whole.sdpa_mask
    shaped = [
        (insert(_aten.unflatten.int, m, 0, [-1, heads]) if heads and len(shape_of(m) or ()) == 3 else m, fill)
        for m, fill in whole.masks
    ]
    floats = [m for m, fill in shaped if fill is None]
    if not floats and len(shaped) == 1:
        return insert(_aten.logical_not.default, shaped[0][0])
    total = floats[0] if floats else 0.0
    for m in floats[1:]:
        total = insert(_aten.add.Tensor, total, m)
    for m, fill in shaped:
        if fill is not None:
            where = _aten.where.ScalarSelf if isinstance(total, Node) else _aten.where.Scalar
            total = insert(where, m, fill, total)
    return total  # type: ignore[return-value]


def _parts(graph: Graph, read: StoredRead) -> list[Any]:
    """The stored parts [B, H, S, *], cut to the tokens that are read."""
    if read.tokens is None:
        return list(read.parts)
    cut = (slice(None), slice(None), read.tokens)
    return [None if p is None else graph.call_function(operator.getitem, (p, cut)) for p in read.parts]


def _stored_behind(value: Any) -> StoredRead | None:
    """The stored tensor that `value` [B, Hq, S, D] is, but for a slice of tokens and repeated heads (grouped queries).

    It may have batch and heads in one dimension.
    """
    node, tokens = value, None
    while isinstance(node, Node) and op_name(node) in _REPEATS:
        shape = shape_of(node)
        if shape is None or len(shape) not in (3, 4, 5):
            return None
        if op_name(node) == "getitem":
            cut = [i for i in _indices(node) if i not in (None, slice(None))]
            if cut and (tokens is not None or len(cut) > 1 or _indices(node)[2:3] != cut):
                return None
            tokens = cut[0] if cut else tokens
        node = source_of(node)
    if not isinstance(node, Node) or op_name(node) != "qpass::read_cache":
        return None
    stored, seen = shape_of(node), shape_of(value)
    if stored is None or seen is None or len(stored) != 4 or len(seen) not in (3, 4):
        return None
    same = (tokens is not None or stored[2] == seen[-2]) and stored[3] == seen[-1]
    if len(seen) == 3:
        return StoredRead.of(node, tokens) if same and stored[0] * stored[1] == seen[0] else None
    same = same and stored[0] == seen[0] and seen[1] % stored[1] == 0
    return StoredRead.of(node, tokens) if same else None


def _reads_alike(k: StoredRead, v: StoredRead) -> bool:
    """Whether the same tokens of both are floats, and all of them are there to be read beside the stored ones."""
    cut = k.tokens
    floats_fit = cut is None or k.floats == (None, None, None) or cut.start in (None, 0)
    scales_fit = cut is None or not any(":t" in read.spec for read in (k, v))  # groups of tokens are not cut
    return k.floats[2] is v.floats[2] and cut == v.tokens and floats_fit and scales_fit


def _reads_behind(flow: Flow, attention: AttentionCall) -> list[Node]:
    """Dequantized storage that K and V are made of."""
    queue: list[Any] = [attention.k, attention.v]
    seen: set[Node] = set()
    found: list[Node] = []
    while queue:
        node = queue.pop(0)
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if op_name(node) == "qpass::read_cache":
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
