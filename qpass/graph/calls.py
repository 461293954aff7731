"""Calls that matter to a transformer, read from their several spellings: linear, embedding, attention."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from qpass.graph.vocabulary import (
    CASTS,
    EMBEDDINGS,
    FLEX,
    FLIPS,
    MATMULS,
    SDPA,
    SOFTMAXES,
    argument,
    op_name,
    shape_of,
    value_of,
)


@dataclass(frozen=True)
class Route:
    """How rows of x find their expert in a 3-D Parameter.

    `how`: "offsets": rows up to `value`[e] go to expert e; "ids": row i goes to expert `value`[i], x has a dimension of
    one more at `dim`; "each": x is [experts, rows, in]; "one": all go to the constant expert `value`.
    """

    how: str
    value: Node | int | None
    dim: int = 0


@dataclass(frozen=True)
class LinearCall:
    """y = x W^T + b. `weight` is the Parameter's placeholder; `transposed` if it is [in, out] in its last two dimensions.

    `route`: for a Parameter of experts.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    route: Route | None = None


@dataclass(frozen=True)
class EmbeddingCall:
    """Rows of the Parameter at `weight`, picked by `indices`."""

    node: Node
    indices: Node
    weight: Node


@dataclass(frozen=True)
class AttentionCall:
    """softmax(q k^T) v. Operands that lie in another graph (after a graph break) are None."""

    node: Node
    q: Node | None
    k: Node | None
    v: Node


def parameter_behind(value: Any, parameters: Collection[Node], dims: int = 2) -> tuple[Node, bool] | None:
    """(placeholder, flipped) if `value` is a Parameter of `dims` dimensions seen through casts and transpositions only.

    Flipped: the last two dimensions are exchanged.
    """
    flipped = False
    while isinstance(value, Node):
        if value in parameters:
            shape = shape_of(value)
            return (value, flipped) if shape is not None and len(shape) == dims else None
        name = op_name(value)
        if name in FLIPS:
            exchanged = _exchanges(value, name, dims)
            if exchanged is None:
                return None
            flipped ^= exchanged
        elif name not in CASTS:
            return None
        value = value.args[0] if value.args else None
    return None


def _exchanges(node: Node, name: str, rank: int) -> bool | None:
    """Whether a transposition exchanges the last two dimensions: permute(0, 1) does not. None: it does something else."""
    dims = [d for a in node.args[1:] for d in (a if isinstance(a, list | tuple) else [a])]
    dims = dims or [d for a in node.kwargs.values() for d in (a if isinstance(a, list | tuple) else [a])]
    numbers = [d % rank for d in dims if isinstance(d, int)]
    last, kept = [rank - 2, rank - 1], list(range(rank - 2))
    if name == "permute":
        return {tuple(kept + last): False, tuple(kept + last[::-1]): True}.get(tuple(numbers))
    if name in ("transpose", "swapaxes", "swapdims"):
        return False if numbers[0] == numbers[1] else (True if sorted(numbers) == last else None)
    return True if rank == 2 or name in ("mT", "adjoint") else None


def read_linear(node: Node, parameters: Collection[Node]) -> LinearCall | None:
    """The linear that `node` computes, in any spelling; None if it is none, or its weight is not a plain Parameter."""
    name = op_name(node)
    bias: Any = None
    if name == "linear":
        x, weight = argument(node, 0, "input"), argument(node, 1, "weight")
        bias, natural = argument(node, 2, "bias"), True
    elif name == "addmm" and argument(node, 3, "beta", 1) == 1 and argument(node, 4, "alpha", 1) == 1:
        bias, x, weight = argument(node, 0, "input"), argument(node, 1, "mat1"), argument(node, 2, "mat2")
        natural = False
    elif name in ("matmul", "mm"):
        x, weight = argument(node, 0, "input"), argument(node, 1, "other", node.kwargs.get("mat2"))
        natural = False
    elif name == "einsum":
        operands = _einsum_linear(node)
        if operands is None:
            return None
        x, weight, natural = operands
    else:
        return None
    found = parameter_behind(weight, parameters)
    if found is None or not isinstance(x, Node) or parameter_behind(x, parameters):
        return None
    placeholder, flipped = found
    return LinearCall(node, x, placeholder, bias if isinstance(bias, Node) else None, natural == flipped)


