"""Torch's own attention layers, which reach a captured graph as one call, as the operations that they stand for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten, tree_unflatten

from qpass.graph.torch_private import trace_aten
from qpass.graph.vocabulary import op_name, value_of


def expand(gm: GraphModule) -> None:
    """Replace nn.MultiheadAttention's and nn.TransformerEncoderLayer's calls in `gm` by their linears and attention."""
    found = [(node, _LAYERS[op_name(node)]) for node in gm.graph.nodes if op_name(node) in _LAYERS]
    for node, function in found:
        _inline(gm.graph, node, function)
    if found:
        gm.recompile()


def inline_no_grad(gm: GraphModule) -> None:
    """Put the parts of an exported graph that ran under torch.no_grad() where they are called: all of it is inference."""
    for node in list(gm.graph.nodes):
        if op_name(node) != "wrap_with_set_grad_enabled":
            continue
        _, body, *args = node.args
        assert isinstance(body, Node)
        inner = getattr(gm, str(body.target)).graph
        with gm.graph.inserting_before(node):
            outputs: Any = gm.graph.graph_copy(inner, dict(zip(inner.find_nodes(op="placeholder"), args, strict=True)))
        for user in list(node.users):
            _put(outputs[user.args[1]], user)
            gm.graph.erase_node(user)
        gm.graph.erase_node(node)
        if not body.users:
            gm.graph.erase_node(body)


def drop_whole_slices(gm: GraphModule) -> list[str]:
    """Take out slices of a whole axis, which `x[:, None]` leaves in an exported graph; -> their names."""
    dropped = []
    for node in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.slice.Tensor):
        given: list[Any] = [*node.args, *(0, 0, None, None, 1)[len(node.args) :]]
        start, end, step = given[2:]
        if start in (0, None) and (end is None or end == sys.maxsize) and step == 1:
            node.replace_all_uses_with(given[0])
            gm.graph.erase_node(node)
            dropped.append(node.name)
    return dropped


def _inline(graph: Graph, node: Node, function: Callable[..., Any]) -> None:
    leaves, structure = tree_flatten((node.args, node.kwargs))
    nodes = [leaf for leaf in leaves if isinstance(leaf, Node)]

    def call(*values: Any) -> list[Any]:
        given = iter(values)
        args, kwargs = tree_unflatten([next(given) if isinstance(v, Node) else v for v in leaves], structure)
        out = function(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]

    traced = trace_aten(call, [value_of(n) for n in nodes])
    copies = dict(zip(traced.graph.find_nodes(op="placeholder"), nodes, strict=True))
    with graph.inserting_before(node):
        outputs: Any = graph.graph_copy(traced.graph, copies)
    for user in list(node.users):
        if op_name(user) == "getitem" and isinstance(value_of(node), tuple | list):
            _put(outputs[user.args[1]], user)
            graph.erase_node(user)
    if node.users:
        node.replace_all_uses_with(outputs[0])
    graph.erase_node(node)


def _put(value: Node | None, old: Node) -> None:
    """`value` in the place of `old`, also where it is None: weights that were not asked for."""
    for reader in list(old.users):
        args, kwargs = torch.fx.node.map_arg((reader.args, reader.kwargs), lambda n: value if n is old else n)
        reader.args, reader.kwargs = args, kwargs


def _attention(
    x: Tensor, heads: int, qkv: tuple[Tensor, Tensor], out: tuple[Tensor, Tensor], mask: Tensor | None, kind: int | None
) -> Tensor:
    """Self-attention of x [B, L, E]. `kind` 0: mask [L, L]; 1: [B, L], of keys; 2: [B, H, L, L]. True, or -inf, is masked."""
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in F.linear(x, *qkv).chunk(3, -1))
    if mask is not None:
        mask = mask[:, None, None, :] if kind == 1 else mask
        mask = mask.logical_not() if mask.dtype == torch.bool else mask.to(x.dtype)
    y = F.scaled_dot_product_attention(q, k, v, mask)
    return F.linear(y.transpose(1, 2).flatten(2), *out)


def _native_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    mask: Tensor | None = None,
    need_weights: bool = True,
    average_weights: bool = True,
    mask_type: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """nn.MultiheadAttention's fast path: self-attention; with weights asked for, torch's general function computes it."""
    if not need_weights:
        qkv, out = (qkv_weight, qkv_bias), (out_weight, out_bias)
        return _attention(query, heads, qkv, out, mask, mask_type), None
    padding, attend = (mask, None) if mask_type == 1 else (None, mask)
    q, k, v = (t.transpose(0, 1) for t in (query, key, value))
    y, weights = F.multi_head_attention_forward(
        q, k, v, embed_dim, heads, qkv_weight, qkv_bias, None, None, False, 0.0, out_weight, out_bias, False, padding,
        True, attend, average_attn_weights=average_weights,
    )  # fmt: skip
    return y.transpose(0, 1), weights


def _encoder_layer(
    x: Tensor,
    embed_dim: int,
    heads: int,
    qkv_weight: Tensor,
    qkv_bias: Tensor,
    out_weight: Tensor,
    out_bias: Tensor,
    gelu: bool,
    norm_first: bool,
    eps: float,
    norm1_weight: Tensor,
    norm1_bias: Tensor,
    norm2_weight: Tensor,
    norm2_bias: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    mask: Tensor | None = None,
    mask_type: int | None = None,
) -> Tensor:
    """nn.TransformerEncoderLayer's fast path, as its module writes it out for the slow one."""

    def norm1(t: Tensor) -> Tensor:
        return F.layer_norm(t, (embed_dim,), norm1_weight, norm1_bias, eps)

    def norm2(t: Tensor) -> Tensor:
        return F.layer_norm(t, (embed_dim,), norm2_weight, norm2_bias, eps)

    def attend(t: Tensor) -> Tensor:
        return _attention(t, heads, (qkv_weight, qkv_bias), (out_weight, out_bias), mask, mask_type)

    def feed_forward(t: Tensor) -> Tensor:
        hidden = F.linear(t, up_weight, up_bias)
        return F.linear(F.gelu(hidden) if gelu else F.relu(hidden), down_weight, down_bias)

    if norm_first:
        x = x + attend(norm1(x))
        return x + feed_forward(norm2(x))
    x = norm1(x + attend(x))
    return norm2(x + feed_forward(x))


_LAYERS: dict[str, Callable[..., Any]] = {
    "multi_head_attention_forward": F.multi_head_attention_forward,
    "_native_multi_head_attention": _native_attention,
    "_transformer_encoder_layer_fwd": _encoder_layer,
}
