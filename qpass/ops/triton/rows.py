"""Rows of stored codes to floats, all of them or those that are named: to the bit what qpass.numerics gives."""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.unpacking import BYTE_SCALE, E4M3_SCALE, scale_values

UNIFORM, CODEBOOK, FLOAT8_E4M3, FLOAT8_E5M2 = (tl.constexpr(i) for i in range(4))


@triton.jit
def _codes(data, first, COLUMNS: tl.constexpr, BITS: tl.constexpr, width):
    """[COLUMNS] int32 codes of a row at `data`, from column `first` on, a multiple of COLUMNS; `width`: bytes of the row."""
    if BITS == 8:
        at = first + tl.arange(0, COLUMNS)
        codes = tl.load(data + at, mask=at < width, other=0).to(tl.int32)
    elif BITS == 4:
        at = first // 2 + tl.arange(0, COLUMNS // 2)
        byte = tl.load(data + at, mask=at < width, other=0).to(tl.int32)
        codes = tl.reshape(tl.join(byte & 15, byte >> 4), (COLUMNS,))
    elif BITS == 2:
        at = first // 4 + tl.arange(0, COLUMNS // 4)
        byte = tl.load(data + at, mask=at < width, other=0).to(tl.int32)
        even = tl.join(byte & 3, (byte >> 4) & 3)
        odd = tl.join((byte >> 2) & 3, byte >> 6)
        codes = tl.reshape(tl.join(even, odd), (COLUMNS,))
    else:  # a code lies in one byte or two
        bit = (first + tl.arange(0, COLUMNS)) * BITS
        at = bit // 8
        low = tl.load(data + at, mask=at < width, other=0).to(tl.int32)
        high = tl.load(data + at + 1, mask=at + 1 < width, other=0).to(tl.int32)
        codes = ((low | (high << 8)) >> (bit % 8)) & (2**BITS - 1)
    return codes


@triton.jit
def stored_zeros(zero, block, width, BITS: tl.constexpr, FLOAT: tl.constexpr):
    """Zero points of `block`s of a row of `width` at `zero`, as float32; integers counted from 0."""
    if FLOAT:
        values = tl.load(zero + block).to(tl.float32)
    elif BITS == 8:
        values = (tl.load(zero + block) ^ 128).to(tl.float32)
    else:
        bit = block * BITS
        low = tl.load(zero + bit // 8).to(tl.int32)
        high = tl.load(zero + tl.minimum(bit // 8 + 1, width - 1)).to(tl.int32)
        values = (((low | (high << 8)) >> (bit % 8)) & (2**BITS - 1)).to(tl.float32)
    return values


@triton.jit
def _float8(codes, KIND: tl.constexpr):
    """Bytes as int32 -> float32."""
    if KIND == FLOAT8_E4M3:  # exponents differ by 120; all ones are no number
        bits = ((codes & 0x80) << 24) | ((codes & 0x7F) << 20)
        values = bits.to(tl.float32, bitcast=True) * 2.0**120
        values = tl.where((codes & 0x7F) == 0x7F, float("nan"), values)
    else:  # the top of a float16
        values = (codes << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return values


@triton.jit
def rows_kernel(
    data, scale, zero, outer, table, ids, y,
    rows, columns, width, blocks, zero_width, scale_stride, zero_stride, outer_stride,
    KIND: tl.constexpr, BITS: tl.constexpr, MIDDLE: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    FLOAT_ZERO: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """`data` [rows, width] bytes -> y [rows or ids, columns]. A name outside of the rows gives NaN.

    Strides are from one row to the next, 0 where all rows share one; `zero_width`: of a row of zero points. `table`: [16]
    float32 of a codebook. MIDDLE: what unsigned codes are above signed ones. GROUP 0: a scale for the whole row.
    """
    i = tl.program_id(0).to(tl.int64)
    row, there = i, True
    if ids is not None:
        row = tl.load(ids + i).to(tl.int64)
        there = (row >= 0) & (row < rows)
        row = tl.where(there, row, 0)
    first = tl.program_id(1) * COLUMNS
    at = first + tl.arange(0, COLUMNS)
    codes = _codes(data + row * width, first, COLUMNS, BITS, width)
    SPREAD: tl.constexpr = GROUP >= 4 and COLUMNS % (GROUP if GROUP > 0 else 1) == 0
    BLOCKS: tl.constexpr = COLUMNS // GROUP if SPREAD else 1
    if KIND == CODEBOOK:
        values = tl.load(table + codes)
    elif KIND == UNIFORM:
        if BITS == 8:
            codes = codes ^ 128  # signed to 0 .. 255
        values = codes.to(tl.float32)
    else:
        values = _float8(codes, KIND)
    if scale is not None:
        if SPREAD:
            block = tl.minimum(first // GROUP + tl.arange(0, BLOCKS), blocks - 1)
        elif GROUP > 0:
            block = tl.minimum(at // GROUP, blocks - 1)
        else:
            block = tl.zeros((1,), tl.int32)
        above = 1.0
        if SCALE == E4M3_SCALE or SCALE == BYTE_SCALE:
            above = tl.load(outer + row * outer_stride)
        scales = scale_values(tl.load(scale + row * scale_stride + block), above, SCALE)
        if zero is not None:
            zeros = stored_zeros(zero + row * zero_stride, block, zero_width, BITS, FLOAT_ZERO)
            if SPREAD:
                zeros = tl.reshape(tl.broadcast_to(zeros[:, None], (BLOCKS, GROUP)), (COLUMNS,))
            if FLOAT_ZERO:
                values -= MIDDLE
            values -= zeros
        elif KIND == UNIFORM:
            values -= MIDDLE
        if SPREAD:
            scales = tl.reshape(tl.broadcast_to(scales[:, None], (BLOCKS, GROUP)), (COLUMNS,))
        values *= scales
    values = tl.where(there, values, float("nan"))
    tl.store(y + i * columns + at, values.to(y.dtype.element_ty), mask=at < columns)