def _einsum_linear(node: Node) -> tuple[Any, Any, bool] | None:
    """einsum("..i,oi->..o") or ("..i,io->..o") as (x, weight, weight is [out, in])."""
    equation, *operands = node.args
    if not isinstance(equation, str) or "->" not in equation:
        return None
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = list(operands[0])
    left, out = equation.replace(" ", "").split("->")
    terms = left.split(",")
    if len(operands) != 2 or len(terms) != 2 or len(terms[1]) != 2:
        return None
    xs, ws = terms
    for i, o, natural in ((ws[1], ws[0], True), (ws[0], ws[1], False)):
        if xs.endswith(i) and o not in xs and out == xs[:-1] + o and i not in out:
            return operands[0], operands[1], natural
    return None


def read_embedding(node: Node, parameters: Collection[Node]) -> EmbeddingCall | None:
    """An embedding in torch.nn.functional's argument order (indices, weight) or ATen's (weight, indices)."""
    if op_name(node) not in EMBEDDINGS:
        return None
    first, second = argument(node, 0, "input"), argument(node, 1, "weight")
    if isinstance(node.target, torch._ops.OpOverload) or node.target is torch.embedding:
        first, second = argument(node, 1, "indices"), argument(node, 0, "weight")
    elif argument(node, 3, "max_norm") is not None:  # renormalizes the table in place
        return None
    found = parameter_behind(second, parameters)
    if found is None or found[1] or not isinstance(first, Node):
        return None
    return EmbeddingCall(node, first, found[0])


def read_attention(node: Node, stops: Callable[[Node], bool]) -> AttentionCall | None:
    """A fused attention call, or the second product of an explicit softmax(q k^T) v. Walks back no further than `stops`."""
    name = op_name(node)
    if name in SDPA or name in FLEX:
        q, k, v = (argument(node, i, n) for i, n in enumerate(("query", "key", "value")))
        return AttentionCall(node, q, k, v)
    if name not in MATMULS:
        return None
    operands = _matmul_operands(node)
    if operands is None:
        return None
    for probabilities, v in (operands, operands[::-1]):
        softmax = _nearest(probabilities, lambda n: op_name(n) in SOFTMAXES, stops)
        if softmax is None:
            continue
        scores = _nearest(softmax.args[0], lambda n: op_name(n) in MATMULS, stops)
        if scores is None:
            # Scores that come straight from an input: the first product is in the graph before a graph break.
            leaf = _nearest(softmax.args[0], lambda n: n.op == "placeholder", stops)
            shape = shape_of(softmax)
            return AttentionCall(node, None, None, v) if leaf is not None and shape and len(shape) >= 3 else None
        pair = _matmul_operands(scores)
        if pair is not None:
            return AttentionCall(node, pair[0], pair[1], v)
    return None


def _matmul_operands(node: Node) -> tuple[Node, Node] | None:
    """The two factors of a product of activations."""
    factors: list[Node] = []
    torch.fx.node.map_arg((node.args, node.kwargs), factors.append)
    factors = factors[1:] if op_name(node) == "baddbmm" else factors
    return (factors[0], factors[1]) if len(factors) == 2 else None


def _nearest(start: Any, wanted: Callable[[Node], bool], stops: Callable[[Node], bool]) -> Node | None:
    """Breadth-first back from `start` to the first wanted node, not past `stops`."""
    queue, seen = [start], set()
    while queue:
        node = queue.pop(0)
        if not isinstance(node, Node) or node in seen:
            continue
        seen.add(node)
        if wanted(node):
            return node
        if not stops(node):
            queue.extend(node.all_input_nodes)
    return None


def is_float_tensor(node: Node) -> bool:
    """Whether the node's recorded value is a floating-point tensor."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
