"""Attention that appends to its own cache: onnxruntime's GroupQueryAttention, which reads integers with static scales."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qpass.spec import parse_spec
from qpass_export.lowering.attention import KEYS, MASK, QUERY, SINKS, VALUES
from qpass_export.lowering.build import CONTRIB, Build

_INT32 = int(ir.DataType.INT32)
#: Added to a score that does not count: half the lowest number, so that a sum of two of them is none below it.
_MASKED = {ir.DataType.FLOAT16: -3e4, ir.DataType.FLOAT: -1e30}


@dataclass(frozen=True)
class Half:
    """Keys or values: `past`, an input of the graph; `new`, the floats that a call adds; `joined`, what the graph gives back."""

    past: ir.Value
    new: ir.Value
    joined: ir.Value
    scale: ir.Value | None


def appended(node: ir.Node) -> tuple[Half, Half] | None:
    """The halves of the cache that an attention reads, if each is an input joined to new tokens, as floats or static codes."""
    halves = [_half(node, start, half) for start, half in ((KEYS, "k"), (VALUES, "v"))]
    q = node.inputs[QUERY]
    same_width = q is not None and q.shape is not None and q.shape[-1] == node.attributes["v_columns"].as_int()
    if halves[0] is None or halves[1] is None or node.attributes["is_causal"].as_int() or not same_width:
        return None
    return halves[0], halves[1]


def _half(node: ir.Node, start: int, half: str) -> Half | None:
    data, scale = node.inputs[start : start + 2]
    spec = parse_spec(node.attributes[f"{half}_spec"].as_string())
    join = None if data is None else data.producer()
    if (
        data is None
        or join is None
        or join.op_type != "Concat"
        or len(join.inputs) != 2
        or not (spec.is_identity or spec.static)
    ):
        return None
    past, new = join.inputs
    if past is None or new is None or not past.is_graph_input():
        return None
    made = new.producer()
    if spec.static:
        if made is None or made.op_type != "quantize":
            return None
        new = made.inputs[0]
    assert new is not None
    return Half(past, new, data, scale if spec.static else None)


def grouped_query(b: Build, node: ir.Node, keys: Half, values: Half) -> tuple[ir.Value, ir.Value, ir.Value]:
    """qpass::attention -> (its value, all keys, all values). The mask of the model is added to the scores whole: every row counts
    all tokens as its own, and the operator's own causal mask is off, for some models see what comes later."""
    q = node.inputs[QUERY]
    assert q is not None
    assert q.shape is not None
    assert keys.new.shape is not None
    heads, shared, width = int(q.shape[1]), int(keys.new.shape[1]), int(q.shape[-1])  # type: ignore[arg-type]
    batch = b("Shape", q, start=0, end=1)
    length = b("Add", b("Shape", keys.past, start=2, end=3), b("Shape", q, start=2, end=3))
    total = b("Cast", b("Squeeze", length), to=_INT32)
    last = b("Expand", b("Cast", b("Sub", length, np.array([1])), to=_INT32), batch)
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    bias = mask
    if mask is not None and mask.dtype == ir.DataType.BOOL:
        bias = b("Where", mask, 0.0, _MASKED[b.dtype])
    elif mask is not None and mask.dtype != b.dtype:
        bias = b("Cast", b("Clip", mask, b("Cast", _MASKED[b.dtype], to=int(mask.dtype))), to=int(b.dtype))  # type: ignore[arg-type]
    if mask is not None and mask.shape is not None and mask.shape[-2] == 1:  # the same for all queries
        rows = b("Concat", np.array([1, 1]), b("Shape", q, start=2, end=3), np.array([1]), axis=0)
        bias = b("Expand", bias, rows)
    sinks = node.inputs[SINKS] if len(node.inputs) > SINKS else None
    scales = [
        None if half.scale is None else b("Cast", half.scale, to=int(ir.DataType.FLOAT)) for half in (keys, values)
    ]
    cap = node.attributes["soft_cap"].as_float()
    quantized = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
    y, all_keys, all_values = b(
        "GroupQueryAttention",
        *(_flat(b, x, n * width) for x, n in ((q, heads), (keys.new, shared), (values.new, shared))),
        keys.past, values.past, last, total, None, None, None, bias, sinks, *scales,
        domain=CONTRIB, outputs=3, num_heads=heads, kv_num_heads=shared, causal=0, softcap=cap or None,
        scale=node.attributes["scale"].as_float() if "scale" in node.attributes else None,
        **(quantized if keys.scale is not None else {}),
    )  # fmt: skip
    split = b("Reshape", y, np.array([0, 0, heads, width]))
    return b("Transpose", split, perm=[0, 2, 1, 3]), all_keys, all_values


def _flat(b: Build, x: ir.Value, width: int) -> ir.Value:
    """[B, H, S, D] -> [B, S, H * D]"""
    return b("Reshape", b("Transpose", x, perm=[0, 2, 1, 3]), np.array([0, 0, width]))
