"""One name for each operation, whether the graph spells it as a torch function, a method or an ATen operator."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

#: Same values in another arrangement or float type.
CASTS = {"to", "_to_copy", "type_as", "float", "half", "bfloat16", "type", "contiguous", "clone", "detach", "alias"}
FLIPS = {"t", "T", "mT", "numpy_T", "transpose", "permute", "swapaxes", "swapdims", "adjoint"}
SHAPES = {
    "view", "reshape", "_unsafe_view", "expand", "unsqueeze", "squeeze", "flatten", "unflatten", "getitem", "slice",
    "select", "view_as", "expand_as", "movedim", "repeat_interleave",
}  # fmt: skip
MATMULS = {"matmul", "mm", "bmm", "baddbmm", "einsum"}
ADDS = {"add", "iadd", "add_"}
CATS = {"cat", "concat", "concatenate"}
SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}
DROPOUTS = {"dropout", "native_dropout", "alpha_dropout", "feature_dropout"}
SPLITS = {"split", "chunk", "split_with_sizes"}
#: Rows picked by a tensor of indices.
GATHERS = {"getitem", "index", "index_select"}
#: Decisions about which expert computes.
SELECTIONS = {"topk", "sort", "argsort", "argmax", "gather"}
#: What lets one token see others, beside attention and products of activations: state-space and linear-attention layers.
TOKEN_MIXERS = {
    "conv1d",
    "conv2d",
    "convolution",
    "_conv_depthwise2d",
    "cumsum",
    "cumprod",
    "cummax",
    "logcumsumexp",
    "scan",
    "associative_scan",
    "setitem",
    "roll",
    "fft_rfft",
    "while_loop",
}
EMBEDDINGS = {"embedding"}
SDPA = {"scaled_dot_product_attention"}
FLEX = {"flex_attention"}

_TORCH_MODULES = ("torch", "_operator", "operator", "builtins", "math")


def op_name(node: Node) -> str:
    """The bare name of what `node` calls: "linear", "add", "qpass::dequantize"; "" for anything not torch's."""
    target: Any = node.target
    if node.op == "call_method":
        return str(target)
    if node.op != "call_function":
        return ""
    if isinstance(target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        qualified = target._schema.name if isinstance(target, torch._ops.OpOverload) else target._qualified_op_name
        namespace, _, name = qualified.partition("::")
        return f"qpass::{name}" if namespace == "qpass" else name
    if isinstance(target, torch._ops.HigherOrderOperator):
        return target.name()
    name = getattr(target, "__name__", "")
    if name == "getattr":  # x.T, x.mT
        return str(node.args[1])
    module = getattr(target, "__module__", None) or "torch"
    return name if module.split(".")[0] in _TORCH_MODULES else ""


def writes_to(node: Node) -> Node | None:
    """The node whose memory `node` changes: the self of an in-place operation, the target of an item assignment."""
    if node.op not in ("call_method", "call_function") or not node.args or not isinstance(node.args[0], Node):
        return None
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        first = target._schema.arguments[0]
        return node.args[0] if first.alias_info is not None and first.alias_info.is_write else None
    name = op_name(node)
    in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__") and not name.startswith("_"))
    in_place = in_place or name in ("iadd", "isub", "imul", "itruediv")
    return node.args[0] if in_place else None


def _overload(node: Node) -> torch._ops.OpOverload | None:
    """The operator that `node` calls, if it calls one."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    return target if isinstance(target, torch._ops.OpOverload) else None


def written_by(node: Node) -> list[Node]:
    """All nodes whose memory `node` changes: an operator may write to several arguments, and to lists of them."""
    overload = _overload(node)
    if overload is None:
        return [n for n in (writes_to(node),) if n is not None]
    found: list[Any] = []
    for position, declared in enumerate(overload._schema.arguments):
        if declared.alias_info is not None and declared.alias_info.is_write:
            given = argument(node, position, declared.name)
            found += given if isinstance(given, list | tuple) else [given]
    return [n for n in found if isinstance(n, Node)]


#: Functions of torch that may be asked to write to what they are given, by a second True.
_MAY_WRITE = {
    "relu", "relu6", "silu", "elu", "selu", "celu", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "mish", "rrelu",
    "threshold", "dropout", "alpha_dropout", "feature_alpha_dropout",
}  # fmt: skip


def writes(node: Node) -> bool:
    """Whether `node` may change memory that something else looks at; True in doubt."""
    overload = _overload(node)
    if overload is not None and overload._schema.is_mutable:
        return True
    asked = bool(node.kwargs.get("inplace")) or (op_name(node) in _MAY_WRITE and True in node.args[1:])
    return writes_to(node) is not None or asked or node.kwargs.get("out") is not None


def operands(node: Any, *names: str) -> tuple[Any, Any] | None:
    """Both operands of a sum or product named so, if it is of two things and nothing else (no alpha, no out)."""
    if not isinstance(node, Node) or op_name(node) not in names or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def argument(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of a call, given by position or by name."""
    if len(node.args) > position:
        return node.args[position]
    return node.kwargs.get(name, default)


def source_of(node: Node) -> Any:
    """What a view, a cast or a function of one tensor is given, by position or by name."""
    return argument(node, 0, "input", node.kwargs.get("self"))


def value_of(node: Node) -> Any:
    """The fake value that the tracer recorded: Dynamo's `example_value` or export's `val`."""
    value = node.meta.get("example_value")
    return node.meta.get("val") if value is None else value


def set_value(node: Node, value: Any) -> None:
    """Record `value` where `value_of` finds it."""
    node.meta["val" if "val" in node.meta else "example_value"] = value


def shape_of(node: Node) -> tuple[Any, ...] | None:
    """Shape of a tensor node, possibly symbolic; None for anything else."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None
