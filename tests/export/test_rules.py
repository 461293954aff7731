"""The rules of each target fire on graphs that break them, and on nothing that is exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from qpass_export import export_onnx
from qpass_export.rules import unfused, violations

import qpass
from tests.export.micro import one_linear

Nodes = list[onnx.NodeProto]


def _save(nodes: Nodes, tensors: dict[str, np.ndarray], path: Path, outputs: int = 1) -> Path:
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["m", 64])
    out = [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, None) for i in range(outputs)]
    constants = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", [given], out, constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def _int4(k: int = 64, n: int = 8) -> np.ndarray:
    return np.ones((k, n), ml_dtypes.int4)


def _scales(*shape: int, value: float = 0.5) -> np.ndarray:
    return np.full(shape, value, np.float32)


def _dq(data: str, out: str, zero: str = "", scale: str = "s", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node("DequantizeLinear", [data, scale, *([zero] if zero else [])], [out], **attributes)


def _mm(weight: str, out: str = "y0") -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", weight], [out])


W8 = np.ones((64, 8), np.int8)

BROKEN: dict[str, tuple[str, Nodes, dict[str, np.ndarray], str]] = {
    "blocks of 8": (
        "ort-cpu", [_dq("w", "f", axis=0, block_size=8), _mm("f")],
        {"w": _int4(), "s": _scales(8, 8)}, "blocks of 8",
    ),
    "blocks of 48": (
        "ort-cpu", [_dq("w", "f", axis=0, block_size=48), _mm("f")],
        {"w": _int4(96), "s": _scales(2, 8)}, "blocks of 48",
    ),
    "two readers": (
        "ort-cpu", [_dq("w", "f", axis=0, block_size=32), _mm("f"), _mm("f", "y1")],
        {"w": _int4(), "s": _scales(2, 8)}, "several MatMuls",
    ),
    "one constant for two": (
        "ort-cpu", [_dq("w", "f", axis=0, block_size=32), _dq("w", "g", axis=0, block_size=32), _mm("f"), _mm("g", "y1")],
        {"w": _int4(), "s": _scales(2, 8)}, "several DequantizeLinear",
    ),
    "gather of int4": (
        "ort-cpu", [helper.make_node("Gather", ["w", "i"], ["g"]), _dq("g", "y0", axis=1, block_size=8)],
        {"w": _int4(), "s": _scales(1, 1), "i": np.array([0])}, "Gather of",
    ),
    "concat of fp8": (
        "ort-cpu", [helper.make_node("Concat", ["a", "a"], ["c"], axis=0), _dq("c", "y0")],
        {"a": np.ones((2, 2), ml_dtypes.float8_e4m3fn), "s": _scales()}, "Concat",
    ),
    "int8 zero point before a transposed product": (
        "ort-cpu", [_dq("w", "f", "z"), helper.make_node("Transpose", ["f"], ["t"]), _mm("t")],
        {"w": W8.T, "s": _scales(), "z": np.array(1, np.int8)}, "#25526",
    ),
    "quantized inputs": (
        "ort-cuda", [helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.INT8), _dq("q", "y0")],
        {"s": _scales()}, "no kernels",
    ),
    "an operator of onnxruntime": (
        "tensorrt", [helper.make_node("QuickGelu", ["x"], ["y0"], domain="com.microsoft")],
        {}, "own operator",
    ),
    "a zero point": (
        "tensorrt", [_dq("w", "f", "z"), _mm("f")],
        {"w": W8, "s": _scales(), "z": np.array(3, np.int8)}, "zero points",
    ),
    "a negative scale": (
        "tensorrt", [_dq("w", "f"), _mm("f")],
        {"w": W8, "s": _scales(value=-1)}, "positive",
    ),
    "a scale that is computed": (
        "tensorrt", [helper.make_node("ReduceMax", ["x"], ["m"], keepdims=0), _dq("w", "f", scale="m"), _mm("f")],
        {"w": W8}, "constant",
    ),
    "blocks along the first of three axes": (
        "tensorrt", [_dq("w", "y0", axis=0, block_size=2)],
        {"w": np.ones((2, 2, 2), np.int8), "s": _scales(1, 2, 2)}, "last axis",
    ),
    "int4 in blocks of 32": (
        "tensorrt", [_dq("w", "f", axis=0, block_size=32), _mm("f")],
        {"w": _int4(), "s": _scales(2, 8)}, "blocks of 128",
    ),
    "int4 inputs": (
        "tensorrt", [helper.make_node("QuantizeLinear", ["x", "s"], ["q"], output_dtype=TensorProto.INT4), _dq("q", "y0")],
        {"s": _scales()}, "weights only",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_rule_is_named_with_its_node(case: str, tmp_path: Path) -> None:
    target, nodes, tensors, told = BROKEN[case]
    path = _save(nodes, tensors, tmp_path / "m.onnx", sum("y1" in n.output for n in nodes) + 1)
    assert any(told in line for line in violations(path, target))


SOUND = {
    "ort-cpu": ["int8", "int4:g32:asym", "nf4:g32", "fp8_e4m3", "int8@int8", "int8:tensor", "int5:g32"],
    "ort-cuda": ["int8", "int4:g32:asym", "nf4:g32", "fp8_e4m3", "nvfp4", "int6:g64"],
    "tensorrt": ["int8", "int4:g128", "fp8_e4m3", "fp8_e4m3:channel", "nvfp4", "int8:tensor", "fp16"],
}


@pytest.mark.parametrize(("target", "spec"), [(t, s) for t, specs in SOUND.items() for s in specs])
def test_an_export_breaks_no_rule(target: str, spec: str, tmp_path: Path) -> None:
    exported = export_onnx(one_linear(128), tmp_path, target, qpass.Recipe(linear=spec), inputs=torch.randn(2, 3, 128))
    assert violations(exported.path, target) == []
    onnx.checker.check_model(str(exported.path), full_check=target == "tensorrt" and spec != "nvfp4")


@pytest.mark.parametrize("spec", ["fp8_e4m3", "nvfp4"])
def test_operators_without_a_cpu_kernel_pass_the_type_inference_of_onnxruntime(spec: str, tmp_path: Path) -> None:
    import onnxruntime as ort

    exported = export_onnx(
        one_linear(128), tmp_path, "ort-cuda", qpass.Recipe(linear=spec), inputs=torch.randn(2, 3, 128)
    )
    with pytest.raises(Exception, match="Could not find an implementation for MatMulBlockQuantized"):
        ort.InferenceSession(str(exported.path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("spec", ["int8", "int4:g32", "nf4:g32"])
def test_files_for_cuda_run_on_the_cpu_in_half_precision(spec: str, tmp_path: Path) -> None:
    from qpass_export import load

    x = torch.randn(2, 3, 128)
    model = one_linear(128)
    export_onnx(model, tmp_path, "ort-cuda", spec, inputs=x)
    (found,) = load(tmp_path, provider="CPUExecutionProvider", exact=True).run(None, {"x": x.half().numpy()})
    with qpass.set_compute("float"):
        expected = qpass.quantize(model, spec, inputs=x, inner="eager")(x)
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=2e-2)


@pytest.mark.parametrize("spec", ["int8", "int8:g32:asym", "int4:g32", "int4:channel:asym", "int3:g32"])
def test_products_are_fused(spec: str, tmp_path: Path) -> None:
    assert unfused(export_onnx(one_linear(), tmp_path, recipe=spec, inputs=torch.randn(2, 3, 96)).path) == []


def test_a_product_that_is_not_fused_is_found(tmp_path: Path) -> None:
    nodes = [_dq("w", "f", axis=0, block_size=8), _mm("f")]
    assert unfused(_save(nodes, {"w": _int4(), "s": _scales(8, 8)}, tmp_path / "m.onnx"))
