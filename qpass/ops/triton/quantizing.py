"""Floats to stored codes with a scale for each row or group: to the bit what qpass.numerics gives, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.rows import FLOAT8_E4M3, UNIFORM

#: Added and taken away, it rounds a float32 of less than 2^22 to the nearest integer, ties to even.
_ROUNDING = tl.constexpr(1.5 * 2.0**23)


@triton.jit
def _rounded(x, low, high):
    """Nearest integers within low .. high."""
    x = tl.minimum(tl.maximum(x, low - 1), high + 1)
    return tl.minimum(tl.maximum((x + _ROUNDING) - _ROUNDING, low), high)


@triton.jit
def _float8_codes(x, KIND: tl.constexpr):
    """float32 -> bytes as int32: to the nearest, ties to even, the largest for what is larger."""
    MANTISSA: tl.constexpr = 3 if KIND == FLOAT8_E4M3 else 2
    LEAST: tl.constexpr = -6 if KIND == FLOAT8_E4M3 else -14  # exponent of the smallest normal
    LARGEST: tl.constexpr = 448.0 if KIND == FLOAT8_E4M3 else 57344.0
    SHIFT: tl.constexpr = 23 - MANTISSA
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), LARGEST)
    bits = size.to(tl.int32, bitcast=True)
    normal = ((bits + ((1 << (SHIFT - 1)) - 1) + ((bits >> SHIFT) & 1)) >> SHIFT) - ((127 + LEAST - 1) << MANTISSA)
    below = (size * 2.0 ** (MANTISSA - LEAST) + _ROUNDING - _ROUNDING).to(tl.int32)
    codes = tl.where(size < 2.0**LEAST, below, normal)
    return tl.where(x != x, 0x7F, codes) | sign


@triton.jit
def quantize_kernel(
    x, data, scale, zero, rows, columns, width, blocks,
    KIND: tl.constexpr, BITS: tl.constexpr, FROM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr,
    TINY: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> `data` [rows, width], `scale` [rows, blocks] or None, `zero` [rows, packed blocks] or None.

    GROUP: columns that share a scale, COLUMNS for the whole row; TINY: the least scale of its type. LOW, HIGH: range of codes;
    FROM: the least code that there is.
    """
    BLOCKS: tl.constexpr = COLUMNS // GROUP
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + row * columns + c, mask=(row < rows) & (c < columns), other=0).to(tl.float32)
    block = tl.arange(0, BLOCKS)[None, :]
    if scale is not None:
        grouped = tl.reshape(values, (ROWS, BLOCKS, GROUP))
        bad = tl.max((grouped != grouped).to(tl.int32), 2) != 0
        if SYMMETRIC:
            largest = tl.max(tl.abs(grouped), 2)
            made = tl.div_rn(largest, tl.zeros_like(largest) + HIGH)
        else:
            low = tl.minimum(tl.min(grouped, 2), 0.0)
            high = tl.maximum(tl.max(grouped, 2), 0.0)
            largest = tl.maximum(-low, high)
            span = tl.zeros_like(low) + (HIGH - LOW)
            made = tl.div_rn(high, span) - tl.div_rn(low, span)
        stored = made.to(scale.dtype.element_ty).to(tl.float32)
        stored = tl.where(largest == 0, 1.0, tl.maximum(stored, TINY))
        stored = tl.where(bad, float("nan"), stored)
        there = (row < rows) & (block < blocks)
        tl.store(scale + row * blocks + block, stored.to(scale.dtype.element_ty), mask=there)
        spread = tl.reshape(tl.broadcast_to(stored[:, :, None], (ROWS, BLOCKS, GROUP)), (ROWS, COLUMNS))
        values = tl.div_rn(values, spread)
    if KIND == UNIFORM:
        codes = _rounded(values, -512.0, 511.0)
        if not SYMMETRIC:
            zeros = _rounded(LOW - tl.div_rn(low, stored), LOW, HIGH)
            codes += tl.reshape(tl.broadcast_to(zeros[:, :, None], (ROWS, BLOCKS, GROUP)), (ROWS, COLUMNS))
            _store(zero, zeros.to(tl.int32), row, rows, (blocks * BITS + 7) // 8, FROM, BITS, BLOCKS)
        codes = tl.minimum(tl.maximum(codes, LOW), HIGH).to(tl.int32)
        _store(data, tl.where(c < columns, codes, FROM), row, rows, width, FROM, BITS, COLUMNS)
    else:
        _store(data, _float8_codes(values, KIND), row, rows, width, 0, 8, COLUMNS)


@triton.jit
def _store(to, codes, row, rows, width, FROM: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Codes [ROWS, COUNT] as bytes: of four bits two in one, counted from FROM."""
    if BITS == 4:
        codes = (codes - FROM).to(tl.int32)
        if COUNT == 1:
            packed = codes
        else:
            even, odd = tl.split(tl.reshape(codes, (codes.shape[0], COUNT // 2, 2)))
            packed = even | (odd << 4)
        at = tl.arange(0, (COUNT + 1) // 2)[None, :]
    else:
        packed = codes
        at = tl.arange(0, COUNT)[None, :]
    tl.store(to + row * width + at, packed.to(tl.uint8), mask=(row < rows) & (at < width))
