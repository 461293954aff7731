"""An attention in full, fused or written out: softmax(capped(scale * q k^T) + mask, sinks) v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qpass.graph.vocabulary import (
    ADDS,
    CASTS,
    CATS,
    DROPOUTS,
    FLIPS,
    MATMULS,
    SDPA,
    SOFTMAXES,
    argument,
    op_name,
    shape_of,
    source_of,
)

_VIEWS = {"view", "reshape", "_unsafe_view", "unsqueeze", "flatten", "expand"}
_PRODUCTS, _QUOTIENTS = {"mul", "multiply", "imul", "mul_"}, {"div", "truediv", "div_", "itruediv"}


@dataclass(frozen=True)
class Attention:
    """softmax(capped(scale * q k^T) + masks, sinks) v, the value of `node`.

    `k` [.., S, D] before it is transposed. `scale`: None for 1 / sqrt(D). `soft_cap`: c of c * tanh(score / c), or 0.
    `masks`: (node, fill): floats to add, with fill None; or booleans, True where a score is replaced by `fill`.
    `sdpa_mask`: booleans, True where a score counts, or floats to add. `sinks`: scores without
    a value, [.., H, .., 1] beside the others.
    """

    node: Node
    q: Node
    k: Node
    v: Node
    scale: float | None = None
    soft_cap: float = 0.0
    masks: tuple[tuple[Node, float | None], ...] = ()
    sdpa_mask: Node | None = None
    is_causal: bool = False
    sinks: Node | None = None


def read_whole(node: Node) -> Attention | None:
    """The attention that ends in `node`; None if something in it is not known."""
    if op_name(node) in SDPA:
        if argument(node, 4, "dropout_p", 0.0):
            return None
        q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
        mask, causal, scale = (
            argument(node, 3, "attn_mask"),
            argument(node, 5, "is_causal", False),
            argument(node, 6, "scale"),
        )
        return Attention(node, q, k, v, scale, sdpa_mask=mask, is_causal=bool(causal))
    if op_name(node) not in MATMULS - {"einsum", "baddbmm"}:
        return None
    probabilities, v = _operands(node)
    dropped_sink, x = False, probabilities
    while isinstance(x, Node) and op_name(x) not in SOFTMAXES:
        if op_name(x) in ("getitem", "slice") and not dropped_sink and _all_but_last(x):
            dropped_sink = True
        elif op_name(x) not in CASTS | DROPOUTS | _VIEWS or not _keeps_scores(x):
            return None
        x = source_of(x)
    if not isinstance(x, Node) or argument(x, 1, "dim") not in (-1, len(shape_of(x) or ()) - 1):
        return None
    return _scores(node, v, source_of(x), dropped_sink)


def _scores(node: Node, v: Node, x: Any, dropped_sink: bool) -> Attention | None:
    """Back from the softmax's argument to q k^T: sinks, then masks, then the soft cap, then the scale."""
    masks: list[tuple[Node, float | None]] = []
    sinks: Any = None
    cap, scale = 0.0, 1.0
    while isinstance(x, Node):
        name = op_name(x)
        inner = cap or scale != 1.0  # nothing but a scale may stand in here
        if name == "baddbmm" or (name in MATMULS and name != "einsum"):
            bias, q, k = _product(x)
            if bias is not None:
                beta, alpha = argument(x, 3, "beta", 1), argument(x, 4, "alpha", 1)
                if beta != 1 or inner:
                    return None
                masks.append((bias, None))
                scale *= float(alpha)
            done = isinstance(k, Node) and _is_flipped(k) and (sinks is not None) == dropped_sink
            return Attention(node, q, source_of(k), v, scale, cap, tuple(masks), sinks=sinks) if done else None
        if (name in CASTS | _VIEWS and _keeps_scores(x)) or (
            name in ("sub", "isub") and _is_top_of(argument(x, 1, "other"), source_of(x))
        ):
            x = source_of(x)
        elif name in CATS and sinks is None and not masks and not inner and len(x.args[0]) == 2:  # type: ignore[arg-type]
            x, sinks = x.all_input_nodes
        elif name in ADDS and not inner and len(x.all_input_nodes) == 2 and argument(x, 2, "alpha", 1) == 1:
            a, b = x.all_input_nodes
            scores, mask = (a, b) if _leads_to_product(a) else (b, a)
            masks.append((mask, None))
            x = scores
        elif name in ("masked_fill", "masked_fill_") and not inner and _masks_out(fill := argument(x, 2, "value")):
            masks.append((argument(x, 1, "mask"), float(fill)))
            x = source_of(x)
        elif name in _PRODUCTS and (factor := _constant(x)) is not None:
            capped = source_of(x)
            while isinstance(capped, Node) and op_name(capped) in CASTS:
                capped = source_of(capped)
            if isinstance(capped, Node) and op_name(capped) == "tanh" and not inner:
                below = source_of(capped)
                if op_name(below) not in _QUOTIENTS or _constant(below) != factor:
                    return None
                cap, x = factor, source_of(below)
            else:
                scale, x = scale * factor, capped
        elif name in _QUOTIENTS and (factor := _constant(x)):
            scale, x = scale / factor, source_of(x)
        else:
            return None
    return None


def _operands(node: Node) -> tuple[Any, Any]:
    return argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))


def _product(node: Node) -> tuple[Any, Any, Any]:
    """(bias, q, k^T)"""
    if op_name(node) == "baddbmm":
        return source_of(node), argument(node, 1, "batch1"), argument(node, 2, "batch2")
    return None, *_operands(node)


def _masks_out(fill: Any) -> bool:
    """Whether a score of this value has no weight: the lowest half-precision number is -65504."""
    return isinstance(fill, int | float) and fill <= -1e4


def _constant(node: Node) -> float | None:
    other = argument(node, 1, "other")
    return float(other) if isinstance(other, int | float) else None


def _keeps_scores(node: Node) -> bool:
    """Whether a view leaves queries and tokens, the last two dimensions, as they are."""
    before, after = shape_of(source_of(node)), shape_of(node)
    return before is not None and after is not None and before[-2:] == after[-2:]


def _all_but_last(node: Node) -> bool:
    if op_name(node) == "slice":
        return argument(node, 1, "dim", 0) in (-1, len(shape_of(node) or ()) - 1) and argument(node, 3, "end") == -1
    index: Any = node.args[1]
    return (
        isinstance(index, tuple)
        and index[-1] == slice(None, -1, None)
        and all(i is Ellipsis or i == slice(None) for i in index[:-1])
    )


def _is_top_of(value: Any, x: Any) -> bool:
    """Whether `value` is the largest of each row of x: subtracting it changes no softmax."""
    while isinstance(value, Node) and op_name(value) in ("getitem", "values", "detach"):
        value = source_of(value)
    return isinstance(value, Node) and op_name(value) in ("max", "amax") and source_of(value) is x


def _leads_to_product(node: Any) -> bool:
    """Whether scores are computed in `node`: a product of activations, seen through what scales, caps and masks it."""
    through = CASTS | _VIEWS | ADDS | _PRODUCTS | _QUOTIENTS | {"tanh", "masked_fill"}
    while isinstance(node, Node) and op_name(node) in through:
        node = source_of(node)
    return isinstance(node, Node) and op_name(node) in MATMULS


def _is_flipped(node: Node) -> bool:
    """Whether the node exchanges the last two dimensions of its source."""
    before, after = shape_of(source_of(node)), shape_of(node)
    return op_name(node) in FLIPS and before is not None and after == (*before[:-2], before[-1], before[-2])
