"""What linear does beside the product, in registers: x is normalized as it is loaded, sums get their bias, gate and residual."""

from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, SILU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(4))
#: Name of a gate in qpass.ops.around -> its number here.
NUMBERS = {"": NO_GATE.value, "silu": SILU.value, "gelu": GELU.value, "gelu_tanh": GELU_TANH.value}


# --- before the product -----------------------------------------------------------------------------------------------


@triton.jit
def row_factor(x, eps, K, BM: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of a row x [K]: [BM], of which the others are 0.

    Not as one number: of that the compiler lets each thread multiply all that its product needs, not each its part of a tile.
    """
    squares = tl.zeros((1, 4096), tl.float32)
    for at in range(0, K, 4096):
        c = at + tl.arange(0, 4096)[None, :]
        values = tl.load(x + c, mask=c < K, other=0).to(tl.float32)
        squares += values * values
    factor = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    return tl.sum(tl.where(tl.arange(0, BM)[:, None] == tl.arange(0, 1)[None, :], factor[None, :], 0.0), 1)


@triton.jit
def squares_of(x, m, M, K, begin, end, BM: tl.constexpr):
    """Sums of squares of the rows `m` [BM] of x [M, K] over columns begin .. end - 1."""
    COLUMNS: tl.constexpr = 4096 // BM
    squares = tl.zeros((BM, COLUMNS), tl.float32)
    for at in range(begin, end, COLUMNS):
        c = at + tl.arange(0, COLUMNS)[None, :]
        values = tl.load(x + m[:, None] * K + c, mask=(m[:, None] < M) & (c < end), other=0).to(tl.float32)
        squares += values * values
    return tl.sum(squares, 1)


@triton.jit
def column_factors(norm, column_scale, columns, inside, DTYPE: tl.constexpr):
    """What the `columns` of x in DTYPE are multiplied by, a tensor of their shape: in DTYPE, if that is exact, or float32."""
    if norm is not None and column_scale is None and norm.dtype.element_ty == DTYPE:
        factors = tl.load(norm + columns, mask=inside, other=0)
    else:
        factors = tl.full(columns.shape, 1.0, tl.float32)
        if norm is not None:
            factors *= tl.load(norm + columns, mask=inside, other=0).to(tl.float32)
        if column_scale is not None:
            factors *= tl.load(column_scale + columns, mask=inside, other=0).to(tl.float32)
    return factors


@triton.jit
def prepared(xs, factor, of_columns, COLUMNS_ONLY: tl.constexpr):
    """Elements of x times what their columns, and, unless COLUMNS_ONLY, their rows are multiplied by, rounded once."""
    if COLUMNS_ONLY and of_columns.dtype == xs.dtype:
        xs = xs * of_columns
    else:
        xs = (xs.to(tl.float32) * factor * of_columns).to(xs.dtype)
    return xs


@triton.jit
def norm_kernel(x, eps, norm, column_scale, y, K, COLUMNS: tl.constexpr):
    """x [rows, K] -> y, a program for each row: for products that do not take it in."""
    x += tl.program_id(0).to(tl.int64) * K
    y += tl.program_id(0).to(tl.int64) * K
    factor = 1.0
    if eps is not None:
        factor = row_factor(x, eps, K, 1)
    for at in range(0, K, COLUMNS):
        c = at + tl.arange(0, COLUMNS)
        xs = tl.load(x + c, mask=c < K, other=0)
        of_columns = column_factors(norm, column_scale, c, c < K, xs.dtype)
        tl.store(y + c, prepared(xs, factor, of_columns, False), mask=c < K)


# --- after it ---------------------------------------------------------------------------------------------------------


@triton.jit
def weight_rows(N, BN: tl.constexpr, GATE: tl.constexpr):
    """The rows of the weight that a program takes, and which of them there are, [BN].

    With a gate they alternate between the halves: the two sums of an output lie beside each other, in one thread.
    """
    i = tl.arange(0, BN)
    if GATE == NO_GATE:
        n = tl.program_id(0) * BN + i
        there = n < N
    else:
        output = tl.program_id(0) * (BN // 2) + i // 2
        n = output + (i % 2) * (N // 2)
        there = output < N // 2
    return n, there


@triton.jit
def finish(acc, squares, eps, bias, residual, partial, counters, y, m, n, there, M, N, K,
           LATER: tl.constexpr, SPLIT: tl.constexpr, GATE: tl.constexpr):  # fmt: skip
    """Sums [BM, BN] of a program to y [M, N], or [M, N / 2] with a gate; of SPLIT programs the last adds up what all have
    written. `n`, `there`: what weight_rows gives. LATER: the norm is left to do, with the squares [BM] of what was read of x."""
    if SPLIT > 1:
        stored = (m[:, None] < M) & there[None, :]
        place = m[:, None] * N + n[None, :]
        beside = partial + SPLIT * M * N + tl.program_id(0) * SPLIT * M + m
        tl.store(partial + tl.program_id(1) * M * N + place, acc, mask=stored)
        if LATER:
            tl.store(beside + tl.program_id(1) * M, squares, mask=m < M)
        tl.debug_barrier()  # every thread has written before one of them says so
        mine = counters + tl.program_id(0)
        if tl.atomic_add(mine, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            acc = tl.zeros_like(acc)
            squares = tl.zeros_like(squares)
            for part in range(SPLIT):
                acc += tl.load(partial + part * M * N + place, mask=stored, other=0, cache_modifier=".cg")
                if LATER:
                    squares += tl.load(beside + part * M, mask=m < M, other=0, cache_modifier=".cg")
            tl.store(mine, 0)
            _store(_normed(acc, squares, eps, K, LATER), bias, residual, y, m, n, there, M, N, GATE)
    else:
        _store(_normed(acc, squares, eps, K, LATER), bias, residual, y, m, n, there, M, N, GATE)


@triton.jit
def _normed(acc, squares, eps, K, LATER: tl.constexpr):
    """Sums over all K columns of x, divided by the root of its mean square."""
    if LATER:
        acc *= tl.rsqrt(squares / K + eps)[:, None]
    return acc


@triton.jit
def _store(acc, bias, residual, y, m, n, there, M, N, GATE: tl.constexpr):
    BM: tl.constexpr = acc.shape[0]
    BN: tl.constexpr = acc.shape[1]
    if bias is not None:
        acc += tl.load(bias + n, mask=there, other=0).to(tl.float32)[None, :]
    if GATE == NO_GATE:
        out = n
        width = N
    else:
        first, second = tl.split(tl.reshape(acc, (BM, BN // 2, 2)))
        acc = _activated(first, GATE) * second
        out = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
        width = N // 2
    stored = (m[:, None] < M) & (out[None, :] < width)
    place = m[:, None] * width + out[None, :]
    if residual is not None:
        acc += tl.load(residual + place, mask=stored, other=0).to(tl.float32)
    tl.store(y + place, acc.to(y.dtype.element_ty), mask=stored)


@triton.jit
def _activated(x, GATE: tl.constexpr):
    if GATE == SILU:
        x = x * tl.sigmoid(x)
    elif GATE == GELU:
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:  # (1 + tanh(u)) / 2 is sigmoid(2 u)
        x = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return x
