"""Calls that matter to a transformer, read from their several spellings: linear, embedding, attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from qpass.graph.vocabulary import (
    CASTS,
    EMBEDDINGS,
    FLEX,
    FLIPS,
    GATHERS,
    MATMULS,
    SDPA,
    SOFTMAXES,
    SPLITS,
    argument,
    op_name,
    shape_of,
    source_of,
    value_of,
)


@dataclass(frozen=True)
class Route:
    """How rows of x find their expert in a 3-D Parameter.

    `how`: "offsets": rows up to `value`[e] go to expert e; "ids": row i of x [rows, 1, in] goes to expert `value`[i];
    "each": x is [experts, rows, in]; "one": all go to the constant expert `value`. `experts`: how many there are.
    """

    how: str
    value: Node | int | None
    experts: int


@dataclass(frozen=True)
class LinearCall:
    """y = x W^T + b. `weight` is the Parameter's placeholder; `transposed` if it is [in, out] in its last two dimensions.

    `columns`: y = W x, tokens are columns: x is [.., in, tokens]. `rows`: the part of a packed weight that is applied (first,
    last + 1). `route`: for a Parameter of experts.
    """

    node: Node
    x: Node
    weight: Node
    bias: Node | None
    transposed: bool
    columns: bool = False
    rows: tuple[int, int] | None = None
    route: Route | None = None

    def sizes(self, parameters: Mapping[Node, Tensor]) -> tuple[int, int]:
        """(out, in) of the weight, or of one expert's."""
        shape = parameters[self.weight].shape
        first, second = shape[-2:] if self.rows is None else (self.rows[1] - self.rows[0], shape[-1])
        if self.route is not None and len(shape) == 2:  # [experts * out, in]
            first //= self.route.experts
        return (second, first) if self.transposed else (first, second)


@dataclass(frozen=True)
class EmbeddingCall:
    """Rows of the Parameter at `weight`, picked by `indices`. `wraps`: negative indices count from the end."""

    node: Node
    indices: Node
    weight: Node
    wraps: bool = False


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
        shape, name = shape_of(value), op_name(value)
        if value in parameters:
            return (value, flipped) if shape is not None and len(shape) == dims else None
        if dims == 3 and name in ("view", "reshape", "unflatten") and shape is not None and len(shape) == 3:
            rows = value.args[0]  # [experts * out, in] seen as [experts, out, in]
            same = rows in parameters and shape_of(rows) == (shape[0] * shape[1], shape[2])  # type: ignore[arg-type]
            return (rows, flipped) if same else None  # type: ignore[return-value]
        if name in FLIPS:
            exchanged = _exchanges(value, name, dims)
            if exchanged is None:
                return None
            flipped ^= exchanged
        elif name not in CASTS:
            return None
        value = source_of(value)
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
    weight, rows = _rows_of(weight, parameters) if name == "linear" else (weight, None)
    found, columns = parameter_behind(weight, parameters), False
    if found is None and name in ("matmul", "mm"):  # W @ x
        x, weight, natural, columns = weight, x, True, True
        found = parameter_behind(weight, parameters)
    if found is None or not isinstance(x, Node) or parameter_behind(x, parameters):
        return None
    placeholder, flipped = found
    columns = columns and len(shape_of(x) or ()) > 1
    return LinearCall(node, x, placeholder, bias if isinstance(bias, Node) else None, natural == flipped, columns, rows)


def _rows_of(weight: Any, parameters: Collection[Node]) -> tuple[Any, tuple[int, int] | None]:
    """(W, (a, b)) for W[a:b], W.split(..)[i] or W.chunk(n)[i]; (weight, None) for anything else."""
    if not isinstance(weight, Node) or weight.op == "placeholder" or not weight.args:
        return weight, None
    name, source = op_name(weight), weight.args[0]
    pieces = op_name(source) in SPLITS if isinstance(source, Node) else False
    if name == "getitem" and pieces:
        dim = argument(source, 2, "dim", 0)  # type: ignore[arg-type]
        shapes = [tuple(piece.shape) for piece in value_of(source)]  # type: ignore[arg-type]
        start, size = sum(s[0] for s in shapes[: weight.args[1]]), shapes[weight.args[1]][0]  # type: ignore[index]
        source = source.args[0] if dim == 0 else None  # type: ignore[union-attr]
    elif name == "getitem" and isinstance(weight.args[1], slice) and isinstance(source, Node) and shape_of(source):
        start, stop, step = weight.args[1].indices(shape_of(source)[0])  # type: ignore[index]
        size, source = stop - start, source if step == 1 else None
    elif name == "slice" and argument(weight, 1, "dim", 0) == 0 and argument(weight, 4, "step", 1) == 1:
        start = slice(argument(weight, 2, "start"), None).indices((shape_of(source) or (0,))[0])[0]  # type: ignore[arg-type]
        size = (shape_of(weight) or (0,))[0]
    else:
        return weight, None
    inside = isinstance(source, Node) and source in parameters and len(shape_of(source) or ()) == 2
    return (source, (start, start + size)) if inside else (weight, None)


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


def read_gather(node: Node, parameters: Collection[Node]) -> EmbeddingCall | None:
    """table[indices] or index_select(table, 0, indices), for a tensor of indices of any shape."""
    if op_name(node) not in GATHERS or len(node.args) < 2 or node.args[0] not in parameters:
        return None
    table, index = node.args[0], node.args[-1]
    if op_name(node) == "index_select" and node.args[1] != 0:
        return None
    if isinstance(index, list | tuple):
        index = index[0] if len(index) == 1 else None
    if not isinstance(index, Node) or not isinstance(table, Node) or len(shape_of(table) or ()) != 2:
        return None
    return EmbeddingCall(node, index, table, wraps=True) if is_index(index) else None


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
        softmax = _nearest(probabilities, _is_softmax, stops)
        if softmax is None:
            continue
        scores = _nearest(source_of(softmax), lambda n: op_name(n) in MATMULS, stops)
        if scores is None:
            # Scores that come straight from an input: the first product is in the graph before a graph break.
            leaf = _nearest(source_of(softmax), lambda n: n.op == "placeholder", stops)
            shape = shape_of(softmax)
            return AttentionCall(node, None, None, v) if leaf is not None and shape and len(shape) >= 3 else None
        pair = _matmul_operands(scores)
        if pair is not None:
            return AttentionCall(node, pair[0], pair[1], v)
    return None


def _is_softmax(node: Node) -> bool:
    """Also written out: e / e.sum(), where e is an exponential."""
    if op_name(node) not in ("div", "truediv"):
        return op_name(node) in SOFTMAXES
    e, total = source_of(node), argument(node, 1, "other")
    summed = isinstance(total, Node) and op_name(total) == "sum" and source_of(total) is e
    return summed and isinstance(e, Node) and op_name(e) == "exp"


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


def is_index(node: Node) -> bool:
    """Whether the node's recorded value is a tensor of integers."""
    value = value_of(node)
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    return isinstance(value, torch.Tensor) and value.dtype in integers


def is_float_tensor(node: Node) -> bool:
    """Whether the node's recorded value is a floating-point tensor."""
    value = value_of(node)
    return isinstance(value, torch.Tensor) and value.is_floating_point()
