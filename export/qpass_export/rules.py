"""What a runtime asks of a file, as rules that are checked without it; and the patterns that onnxruntime left unfused."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qpass_export.targets import CPU_BLOCKS, CUDA_BLOCKS, get_target

_FOUR_BITS = {ir.DataType.INT4, ir.DataType.UINT4, ir.DataType.FLOAT4E2M1}
_FLOAT8 = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT8E5M2}
#: A rule: an iterator over what is wrong with one node.
Rule = Callable[[ir.Node], Iterator[str]]


def violations(path: str | Path, target: str) -> list[str]:
    """What in the file the target does not take: one line each, with the node. Empty if it follows all rules."""
    model = ir.load(path)
    return [f"{node.name}: {wrong}" for node in model.graph for rule in _RULES[target] for wrong in rule(node)]


def _dtype(value: ir.Value | None) -> ir.DataType | None:
    if value is None:
        return None
    return value.const_value.dtype if value.const_value is not None else value.dtype


def _data(node: ir.Node) -> ir.Value | None:
    """The constant that a DequantizeLinear reads."""
    if node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[0].const_value is None:
        return None
    return node.inputs[0]


def _is_weight(node: ir.Node) -> bool:
    """Whether a DequantizeLinear gives what a MatMul multiplies by."""
    return _data(node) is not None and any(user.op_type == "MatMul" for user in node.outputs[0].consumers())


def _attribute(node: ir.Node, name: str, default: int) -> int:
    return node.attributes[name].as_int() if name in node.attributes else default


def _legal_types(node: ir.Node) -> Iterator[str]:
    """ONNX's own limits that the checker does not see."""
    first = _dtype(node.inputs[0]) if node.inputs else None
    if node.op_type == "Gather" and first in _FOUR_BITS | _FLOAT8:
        yield f"Gather of {first} is no operator; gather bytes"
    if node.op_type == "Concat" and any(_dtype(v) in _FOUR_BITS | _FLOAT8 for v in node.inputs):
        yield "Concat of types below 8 bits or of fp8 is no operator"


def _one_reader(node: ir.Node) -> Iterator[str]:
    """onnxruntime joins a DequantizeLinear and a MatMul where each has the other alone."""
    data = _data(node)
    if data is None or not _is_weight(node):
        return
    if len(node.outputs[0].consumers()) > 1:
        yield "one DequantizeLinear feeds several MatMuls, which leaves it unfused: one for each"
    if len(data.consumers()) > 1:
        yield f"{data.name} is read by several DequantizeLinear, which leaves them unfused: a copy for each"


def _blocks(least: int, most: int) -> Rule:
    def rule(node: ir.Node) -> Iterator[str]:
        size = _attribute(node, "block_size", 0)
        if size and _is_weight(node) and _dtype(node.inputs[0]) not in _FLOAT8:
            if not least <= size <= most or size & (size - 1):
                yield f"blocks of {size} are not fused: powers of two from {least} to {most}"
            if _attribute(node, "axis", 1) != 0:
                yield "weights are [K, N] with blocks along axis 0; [N, K] and a Transpose are not fused"

    return rule


def _no_int8_zero_before_transpose(node: ir.Node) -> Iterator[str]:
    """onnxruntime #25526: such a graph fails to load."""
    if node.op_type != "DequantizeLinear" or len(node.inputs) < 3 or _dtype(node.inputs[2]) != ir.DataType.INT8:
        return
    if any(
        u.op_type == "Transpose" and any(v.op_type == "MatMul" for v in u.outputs[0].consumers())
        for u in node.outputs[0].consumers()
    ):
        yield "DequantizeLinear with an int8 zero point, Transpose, MatMul fails to load (onnxruntime #25526)"


def _no_quantized_inputs(node: ir.Node) -> Iterator[str]:
    if node.op_type == "QuantizeLinear":
        yield "the CUDA provider has no kernels for quantized activations"


def _only_onnx(node: ir.Node) -> Iterator[str]:
    if node.domain not in ("", "ai.onnx"):
        yield f"{node.domain}.{node.op_type} is onnxruntime's own operator"


def _zero_points(node: ir.Node) -> Iterator[str]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3 or node.inputs[2] is None:
        return
    constant = node.inputs[2].const_value
    if constant is None or np.any(constant.numpy().astype(np.float32)):
        yield "zero points are constant and 0"


def _scales(node: ir.Node) -> Iterator[str]:
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or node.inputs[1] is None:
        return
    constant, producer = node.inputs[1].const_value, node.inputs[1].producer()
    nested = producer is not None and producer.op_type in ("DequantizeLinear", "Cast", "Reshape")
    if constant is None and not nested:
        yield "scales are constant: they come from calibration"
    if constant is not None and not np.all(constant.numpy().astype(np.float32) > 0):
        yield "scales are positive"


def _last_axes(node: ir.Node) -> Iterator[str]:
    if node.op_type == "DequantizeLinear" and _attribute(node, "block_size", 0):
        rank, axis = len(node.inputs[0].shape or ()), _attribute(node, "axis", 1)  # type: ignore[union-attr]
        if axis % rank not in (rank - 1, rank - 2):
            yield "blocks lie along the last axis or the one before"


def _four_bit_weights(node: ir.Node) -> Iterator[str]:
    made = ir.DataType(_attribute(node, "output_dtype", 0))
    if node.op_type == "QuantizeLinear" and (made in _FOUR_BITS or any(_dtype(v) in _FOUR_BITS for v in node.outputs)):
        yield "four bits are for weights only"
    data = _data(node)
    if data is not None and _dtype(data) == ir.DataType.INT4 and data.shape is not None:
        rows = int(data.shape[0])  # type: ignore[arg-type]
        if _attribute(node, "block_size", rows) != 128:
            yield "four-bit weights have blocks of 128"


_RULES: dict[str, tuple[Rule, ...]] = {
    "ort-cpu": (_legal_types, _one_reader, _blocks(*CPU_BLOCKS), _no_int8_zero_before_transpose),
    "ort-cuda": (_legal_types, _one_reader, _blocks(*CUDA_BLOCKS), _no_quantized_inputs),
    "tensorrt": (_legal_types, _only_onnx, _zero_points, _scales, _last_axes, _four_bit_weights),
}


def unfused(path: str | Path) -> list[str]:
    """Integer weights that onnxruntime dequantizes apart from the MatMul that multiplies them, after its own optimizations."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.optimized_model_filepath = str(Path(folder) / "optimized.onnx")
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
        options.log_severity_level = 3
        ort.InferenceSession(str(path), options, providers=[get_target("ort-cpu").provider])
        graph = ir.load(options.optimized_model_filepath).graph
        left = []
        for node in graph:
            if node.op_type == "DequantizeLinear" and _dtype(node.inputs[0]) not in _FLOAT8 and _is_weight(node):
                left.append(f"{node.name}: {node.inputs[0].name} is dequantized by itself")  # type: ignore[union-attr]
        return left
