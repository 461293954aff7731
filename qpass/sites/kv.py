"""The KV cache: an attention whose K and V are dequantized from integer storage reads that storage itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from qpass.graph.flow import Flow, memory_behind
from qpass.graph.vocabulary import CASTS, SDPA, argument, op_name, shape_of, value_of
from qpass.sites.core import Edit, Match, Site, Skip

_ONE_LINE = "pass past_key_values=qpass.KVCache(model.config, max_cache_len=...), or use qpass.quantize with a recipe that has kv"
_REPEATS = {"getitem", "unsqueeze", "expand", "reshape", "view", "repeat_interleave"} | CASTS


@dataclass(frozen=True)
class CacheRead:
    """An attention over a quantized cache: `k` and `v` are the qpass::dequantize nodes that it reads through."""

    attention: Node
    k: Node
    v: Node
    specs: tuple[str, str]
    bytes_float: int
    bytes_stored: int


def _read(attention: Node, k: Node, v: Node) -> CacheRead:
    """Sizes are of the whole cache, in the attention's float type and as stored; 0 where a shape is symbolic."""
    stored = [part for read in (k, v) for part in read.args[:4] if isinstance(part, Node)]
    specs = (str(k.args[5]), str(v.args[5]))
    return CacheRead(attention, k, v, specs, _nbytes(k) + _nbytes(v), sum(map(_nbytes, stored)))


def _nbytes(node: Node) -> int:
    shape = shape_of(node) or ()
    return math.prod(shape) * value_of(node).dtype.itemsize if all(isinstance(n, int) for n in shape) else 0


def find(flow: Flow, names: dict[Node, str], wanted: bool) -> tuple[list[Match], list[Skip]]:
    """Caches of the graph: quantized ones as matches; float ones as skips. `wanted`: the recipe has a kv format."""
    matches, skips = [], []
    for node, attention in flow.attentions.items():
        producers = flow.linears_behind(attention.k)
        name = names[flow.linears[producers[0]].weight] if producers else f"cache of {node.name}"
        k, v = (_dequantize_behind(x) for x in (attention.k, attention.v))
        if k is not None and v is not None:
            site = Site("kv", name, ("k", "v"), tuple(int(s) for s in shape_of(k) or () if isinstance(s, int)))
            if op_name(node) in SDPA and not argument(node, 4, "dropout_p", 0.0):
                matches.append(Match(site, node, None, _read(node, k, v)))
            else:
                skips.append(
                    Skip(
                        site,
                        "the cache is quantized, but its attention is not F.scaled_dot_product_attention; "
                        "load the model with attn_implementation='sdpa'",
                    )
                )
        elif _has_float_cache(flow, attention.k):
            site = Site("kv", name, ("k", "v"))
            reason = (
                f"the caller owns a float cache: {_ONE_LINE}"
                if wanted
                else f"the recipe leaves kv in float; {_ONE_LINE}"
            )
            skips.append(Skip(site, reason, expected=not wanted))
    return matches, skips


def rewrite(graph: Graph, match: Match) -> Edit:
    """dequantize, repeat for grouped heads, attention -> one qpass::attention that reads the stored parts."""
    call: CacheRead = match.call
    node = call.attention
    mask, is_causal = argument(node, 3, "attn_mask"), argument(node, 5, "is_causal", False)
    scale = argument(node, 6, "scale")
    k_parts, v_parts = call.k.args[:4], call.v.args[:4]
    args = (node.args[0] if node.args else node.kwargs["query"], *k_parts, call.specs[0],
            *v_parts, call.v.args[4], call.specs[1], mask, is_causal, scale)  # fmt: skip
    with graph.inserting_before(node):
        new = graph.call_function(torch.ops.qpass.attention.default, args)
    new.meta = dict(node.meta)
    operands = [argument(node, 1, "key"), argument(node, 2, "value")]
    node.replace_all_uses_with(new)
    removed = [node.name]
    graph.erase_node(node)
    for operand in operands:
        while isinstance(operand, Node) and not operand.users and operand.op != "placeholder":
            parent = operand.args[0]
            removed.append(operand.name)
            graph.erase_node(operand)
            if op_name(operand) == "qpass::dequantize":
                break
            operand = parent
    return Edit("convert", match.site.name, tuple(removed), (new.name,))


def _dequantize_behind(value: Any) -> Node | None:
    """The qpass::dequantize that `value` is, or repeats along the heads (dimension 1) for grouped queries."""
    node = value
    while isinstance(node, Node) and op_name(node) in _REPEATS:
        shape = shape_of(node)
        if shape is None or len(shape) not in (4, 5):
            return None
        node = node.args[0]
    if not isinstance(node, Node) or op_name(node) != "qpass::dequantize":
        return None
    stored, seen = shape_of(node), shape_of(value)
    if stored is None or seen is None or len(stored) != 4 or len(seen) != 4:
        return None
    same = stored[0] == seen[0] and stored[2] == seen[2] and stored[3] == seen[3]
    return node if same and seen[1] % stored[1] == 0 else None


def _has_float_cache(flow: Flow, key: Any) -> bool:
    """Whether K reads memory that the graph writes, is joined to an input, or is returned to the caller."""
    queue, seen = [key], set()
    returned = set(flow.outputs)
    while queue:
        node = queue.pop()
        if not isinstance(node, Node) or node in seen or node in flow.linears:
            continue
        seen.add(node)
        inputs = [n for n in node.all_input_nodes if n.op == "placeholder" and len(shape_of(n) or ()) == 4]
        if memory_behind(node) in flow.written or node in returned or (op_name(node) in ("cat", "concat") and inputs):
            return True
        queue.extend(node.all_input_nodes)
    return False
