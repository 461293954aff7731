"""Linears: DequantizeLinear and MatMul, which runtimes join to one kernel, or the target's own operator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from qpass.spec import QuantSpec, parse_spec
from qpass.weights import row_range
from qpass_export.lowering.build import CONTRIB, Build
from qpass_export.lowering.codes import Rows, codes_of, dequantize, dynamic_qparams, float8_type
from qpass_export.lowering.weights import (
    StoredWeight,
    block_inputs,
    bnb_inputs,
    dequantize_inputs,
    float8_blocks,
    nvfp4_inputs,
    stored_weight,
)

#: MatMulBnb4's number of the NF4 table.
_NF4 = 1
#: MatMulNBits rounds its input to int8, as it does where onnxruntime makes it of DequantizeLinear and MatMul.
_INT8_INPUT = 4


def linear(b: Build, node: ir.Node, shared: bool) -> ir.Value:
    """qpass::linear. `shared`: an embedding reads the same table, which the operator is to read as that does."""
    x, bias = node.inputs[0], node.inputs[5] if len(node.inputs) > 5 else None
    assert x is not None
    w = stored_weight(node, _columns(x))
    return _with_bias(b, product(b, x, w, shared), bias)


def product(b: Build, x: ir.Value, w: StoredWeight, shared: bool = False) -> ir.Value:
    """x [.., K] -> [.., N]"""
    fmt = w.spec.format
    if fmt.kind == "identity":
        stored = b.constant(f"{w.name}.cast", ir.tensor(w.parts.data, name=f"{w.name}.cast"))
        return b("MatMul", x, b("Transpose", b("Cast", stored, to=int(b.dtype)), perm=[1, 0]))
    if fmt.name == "nf4":
        data, scales = bnb_inputs(b, w)
        width = w.blocks * w.block_size
        if width != w.columns:
            x = b("Pad", x, np.array([0] * (2 * _rank(x) - 1) + [width - w.columns]))
        return b(
            "MatMulBnb4", x, data, scales, domain=CONTRIB,
            K=width, N=w.rows, block_size=w.block_size, quant_type=_NF4,
        )  # fmt: skip
    if fmt.name == "nvfp4":
        return _nvfp4(b, x, w)
    if fmt.kind == "float8" and b.target.float8_blocks:
        data, scales = float8_blocks(b, w)
        return b("MatMulBlockQuantizedFp8Weight", x, data, scales, domain=CONTRIB, block_size=w.block_size)
    if shared or w.spec.float_zero:
        blocks = block_inputs(b, w)
        return b(
            "MatMulNBits", x, blocks.data, blocks.scales, blocks.zeros, domain=CONTRIB,
            K=w.columns, N=w.rows, block_size=blocks.size, bits=blocks.bits, accuracy_level=_INT8_INPUT,
        )  # fmt: skip
    inputs, axis, block = dequantize_inputs(b, w)
    return b("MatMul", x, b("DequantizeLinear", *inputs, axis=axis, block_size=block))


def _nvfp4(b: Build, x: ir.Value, w: StoredWeight) -> ir.Value:
    """Four-bit floats with E4M3 scales, and one float over these: onnxruntime's operator, or two DequantizeLinear."""
    codes = nvfp4_inputs(b, w, packed=b.target.contrib)
    if b.target.contrib:
        return b("MatMulBlockQuantizedFp4Weight", x, *codes, domain=CONTRIB, block_size=w.block_size)
    data, scales, outer = codes
    floats = b("DequantizeLinear", scales, b("Cast", outer, to=int(b.dtype)))
    rows = b("DequantizeLinear", data, floats, axis=-1, block_size=w.block_size)
    return b("MatMul", x, b("Transpose", rows, perm=[1, 0]))


