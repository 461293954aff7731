"""x [M, K] @ W [N, K]^T for a few rows: the weight is read as it is stored, once, and made floats in registers.

A program takes some rows of W and a part of its columns. Where rows alone do not fill the device, several programs share them:
each writes its sums, and the last to finish adds them up in a fixed order, so that the result does not depend on who that is.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.around import column_factors, finish, prepared, row_factor, squares_of, weight_rows
from qpass.ops.triton.unpacking import (
    BYTE_SCALE,
    E4M3_SCALE,
    INTEGER_ZERO,
    for_words,
    looked_up,
    plane_values,
    planes_of,
    scale_values,
    zero_codes,
)


@triton.jit
def _scales(scale, outer, row, block, scale_stride, outer_stride, SCALE: tl.constexpr):
    """float32 scales of `block`s of `row`s; strides are 0 where rows share them."""
    stored = tl.load(scale + row * scale_stride + block)
    above = 1.0
    if SCALE == E4M3_SCALE or SCALE == BYTE_SCALE:
        above = tl.load(outer + row * outer_stride)
    return scale_values(stored, above, SCALE)


@triton.jit
def linear_kernel(
    x, data, scale, zero, outer, table, eps, norm, column_scale, bias, residual, y, partial, counters,
    M, N, K, words, blocks, scale_stride, zero_stride, outer_stride, chunk,
    KIND: tl.constexpr, PLANES: tl.constexpr, UNIT: tl.constexpr, PRMT: tl.constexpr, GROUP: tl.constexpr, SCALE: tl.constexpr,
    ZERO: tl.constexpr, GATE: tl.constexpr, SPLIT: tl.constexpr, FOURS: tl.constexpr, ONE: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """`data` [N, words] int32; `scale` [N or 1, blocks], `zero` [N or 1, *] packed, `outer` [N or 1], or None. Strides: from
    one row to the next, 0 where there is one.

    GROUP: columns that share a scale, 0: the whole row. SPLIT programs share the columns, `chunk` words each. `partial`
    [SPLIT, M, N] float32, then [programs along N, SPLIT, M], and `counters` [programs along N], all 0 before and after, are used
    if SPLIT > 1. eps, norm [K], column_scale [K], residual, GATE: of Around, or None. ONE: a row; each program normalizes it
    before. Of more it sums up the squares of what it reads anyway, and its results are divided at the end. FOURS: `words` are
    counted in fours, 16 bytes: the compiler is told of arguments only whether they are multiples of 16.
    """
    if FOURS:
        words *= 4
    DTYPE: tl.constexpr = x.dtype.element_ty
    CODES: tl.constexpr = 2 * PLANES
    BK: tl.constexpr = CODES * BW
    n, there = weight_rows(N, BN, GATE)
    row = tl.minimum(n, N - 1).to(tl.int64)  # rows beyond the end are computed, and not stored
    m = tl.arange(0, BM)
    w = tl.arange(0, BW)
    first = tl.program_id(1) * chunk
    last = tl.minimum(first + chunk, words)
    acc = tl.zeros((BM, BN), tl.float32)
    squares = tl.zeros((BM,), tl.float32)
    LATER: tl.constexpr = eps is not None and not ONE
    # Before it is divided by the root of its mean square x may be too small, or too large, for float16 as its columns are scaled.
    BY_PART: tl.constexpr = LATER and DTYPE == tl.float16
    factor = 1.0
    if BY_PART:
        found = squares_of(x, m, M, K, first * CODES, last * CODES, BM)
        factor = tl.rsqrt(found / K + 1e-30)[:, None]
    if eps is not None and ONE:
        factor = row_factor(x, eps, K, BM)[:, None]
    CHANGED: tl.constexpr = norm is not None or column_scale is not None or eps is not None
    if CHANGED:  # loaded a tile ahead: no copy in advance is made of so few
        columns = first * CODES + tl.arange(0, BK)[None, :]
        of_columns = column_factors(norm, column_scale, columns, columns < last * CODES, DTYPE)
    if ZERO == INTEGER_ZERO and GROUP == 0:
        of_row = (zero_codes(zero, row, row * 0, zero_stride, KIND) / UNIT).to(DTYPE)[:, None]
    for at in range(first, last, BW):
        inside = at + w[None, :] < last
        packed = tl.load(data + row[:, None] * words + (at + w[None, :]), mask=inside, other=0)
        columns = at * CODES + tl.arange(0, BK)[None, :]
        xs = tl.load(x + m[:, None] * K + columns, mask=(m[:, None] < M) & (columns < last * CODES), other=0)
        if LATER and not BY_PART:
            squares += tl.sum(xs.to(tl.float32) * xs.to(tl.float32), 1)
        if CHANGED:
            xs = prepared(xs, factor, of_columns, LATER and not BY_PART)
            of_columns = column_factors(norm, column_scale, columns + BK, columns + BK < last * CODES, DTYPE)
        xs = planes_of(xs, PLANES)
        looked = looked_up(packed, table, KIND, DTYPE, PRMT)
        scales = 1.0
        if GROUP == 0:
            zeros = of_row if ZERO == INTEGER_ZERO else 0.0
        elif GROUP >= BK:
            block = at * CODES // GROUP
            sums = tl.zeros((BM, BN), tl.float32)
            scales = _scales(scale, outer, row, block, scale_stride, outer_stride, SCALE)
            zeros = 0.0
            if ZERO == INTEGER_ZERO:
                zeros = (zero_codes(zero, row, block, zero_stride, KIND) / UNIT).to(DTYPE)[:, None]
        else:
            NG: tl.constexpr = BK // GROUP
            GROUP_WORDS: tl.constexpr = GROUP // CODES
            block = tl.minimum(at * CODES // GROUP + tl.arange(0, NG)[None, :], blocks - 1)
            scales = _scales(scale, outer, row[:, None], block, scale_stride, outer_stride, SCALE)
            if DTYPE == tl.bfloat16:
                scales = scales.to(DTYPE)
            scales = for_words(scales, GROUP_WORDS)
            zeros = 0.0
            if ZERO == INTEGER_ZERO:
                zeros = zero_codes(zero, row[:, None], block, zero_stride, KIND) / UNIT
                zeros = for_words(zeros.to(DTYPE), GROUP_WORDS)
        for plane in tl.static_range(PLANES):
            values = plane_values(looked[plane], zeros, scales, plane, KIND, DTYPE, GROUP > 0 and GROUP < BK)
            if GROUP == 0:
                acc = tl.dot(xs[plane], tl.trans(values), acc)
            elif GROUP >= BK:
                sums = tl.dot(xs[plane], tl.trans(values), sums)
            else:
                acc = tl.dot(xs[plane], tl.trans(values), acc)
        if GROUP >= BK:
            acc += sums * scales[None, :]
    if GROUP == 0 and scale is not None:
        acc *= _scales(scale, outer, row, row * 0, scale_stride, outer_stride, SCALE)[None, :]
    if BY_PART:
        squares = found
        acc /= factor
    finish(acc * UNIT, squares, eps, bias, residual, partial, counters, y, m, n, there, M, N, K,
           LATER, SPLIT, GATE)  # fmt: skip
