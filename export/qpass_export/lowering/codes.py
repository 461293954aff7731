"""Quantizing and dequantizing of activations and caches, written with QuantizeLinear, DequantizeLinear and a few others.

The formulas are those of qpass.numerics, operation by operation, so that the codes are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from qpass.rotation import rotation
from qpass.spec import QuantSpec
from qpass_export.lowering.build import Build

_TINY = float(np.finfo(np.float32).tiny)
_INT8 = int(ir.DataType.INT8)


@dataclass(frozen=True)
class Rows:
    """What is quantized: a spec, tensors of `rank` dimensions, `columns` in a row."""

    spec: QuantSpec
    rank: int
    columns: int

    @property
    def size(self) -> int:
        """Columns that share a scale."""
        return self.spec.group_size or self.columns

    @property
    def blocks(self) -> int:
        """Scales in a row."""
        return -(-self.columns // self.size)

    def shape(self, *last: int) -> np.ndarray:
        """For Reshape: all dimensions but the last as they are, then `last`."""
        return np.array([*[0] * (self.rank - 1), *last])


def quantize(b: Build, x: ir.Value, rows: Rows) -> list[ir.Value]:
    """[.., K] -> codes (int8; bytes for four bits), scale [.., blocks] and, if the spec has one, the zero point."""
    if rows.spec.rotated:
        x = b("MatMul", x, rotation(rows.columns).numpy())
    scale, zero = dynamic_qparams(b, x, rows)
    codes = codes_of(b, x, scale, zero, rows)
    found = [codes, scale] if zero is None else [codes, scale, zero]
    if rows.spec.format.bits == 4:
        found[0] = pack(b, codes, rows.columns)
        found[2:] = [pack(b, z, rows.blocks) for z in found[2:]]
    return found


def dynamic_qparams(b: Build, x: ir.Value, rows: Rows) -> tuple[ir.Value, ir.Value | None]:
    """Scale and zero point (int8, unpacked) [.., blocks] of the values as they come."""
    fmt, keep = rows.spec.format, int(rows.blocks == 1)
    if rows.blocks > 1:
        missing = rows.blocks * rows.size - rows.columns
        if missing:  # a short last group is filled with zeros
            x = b("Pad", x, np.array([0] * (2 * rows.rank - 1) + [missing]))
        x = b("Reshape", x, rows.shape(rows.blocks, rows.size))
    axis = np.array([-1])
    if rows.spec.symmetric:
        amax = b("ReduceMax", b("Abs", x), axis, keepdims=keep)
        scale = b("Div", amax, float(fmt.symmetric_qmax))
    else:
        low = b("Min", b("ReduceMin", x, axis, keepdims=keep), 0.0)
        high = b("Max", b("ReduceMax", x, axis, keepdims=keep), 0.0)
        span = float(fmt.qmax - fmt.qmin)
        scale = b("Sub", b("Div", high, span), b("Div", low, span))
        amax = b("Max", b("Neg", low), high)
    scale = b("Where", b("Equal", amax, 0.0), 1.0, b("Max", scale, _TINY))
    if rows.spec.symmetric:
        return scale, None
    zero = b("Round", b("Sub", float(fmt.qmin), b("Div", low, scale)))
    return scale, b("Cast", b("Clip", zero, float(fmt.qmin), float(fmt.qmax)), to=_INT8)


def codes_of(b: Build, x: ir.Value, scale: ir.Value, zero: ir.Value | None, rows: Rows) -> ir.Value:
    """[.., K] -> int8 codes by the scale and zero point of each row or group."""
    low, high = rows.spec.qrange
    kind = float8_type(rows.spec) if rows.spec.format.kind == "float8" else ir.DataType.INT8
    told = int(kind) if zero is None else None
    codes = _blockwise(b, "QuantizeLinear", x, scale, zero, rows, output_dtype=told)
    # QuantizeLinear ends at -128 and 127: no value lies beyond its own scale's range by more than a rounding.
    return codes if rows.spec.format.bits == 8 else b("Clip", codes, np.array(low, np.int8), np.array(high, np.int8))


def float8_type(spec: QuantSpec) -> ir.DataType:
    """ONNX's type of an 8-bit float format."""
    return ir.DataType.FLOAT8E5M2 if spec.format.name == "fp8_e5m2" else ir.DataType.FLOAT8E4M3FN


def pack(b: Build, codes: ir.Value, columns: int) -> ir.Value:
    """[.., K] int8 in -8 .. 7 -> bytes [.., ceil(K / 2)], the first code in the low half."""
    unsigned = b("Cast", b("Add", codes, np.array(8, np.int8)), to=int(ir.DataType.UINT8))
    if columns % 2:
        one = b("Slice", unsigned, np.array([0]), np.array([1]), np.array([-1]))
        unsigned = b("Concat", unsigned, b("Sub", one, one), axis=-1)
    end, axis, step = np.array([2**62]), np.array([-1]), np.array([2])
    even, odd = (b("Slice", unsigned, np.array([i]), end, axis, step) for i in (0, 1))
    return b("BitwiseOr", even, b("BitShift", odd, np.array(4, np.uint8), direction="LEFT"))


def unpack(b: Build, packed: ir.Value, rank: int, columns: int) -> ir.Value:
    """Bytes [.., ceil(K / 2)] -> int8 codes [.., K] in -8 .. 7."""
    low = b("BitwiseAnd", packed, np.array(15, np.uint8))
    high = b("BitShift", packed, np.array(4, np.uint8), direction="RIGHT")
    pairs = b("Concat", *(b("Unsqueeze", half, np.array([-1])) for half in (low, high)), axis=-1)
    flat = b("Reshape", pairs, np.array([*[0] * (rank - 1), columns + columns % 2]))
    if columns % 2:
        flat = b("Slice", flat, np.array([0]), np.array([columns]), np.array([-1]))
    return b("Sub", b("Cast", flat, to=_INT8), np.array(8, np.int8))


def dequantize(
    b: Build, data: ir.Value, scale: ir.Value, zero: ir.Value | None, rows: Rows, packed: bool = True
) -> ir.Value:
    """Stored parts of rows [.., K] -> floats; still rotated, if the spec is. `packed`: four-bit codes come two a byte."""
    if rows.spec.format.bits == 4 and packed:
        data = unpack(b, data, rows.rank, rows.columns)
        zero = None if zero is None else unpack(b, zero, rows.rank, rows.blocks)
    return _blockwise(b, "DequantizeLinear", data, scale, zero, rows)


def _blockwise(
    b: Build,
    op_type: str,
    x: ir.Value,
    scale: ir.Value,
    zero: ir.Value | None,
    rows: Rows,
    output_dtype: int | None = None,
) -> ir.Value:
    """(De)QuantizeLinear with a scale for each block of a row: as rows of one block each and a scale for each row, which
    onnxruntime does five times as fast as its blocks; as blocks where the last of a row is short."""
    if rows.columns % rows.size:
        y: ir.Value = b(op_type, x, scale, zero, axis=-1, block_size=rows.size, output_dtype=output_dtype)
        return y
    flat, each = b("Reshape", x, np.array([-1, rows.size])), np.array([-1])
    offset = None if zero is None else b("Reshape", zero, each)
    y = b(op_type, flat, b("Reshape", scale, each), offset, axis=0, output_dtype=output_dtype)
    done: ir.Value = b("Reshape", y, b("Shape", x))
    return done