def experts(b: Build, node: ir.Node) -> ir.Value:
    """qpass::experts: every expert multiplies all rows, and each row takes what its own one gives."""
    x, ids = node.inputs[:2]
    assert x is not None
    assert ids is not None
    count = node.attributes["experts"].as_int()
    w = stored_weight(node, _columns(x))
    named = b("Unsqueeze", b("Where", b("Less", ids, np.array(0)), b("Add", ids, np.array(count)), ids), np.array([-1]))
    total: ir.Value | None = None
    for e in range(count):
        mine = replace(w, name=f"{w.name}.{e}", parts=row_range(w.parts, e * w.rows // count, w.rows // count, w.rows))
        y = product(b, x, replace(mine, rows=w.rows // count))
        chosen = b("Where", b("Equal", named, np.array(e)), y, 0.0)
        total = chosen if total is None else b("Add", total, chosen)
    assert total is not None
    return total


def integer_linear(b: Build, node: ir.Node) -> ir.Value:
    """qpass::integer_linear: a product of codes. With one scale for all tokens it is QuantizeLinear .. DequantizeLinear around a
    MatMul, which runtimes join; with one for each token MatMulInteger, since no runtime joins that."""
    codes, scale, zero = node.inputs[:3]
    bias = node.inputs[7] if len(node.inputs) > 7 else None
    assert codes is not None
    assert scale is not None
    w = stored_weight(node, _columns(codes))
    static = scale.is_initializer() or scale.const_value is not None
    if static or zero is not None or w.zero_points() is not None:
        if static:
            floats = _dequantized(b, codes, scale, zero)
        else:
            activations = w.spec.activations
            assert activations is not None
            floats = dequantize(b, codes, scale, zero, Rows(activations, _rank(codes), w.columns), packed=False)
        return _with_bias(b, product(b, floats, w), bias)
    # Both factors as unsigned around 128: products of signed and unsigned saturate on processors without VNNI.
    unsigned = b(
        "Cast",
        b("Add", b("Cast", codes, to=int(ir.DataType.INT16)), np.array(128, np.int16)),
        to=int(ir.DataType.UINT8),
    )
    middle = np.array(128, np.uint8)
    name = f"{w.name}.unsigned"
    data = b.constant(name, ir.LazyTensor(
        lambda: ir.Tensor((w.codes().mT.short() + 128).byte().contiguous().numpy(), name=name),
        ir.DataType.UINT8, ir.Shape((w.columns, w.rows)), name=name,
    ))  # fmt: skip
    total = b("Cast", b("MatMulInteger", unsigned, data, middle, middle), to=int(b.dtype))
    scales = b.constant(f"{w.name}.scale", ir.tensor(w.scales().reshape(-1).numpy().astype(b.dtype.numpy())))
    return _with_bias(b, b("Mul", b("Mul", total, scale), scales), bias)


def quantize_input(b: Build, node: ir.Node) -> list[ir.Value]:
    """qpass::quantize_input -> codes; with scale and zero point of each token, if none are given."""
    x, scale, zero = (*node.inputs, None, None)[:3]
    assert x is not None
    x, spec = _in_floats_of_the_target(b, x), _spec(node)
    if scale is not None:
        return [_static_codes(b, x, scale, zero, spec)]
    rows = Rows(spec, _rank(x), _columns(x))
    made, made_zero = dynamic_qparams(b, x, rows)
    codes = codes_of(b, x, made, made_zero, rows)
    return [codes, made] if made_zero is None else [codes, made, made_zero]


def round_input(b: Build, node: ir.Node) -> ir.Value:
    """qpass::round_input: a pair of QuantizeLinear and DequantizeLinear."""
    x, scale, zero = (*node.inputs, None, None)[:3]
    assert x is not None
    x, spec = _in_floats_of_the_target(b, x), _spec(node)
    if spec.granularity is None and not spec.static:  # a cast
        one = np.array(1, b.dtype.numpy())
        return b("DequantizeLinear", b("QuantizeLinear", x, one, output_dtype=int(float8_type(spec))), one)
    if scale is not None:
        return _dequantized(b, _static_codes(b, x, scale, zero, spec), scale, zero)
    rows = Rows(spec, _rank(x), _columns(x))
    made, made_zero = dynamic_qparams(b, x, rows)
    return dequantize(b, codes_of(b, x, made, made_zero, rows), made, made_zero, rows, packed=False)


def _static_codes(b: Build, x: ir.Value, scale: ir.Value, zero: ir.Value | None, spec: QuantSpec) -> ir.Value:
    """Codes by a scale from calibration. Symmetric ones end at -127, QuantizeLinear at -128: what lies beyond is cut before."""
    one = _single(b, scale)
    if spec.format.kind == "float8":
        return b("QuantizeLinear", x, one, output_dtype=int(float8_type(spec)))
    if zero is not None:
        return b("QuantizeLinear", x, one, b("Reshape", zero, np.array([], np.int64)))
    limit = b("Mul", one, float(spec.qrange[1]))
    return b("QuantizeLinear", b("Clip", x, b("Neg", limit), limit), one, output_dtype=int(ir.DataType.INT8))


def _dequantized(b: Build, codes: ir.Value, scale: ir.Value, zero: ir.Value | None) -> ir.Value:
    offset = None if zero is None else b("Reshape", zero, np.array([], np.int64))
    return b("DequantizeLinear", codes, _single(b, scale), offset)


def _single(b: Build, scale: ir.Value) -> ir.Value:
    """The one scale of all tokens, as a number in the floats of the target."""
    one = b("Reshape", scale, np.array([], np.int64))
    return one if scale.dtype == b.dtype else b("Cast", one, to=int(b.dtype))


def _in_floats_of_the_target(b: Build, x: ir.Value) -> ir.Value:
    """Scaled columns come in float32."""
    if x.dtype == b.dtype:
        return x
    cast: ir.Value = b("Cast", x, to=int(b.dtype))
    cast.shape = x.shape
    return cast


def _with_bias(b: Build, y: ir.Value, bias: ir.Value | None) -> ir.Value:
    if bias is None:
        return y
    return b("Add", y, bias if bias.dtype == b.dtype else b("Cast", bias, to=int(b.dtype)))


def _spec(node: ir.Node) -> QuantSpec:
    return parse_spec(node.attributes["spec"].as_string())


def _columns(x: ir.Value) -> int:
    assert x.shape is not None
    return int(x.shape[-1])  # type: ignore[arg-type]


def _rank(x: ir.Value) -> int:
    assert x.shape is not None
    return len(x.shape)
