"""Why a Parameter stays in float: in words that tell a person with a new model what to change."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.fx import Node

from qpass.graph.calls import parameter_behind
from qpass.graph.vocabulary import CASTS, FLIPS, SHAPES, SPLITS, op_name

#: Kinds of linears and tables that stay in float, and why.
IN_FLOAT = {
    "adapter": "adapter: a low-rank path beside a linear stays in float",
    "router": "chooses among experts: small, and rounding it costs more than it saves",
    "scores": "added to attention's scores (a table of relative positions): rounding it costs more than it saves",
    "few": "makes a few gates or coefficients (far fewer rows than columns): rounding costs more than it saves",
}


_PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "einsum", "embedding"}
#: A depthwise convolution [channels, 1, taps] has at most this many taps.
_TAPS = 16
#: Operations looked at for the nearest miss.
_REACH = 12


def other_users(placeholder: Node, calls: set[Node]) -> list[str]:
    """Names of operations on a Parameter that do not lead to one of `calls`."""

    def leads(node: Node) -> bool:
        return node in calls or (op_name(node) in CASTS | FLIPS | SHAPES | SPLITS and any(map(leads, node.users)))

    return sorted({op_name(u) or u.op for u in placeholder.users if not leads(u) and u.users})


def _first_index(node: Node) -> object:
    index = node.args[1] if len(node.args) > 1 else None
    return index[0] if isinstance(index, list | tuple) and index else index


def why_unused(placeholder: Node, parameters: Mapping[Node, Tensor]) -> tuple[str, bool]:
    """Why a Parameter of two or more dimensions is no site, and whether that is as it should be."""
    users = sorted({op_name(user) or str(user.target) for user in placeholder.users})
    shape = parameters[placeholder].shape
    if any("conv" in user for user in users) or (len(shape) == 3 and shape[1] == 1 and shape[0] > _TAPS >= shape[2]):
        return "convolution: no site of a transformer", True
    if any("autocast" in user for user in users):
        return "inside torch.autocast, which torch.export keeps apart: export the model without it", False
    if parameter_behind(placeholder, parameters) and any(user in _PRODUCTS for user in users):
        return (
            f"used by {', '.join(users)} as something other than a weight of its last dimension: stays in float",
            False,
        )
    path = _way_to_a_product(placeholder)
    if path is not None:
        *through, product = path
        return (
            f"the weight of {product} is computed from it by {', '.join(dict.fromkeys(through))}; only casts and "
            "transpositions are seen through (a parametrization? remove it: torch.nn.utils.parametrize.remove_parametrizations)"
        ), False
    if users == ["getitem"] and all(isinstance(_first_index(user), slice | int) for user in placeholder.users):
        return "a table read by slices or constants, not by indices: stays in float", True
    if len(shape) > 2:
        return f"a {len(shape)}-D weight used by {', '.join(users)}: stays in float", True
    return f"used by {', '.join(users)}, which computes no linear and no embedding: stays in float", True


def _way_to_a_product(placeholder: Node) -> list[str] | None:
    """Names of the operations from a Parameter to the product or embedding whose weight they compute: the nearest miss."""
    queue: list[tuple[Node, list[str]]] = [(placeholder, [])]
    seen: set[Node] = set()
    while queue and len(seen) < _REACH:
        node, path = queue.pop(0)
        for user in node.users:
            name = op_name(user)
            if name in _PRODUCTS and path and len(user.args) > 1 and node in user.args[1:]:
                return [*path, name]
            if user not in seen and name:
                seen.add(user)
                queue.append((user, [*path, name]))
    return None
