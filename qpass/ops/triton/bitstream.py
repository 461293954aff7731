"""x [M, K] @ W [N, K]^T for a few rows and integers of 2 to 8 bits, which may lie across the border of two words.

32 codes of b bits are b words: a unit. It is read a word at a time, and each code is shifted to the top of a float's mantissa: a
very small number, of which two products and a sum make (q - zero) scale in float32. Codes come in fours of neighbours, one for
each of the 8 places of four in a unit, and x is read in the same fours.

Units are the first dimension of a tile, so that threads beside each other read what lies beside each other. What values are made
of comes from loads and constants alone: then the compiler makes them where the tensor cores want them, not in shared memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.around import column_factors, finish, prepared, squares_of, weight_rows
from qpass.ops.triton.unpacking import BYTE_SCALE, scale_values

UNIT = tl.constexpr(32)
#: Two to it times the smallest number of a float32 is 2^-23.
_UP = tl.constexpr(2.0**126)


@triton.jit
def _words(data, there, BITS: tl.constexpr):
    """The words of units at `data`, eight tensors of which the last repeat the first where there are fewer bits."""
    w0, w1 = _word(data, there, 0, BITS), _word(data, there, 1, BITS)
    w2, w3, w4, w5, w6, w7 = w0, w0, w0, w0, w0, w0
    if BITS > 2:
        w2 = _word(data, there, 2, BITS)
    if BITS > 3:
        w3 = _word(data, there, 3, BITS)
    if BITS > 4:
        w4 = _word(data, there, 4, BITS)
    if BITS > 5:
        w5 = _word(data, there, 5, BITS)
    if BITS > 6:
        w6, w7 = _word(data, there, 6, BITS), _word(data, there, 7, BITS)
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _word(data, there, AT: tl.constexpr, BITS: tl.constexpr):
    word = tl.load(data + AT, mask=there, other=0).to(tl.uint32, bitcast=True)
    if BITS == 8:
        word = word ^ 0x80808080  # signed codes to 0 .. 255
    return word


@triton.jit
def _code(words, CODE: tl.constexpr, BITS: tl.constexpr):
    """Number CODE of the codes of units: q 2^-BITS in float32."""
    AT: tl.constexpr = CODE * BITS // 32
    DOWN: tl.constexpr = CODE * BITS % 32 + BITS - 23  # to the top of the mantissa
    if DOWN + 23 > 32:  # the rest lies in the next word
        bits = (words[AT] >> DOWN) | (words[AT + 1] << (32 - DOWN))
    elif DOWN > 0:
        bits = words[AT] >> DOWN
    else:
        bits = words[AT] << -DOWN
    return (bits & ((2**BITS - 1) << (23 - BITS))).to(tl.float32, bitcast=True) * _UP


@triton.jit
def _factors(scale, zero, outer, eights, row, block, there, scale_stride, zero_stride, zero_width, outer_stride,
             SCALE: tl.constexpr, BITS: tl.constexpr, FLOAT_ZERO: tl.constexpr):  # fmt: skip
    """What q 2^-BITS is multiplied with, and what is taken away then, for `block`s [G, 1] of `row`s [1, N]."""
    above = 1.0
    if SCALE == BYTE_SCALE:
        above = tl.load(outer + row * outer_stride)
    scales = scale_values(tl.load(scale + row * scale_stride + block, mask=there, other=0), above, SCALE)
    MIDDLE: tl.constexpr = 2 ** (BITS - 1)
    if zero is not None:
        zero += row * zero_stride
    if zero is None:
        zeros = MIDDLE
    elif FLOAT_ZERO:
        zeros = tl.load(zero + block, mask=there, other=0).to(tl.float32) + MIDDLE
    elif BITS == 8:
        zeros = (tl.load(zero + block, mask=there, other=0) ^ 128).to(tl.float32)
    else:
        at = block * BITS // 8
        low = tl.load(zero + at, mask=there, other=0).to(tl.int32)
        high = tl.load(zero + at + 1, mask=there & (at + 1 < zero_width), other=0).to(tl.int32)
        zeros = (((low | (high << 8)) >> tl.load(eights + block * BITS % 8)) & (2**BITS - 1)).to(tl.float32)
    return scales * 2**BITS, scales * zeros


@triton.jit
def _for_units(per_block, COUNT: tl.constexpr):
    """[G, N] of blocks -> [U, N] of their units."""
    G: tl.constexpr = per_block.shape[0]
    N: tl.constexpr = per_block.shape[1]
    return tl.reshape(tl.broadcast_to(per_block[:, None, :], (G, COUNT, N)), (G * COUNT, N))


@triton.jit
def bitstream_kernel(
    x, data, scale, zero, outer, eights, eps, norm, column_scale, bias, residual, y, partial, counters,
    M, N, K, units, blocks, scale_stride, zero_stride, zero_width, outer_stride, chunk,
    BITS: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr, FLOAT_ZERO: tl.constexpr, GATE: tl.constexpr,
    SPLIT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BU: tl.constexpr,
):  # fmt: skip
    """As linear_kernel; `data` [N, units, BITS] int32, `zero_width`: stored elements of a row of zero points, `eights`: int32
    0 .. 7. GROUP: columns that share a scale, whole units, 0: the whole row. SPLIT programs share them, `chunk` units each.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    n, there = weight_rows(N, BN, GATE)
    row = tl.minimum(n, N - 1).to(tl.int64)[None, :]  # rows beyond the end are computed, and not stored
    m = tl.arange(0, BM)
    u = tl.arange(0, BU)[:, None]
    c = tl.arange(0, 4 * BU)[:, None]
    GROUP_UNITS: tl.constexpr = GROUP // UNIT if GROUP > 0 else BU
    SPREAD: tl.constexpr = GROUP_UNITS if GROUP_UNITS < BU else BU
    g = tl.arange(0, BU // SPREAD)[:, None]
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, units)
    acc = tl.zeros((BN, BM), tl.float32)
    squares = tl.zeros((4 * BU, BM), tl.float32)
    LATER: tl.constexpr = eps is not None
    BY_PART: tl.constexpr = LATER and DTYPE == tl.float16  # as in linear_kernel
    factor = 1.0
    if BY_PART:
        found = squares_of(x, m, M, K, first * UNIT, last * UNIT, BM)
        factor = tl.rsqrt(found / K + 1e-30)[None, :]
    for at in range(first, last, BU):
        words = _words(data + (row * units + at + u) * BITS, at + u < last, BITS)
        block = at // GROUP_UNITS + g if GROUP > 0 else g
        scales, above = _factors(scale, zero, outer, eights, row, block, block < blocks, scale_stride, zero_stride, zero_width,
                                 outer_stride, SCALE, BITS, FLOAT_ZERO)  # fmt: skip
        scales, above = _for_units(scales, SPREAD), _for_units(above, SPREAD)
        for four in tl.static_range(0, UNIT, 4):
            unit = at + c // 4
            columns = unit * UNIT + (four + c % 4)
            xs = tl.load(x + m[None, :] * K + columns, mask=(m[None, :] < M) & (unit < last), other=0)
            if LATER and not BY_PART:
                squares += xs.to(tl.float32) * xs.to(tl.float32)
            if eps is not None or norm is not None or column_scale is not None:
                of_columns = column_factors(norm, column_scale, columns, unit < last, DTYPE)
                xs = prepared(xs, factor, of_columns, LATER and not BY_PART)
            q0 = (_code(words, four, BITS) * scales - above).to(DTYPE)
            q1 = (_code(words, four + 1, BITS) * scales - above).to(DTYPE)
            q2 = (_code(words, four + 2, BITS) * scales - above).to(DTYPE)
            q3 = (_code(words, four + 3, BITS) * scales - above).to(DTYPE)
            values = tl.join(tl.join(q0, q2), tl.join(q1, q3))
            values = tl.reshape(tl.permute(values, (1, 0, 2, 3)), (BN, 4 * BU))
            acc = tl.dot(values, xs, acc, input_precision="ieee")
    summed = tl.sum(squares, 0)
    if BY_PART:
        summed = found
        acc /= factor
    finish(tl.trans(acc), summed, eps, bias, residual, partial, counters, y, m, n, there, M, N, K,
           LATER, SPLIT, GATE)  # fmt: skip
