"""What linear does beside the product, in registers: x is normalized as it is loaded, sums get their bias, gate and residual."""

from __future__ import annotations

import triton
import triton.language as tl

NO_GATE, SILU, GELU, GELU_TANH = (tl.constexpr(i) for i in range(4))
#: Name of a gate in qpass.ops.around -> its number here.
NUMBERS = {"": NO_GATE.value, "silu": SILU.value, "gelu": GELU.value, "gelu_tanh": GELU_TANH.value}


# --- before the product -----------------------------------------------------------------------------------------------


@triton.jit
def row_factors(x, eps, M, K, ROWS: tl.constexpr, BM: tl.constexpr):
    """1 / sqrt(mean(x^2) + eps) of the rows of x [M, K], of which there are ROWS at most, a power of two: [BM]."""
    COLUMNS: tl.constexpr = 4096 // ROWS
    r = tl.arange(0, ROWS)
    squares = tl.zeros((ROWS, COLUMNS), tl.float32)
    for at in range(0, K, COLUMNS):
        c = at + tl.arange(0, COLUMNS)[None, :]
        values = tl.load(x + r[:, None] * K + c, mask=(r[:, None] < M) & (c < K), other=0).to(tl.float32)
        squares += values * values
    factors = tl.rsqrt(tl.sum(squares, 1) / K + eps)
    mine = tl.arange(0, BM)[:, None] == r[None, :]
    return tl.sum(tl.where(mine, factors[None, :], 0.0), 1)


@triton.jit
def prepared(xs, factors, eps, norm, column_scale, columns, inside):
    """Loaded elements of x times what their rows, and their columns, are multiplied by: in float32, then in their type."""
    if eps is not None or norm is not None or column_scale is not None:
        values = xs.to(tl.float32)
        if eps is not None:
            values *= factors
        if norm is not None:
            values *= tl.load(norm + columns, mask=inside, other=0).to(tl.float32)
        if column_scale is not None:
            values *= tl.load(column_scale + columns, mask=inside, other=0).to(tl.float32)
        xs = values.to(xs.dtype)
    return xs


@triton.jit
def norm_kernel(x, eps, norm, column_scale, y, K, COLUMNS: tl.constexpr):
    """x [rows, K] -> y, a program for each row: for a product of so many rows that its programs do not all do it again."""
    x += tl.program_id(0).to(tl.int64) * K
    y += tl.program_id(0).to(tl.int64) * K
    factor = 1.0
    if eps is not None:
        factor = row_factors(x, eps, 1, K, 1, 1)
    for at in range(0, K, COLUMNS):
        c = at + tl.arange(0, COLUMNS)
        xs = tl.load(x + c, mask=c < K, other=0)
        tl.store(y + c, prepared(xs, factor, eps, norm, column_scale, c, c < K), mask=c < K)


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
def finish(acc, bias, residual, partial, counters, y, m, n, there, M, N, SPLIT: tl.constexpr, GATE: tl.constexpr):
    """Sums [BM, BN] of a program to y [M, N], or [M, N / 2] with a gate; of SPLIT programs the last adds up what all have
    written. `n`, `there`: what weight_rows gives."""
    if SPLIT > 1:
        stored = (m[:, None] < M) & there[None, :]
        place = m[:, None] * N + n[None, :]
        tl.store(partial + tl.program_id(1) * M * N + place, acc, mask=stored)
        tl.debug_barrier()  # every thread has written before one of them says so
        mine = counters + tl.program_id(0)
        if tl.atomic_add(mine, 1, sem="acq_rel", scope="gpu") == SPLIT - 1:
            acc = tl.zeros_like(acc)
            for part in range(SPLIT):
                acc += tl.load(partial + part * M * N + place, mask=stored, other=0, cache_modifier=".cg")
            tl.store(mine, 0)
            _store(acc, bias, residual, y, m, n, there, M, N, GATE)
    else:
        _store(acc, bias, residual, y, m, n, there, M, N, GATE)


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
