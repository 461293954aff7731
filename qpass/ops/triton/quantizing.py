"""Floats to stored codes with a scale for each row or group: to the bit what qpass.numerics gives, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.rows import CODEBOOK, FLOAT8_E4M3, UNIFORM
from qpass.ops.triton.unpacking import BYTE_SCALE, E8M0_SCALE, scale_values

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
def _exponents(largest, bad, HIGH: tl.constexpr, EMAX: tl.constexpr, CEIL: tl.constexpr):
    """E8M0 bytes: of largest / HIGH rounded up to a power of two, or of the power of two in largest over that in HIGH."""
    if CEIL:
        bits = tl.div_rn(largest, tl.zeros_like(largest) + HIGH).to(tl.int32, bitcast=True)
        over = (bits & 0x7FFFFF) > tl.where(bits < 0x800000, 0x400000, 0)  # of subnormals only 2^-127 is an exponent
        exponents = (bits >> 23) + over.to(tl.int32)
    else:
        exponents = (largest.to(tl.int32, bitcast=True) >> 23) + 1 - EMAX
    exponents = tl.minimum(tl.maximum(exponents, 0), 254)
    return tl.where(
        largest == 0, 127, tl.where(bad | (largest == float("inf")), 127 - (0 if CEIL else EMAX), exponents)
    )


@triton.jit
def _nearest(x, middles, COUNT: tl.constexpr, SIGNED: tl.constexpr):
    """Codes of a codebook by the COUNT numbers between its values, ties to the even code. SIGNED: the bit above is the sign."""
    codes = tl.zeros_like(x).to(tl.int32)
    size = tl.abs(x) if SIGNED else x
    for i in tl.static_range(COUNT):
        middle = tl.load(middles + i)
        above = size > middle if i % 2 == 0 else size >= middle
        codes += (above | (x != x)).to(tl.int32)
    if SIGNED:
        codes += tl.where(x.to(tl.int32, bitcast=True) < 0, COUNT + 1, 0)
    return codes


@triton.jit
def quantize_kernel(
    x, data, scale, zero, outer, given, middles, rows, columns, width, blocks, zero_width, tokens, heads,
    KIND: tl.constexpr, BITS: tl.constexpr, FROM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, EMAX: tl.constexpr, CEIL: tl.constexpr, SYMMETRIC: tl.constexpr,
    FLOAT_ZERO: tl.constexpr, MIDDLES: tl.constexpr, SIGNED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x [rows, columns] -> the parts that `write_rows` writes. `given` [heads, columns]: what rows, `tokens` of each head, are
    divided by before."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, COLUMNS)[None, :]
    values = tl.load(x + row * columns + c, mask=(row < rows) & (c < columns), other=0).to(tl.float32)
    write_rows(values, row, row < rows, row // tokens % heads, data, scale, zero, outer, given, middles, columns, width, blocks,
               zero_width, KIND, BITS, FROM, LOW, HIGH, GROUP, SCALE, TINY, EMAX, CEIL, SYMMETRIC, FLOAT_ZERO, MIDDLES, SIGNED,
               COLUMNS)  # fmt: skip


@triton.jit
def write_rows(
    values, row, exists, head, data, scale, zero, outer, given, middles, columns, width, blocks, zero_width,
    KIND: tl.constexpr, BITS: tl.constexpr, FROM: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, GROUP: tl.constexpr,
    SCALE: tl.constexpr, TINY: tl.constexpr, EMAX: tl.constexpr, CEIL: tl.constexpr, SYMMETRIC: tl.constexpr,
    FLOAT_ZERO: tl.constexpr, MIDDLES: tl.constexpr, SIGNED: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """float32 values [R, COLUMNS], 0 beyond `columns`, as rows `row` [R, 1] of `data` [*, width], `scale` [*, blocks] or None,
    `zero` [*, zero_width] or None, and `outer` [*] where scales are bytes times one float, or None; only those that exist.

    GROUP: columns that share a scale, COLUMNS for the whole row; TINY: the least scale of its type. LOW, HIGH: range of codes;
    FROM: the least code that there is. `given` [heads, columns]: what values are divided by before.
    """
    BLOCKS: tl.constexpr = COLUMNS // GROUP
    ROWS: tl.constexpr = values.shape[0]
    c = tl.arange(0, COLUMNS)[None, :]
    real = exists & (c < columns)
    if given is not None:
        by = tl.load(given + head * columns + c, mask=real, other=1)
        values = tl.div_rn(values, by.to(tl.float32))
    block = tl.arange(0, BLOCKS)[None, :]
    if scale is not None:
        grouped = tl.reshape(values, (ROWS, BLOCKS, GROUP))
        bad = tl.max((grouped != grouped).to(tl.int32), 2) != 0
        if SYMMETRIC:
            largest = tl.max(tl.abs(grouped), 2)
            made = tl.div_rn(largest, tl.zeros_like(largest) + HIGH)
        else:
            if FLOAT_ZERO:  # a range need not hold 0: what is beyond the end takes no part
                low = tl.min(tl.reshape(tl.where(real, values, float("inf")), (ROWS, BLOCKS, GROUP)), 2)
                high = tl.max(tl.reshape(tl.where(real, values, -float("inf")), (ROWS, BLOCKS, GROUP)), 2)
                largest = high - low
                least = tl.maximum(-low, high) * 2.0**-15
            else:
                low = tl.minimum(tl.min(grouped, 2), 0.0)
                high = tl.maximum(tl.max(grouped, 2), 0.0)
                largest = tl.maximum(-low, high)
                least = 0.0 * largest
            span = tl.zeros_like(low) + (HIGH - LOW)
            made = tl.maximum(tl.div_rn(high, span) - tl.div_rn(low, span), least)
        there = exists & (block < blocks)
        if SCALE == E8M0_SCALE:
            exponents = _exponents(largest, bad, HIGH, EMAX, CEIL)
            tl.store(scale + row * blocks + block, exponents.to(tl.uint8), mask=there)
            stored = scale_values(exponents, 1.0, SCALE)
        elif SCALE == BYTE_SCALE:
            of_row = tl.max(tl.where(there, made, 0.0), 1)
            of_row = tl.div_rn(of_row, tl.zeros_like(of_row) + 255.0)
            of_row = tl.where(of_row == 0, 1.0, of_row)[:, None]
            codes = _rounded(tl.div_rn(made, tl.zeros_like(made) + of_row), 1.0, 255.0)
            tl.store(scale + row * blocks + block, codes.to(tl.uint8), mask=there)
            of_row = tl.where(tl.max(bad.to(tl.int32), 1)[:, None] != 0, float("nan"), of_row)
            tl.store(outer + row, of_row, mask=exists)
            stored = codes * of_row
        else:
            stored = made.to(scale.dtype.element_ty).to(tl.float32)
            stored = tl.where(largest == 0, 1.0, tl.maximum(stored, TINY))
            stored = tl.where(bad, float("nan"), stored)
            tl.store(scale + row * blocks + block, stored.to(scale.dtype.element_ty), mask=there)
        values = tl.div_rn(values, _spread(stored, GROUP))
    if KIND == UNIFORM:
        codes = _rounded(values, -512.0, 511.0)
        if FLOAT_ZERO:
            zeros = (LOW - tl.div_rn(low, stored)).to(zero.dtype.element_ty)
            tl.store(zero + row * blocks + block, zeros, mask=there)
            codes = _rounded(values + _spread(zeros.to(tl.float32), GROUP), LOW, HIGH)
        elif not SYMMETRIC:
            zeros = _rounded(LOW - tl.div_rn(low, stored), LOW, HIGH)
            codes += _spread(zeros, GROUP)
            zeros = tl.where(block < blocks, zeros, FROM)  # what fills the last byte is 0
            _store(zero, zeros.to(tl.int32), row, exists, zero_width, FROM, BITS, BLOCKS)
        codes = tl.minimum(tl.maximum(codes, LOW), HIGH).to(tl.int32)
    elif KIND == CODEBOOK:
        codes = _nearest(values, middles, MIDDLES, SIGNED)
    else:
        codes = _float8_codes(values, KIND)
    _store(data, tl.where(c < columns, codes, FROM), row, exists, width, FROM, BITS, COLUMNS)


@triton.jit
def _spread(per_block, GROUP: tl.constexpr):
    """[R, B] of blocks -> [R, C] of their columns."""
    R: tl.constexpr = per_block.shape[0]
    B: tl.constexpr = per_block.shape[1]
    return tl.reshape(tl.broadcast_to(per_block[:, :, None], (R, B, GROUP)), (R, B * GROUP))


@triton.jit
def _store(to, codes, row, exists, width, FROM: tl.constexpr, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Codes [ROWS, COUNT] as bytes, counted from FROM if they are packed: eight of b bits are b bytes."""
    if BITS == 8:
        at = tl.arange(0, COUNT)[None, :]
        tl.store(to + row * width + at, codes.to(tl.uint8), mask=exists & (at < width))
    else:
        EIGHT: tl.constexpr = 8 if COUNT >= 8 else COUNT
        parts = tl.reshape((codes - FROM).to(tl.int64), (codes.shape[0], COUNT // EIGHT, EIGHT))
        packed = tl.sum(parts << (tl.arange(0, EIGHT) * BITS)[None, None, :].to(tl.int64), 2)
        at = tl.arange(0, COUNT // EIGHT)[None, :] * BITS
        for i in tl.static_range(BITS):
            byte = ((packed >> (8 * i)) & 255).to(tl.uint8)
            tl.store(to + row * width + at + i, byte, mask=exists & (at + i < width))
