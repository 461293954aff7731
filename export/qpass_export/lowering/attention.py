"""Attention over a float or a quantized cache, and the cache's own parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from qpass.rotation import rotation
from qpass.spec import QuantSpec, parse_spec
from qpass_export.lowering import codes
from qpass_export.lowering.build import Build
from qpass_export.lowering.codes import Rows

#: Positions among the inputs of qpass::attention: query, four parts of keys, four of values, mask; its last is the sinks.
QUERY, KEYS, VALUES, MASK, SINKS = 0, 1, 5, 9, 15


def quantize(b: Build, node: ir.Node) -> list[ir.Value]:
    """qpass::quantize of new keys or values."""
    x = node.inputs[0]
    assert x is not None
    assert x.shape is not None
    spec = parse_spec(node.attributes["spec"].as_string())
    rows = Rows(spec, len(x.shape), int(x.shape[-1]))  # type: ignore[arg-type]
    if spec.is_identity:
        return [b("Cast", x, to=int(ir.DataType.FLOAT16 if spec.format.name == "fp16" else ir.DataType.FLOAT))]
    if len(node.inputs) > 1 and node.inputs[1] is not None:  # a static scale, which divides what is rounded
        low, high = spec.qrange
        rounded = b("Clip", b("Round", b("Div", x, node.inputs[1])), float(low), float(high))
        return [b("Cast", rounded, to=int(ir.DataType.INT8))]
    return codes.quantize(b, x, rows)


def read_cache(b: Build, node: ir.Node) -> ir.Value:
    """qpass::read_cache and qpass::dequantize: a cache as floats, where something else than attention reads it."""
    spec = parse_spec(node.attributes["spec"].as_string())
    columns = node.attributes["columns"].as_int()
    floats = _read(b, _parts(node, 0), spec, columns)
    return b("MatMul", floats, rotation(columns).numpy()) if spec.rotated else floats


def attention(b: Build, node: ir.Node, opset: int) -> ir.Value:
    """qpass::attention: ONNX's Attention where the opset has it and it says the same, written out elsewhere.

    A rotation of keys and values (an orthogonal, symmetric matrix) is not undone: queries are rotated instead, and the result.
    """
    q = node.inputs[QUERY]
    assert q is not None
    assert q.shape is not None
    k_spec, v_spec = (parse_spec(node.attributes[f"{half}_spec"].as_string()) for half in "kv")
    width, columns = int(q.shape[-1]), node.attributes["v_columns"].as_int()  # type: ignore[arg-type]
    key = _read(b, _parts(node, KEYS), k_spec, width)
    value = _read(b, _parts(node, VALUES), v_spec, columns)
    if k_spec.rotated:
        q = b("MatMul", q, rotation(width).numpy())
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    sinks = node.inputs[SINKS] if len(node.inputs) > SINKS else None
    scale = node.attributes["scale"].as_float() if "scale" in node.attributes else width**-0.5
    causal, cap = node.attributes["is_causal"].as_int(), node.attributes["soft_cap"].as_float()
    if opset >= 23 and not cap and sinks is None:
        out = b("Attention", q, key, value, mask, is_causal=causal, scale=scale)
    else:
        heads = int(node.inputs[QUERY].shape[1]), int(node.inputs[KEYS].shape[1])  # type: ignore[union-attr, index, arg-type]
        out = written_out(b, q, key, value, mask, heads, scale, cap, bool(causal), sinks)
    return b("MatMul", out, rotation(columns).numpy()) if v_spec.rotated else out


def _parts(node: ir.Node, start: int) -> list[ir.Value | None]:
    return list((*node.inputs, *[None] * 4)[start : start + 4])


def _read(b: Build, parts: list[ir.Value | None], spec: QuantSpec, columns: int) -> ir.Value:
    """Stored parts [B, H, S, *] -> floats [B, H, S, columns], still rotated."""
    data, scale, zero, _ = parts
    assert data is not None
    if spec.is_identity:
        return data if data.dtype == b.dtype else b("Cast", data, to=int(b.dtype))
    if spec.static:
        return b("Mul", b("Cast", data, to=int(b.dtype)), scale)
    assert scale is not None
    return codes.dequantize(b, data, scale, zero, Rows(spec, 4, columns))


def written_out(
    b: Build, q: ir.Value, key: ir.Value, value: ir.Value, mask: ir.Value | None, heads: tuple[int, int], scale: float,
    cap: float, causal: bool, sinks: ir.Value | None,
) -> ir.Value:  # fmt: skip
    """softmax(capped(scale * q k^T) + mask, sinks) v. Query heads that share a key head are one axis of its product with them."""
    total, shared = heads
    groups = total // shared
    five = groups > 1

    def grouped(x: ir.Value) -> ir.Value:
        """[B, H, ..] -> [B, Hk, H / Hk, ..]"""
        head, rest = b("Slice", b("Shape", x), [0], [1]), b("Slice", b("Shape", x), [2], [4])
        return b("Reshape", x, b("Concat", head, np.array([shared, groups]), rest, axis=0))

    queries = grouped(q) if five else q
    keys, values = (b("Unsqueeze", x, np.array([2])) if five else x for x in (key, value))
    flipped = b("Transpose", keys, perm=[0, 1, 2, 4, 3] if five else [0, 1, 3, 2])
    scores = b("MatMul", b("Mul", queries, scale), flipped)
    if cap:
        scores = b("Mul", b("Tanh", b("Div", scores, cap)), cap)
    lowest = float(np.finfo(b.dtype.numpy()).min)
    if causal:
        length = [b("Slice", b("Shape", x), [2], [3]) for x in (q, key)]
        ones = b("Expand", np.array(True), b("Concat", *length, axis=0))
        scores = b(
            "Where",
            b("Cast", b("Trilu", b("Cast", ones, to=int(ir.DataType.FLOAT)), upper=0), to=int(ir.DataType.BOOL)),
            scores,
            lowest,
        )
    if mask is not None:
        assert mask.shape is not None
        if five and len(mask.shape) == 4:
            one = mask.shape[1] == 1
            mask_of_groups: Any = b("Unsqueeze", mask, np.array([2])) if one else grouped(mask)
        else:
            mask_of_groups = mask
        boolean = mask.dtype == ir.DataType.BOOL
        if not boolean and mask.dtype != b.dtype:
            mask_of_groups = b("Cast", mask_of_groups, to=int(b.dtype))
        scores = b("Where", mask_of_groups, scores, lowest) if boolean else b("Add", scores, mask_of_groups)
    if sinks is None:
        weights = b("Softmax", scores, axis=-1)
    else:  # one more score for each row, which has no value
        shape = np.array([1, shared, groups, 1, 1] if five else [1, total, 1, 1])
        column = b("Slice", b("Mul", scores, 0.0), [0], [1], [-1])
        column = b("Add", b("Where", b("IsNaN", column), 0.0, column), b("Reshape", sinks, shape))
        weights = b("Softmax", b("Concat", scores, column, axis=-1), axis=-1)
        weights = b("Slice", weights, [0], [-1], [-1])
    out = b("MatMul", weights, values)
    if not five:
        return out
    shape = b(
        "Concat",
        b("Slice", b("Shape", out), [0], [1]),
        np.array([total]),
        b("Slice", b("Shape", out), [3], [5]),
        axis=0,
    )
    return b("Reshape", out, shape)
