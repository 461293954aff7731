"""New tokens into a quantized cache, in one kernel: rotary embedding of queries and keys, codes of keys and values, length."""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.quantizing import write_rows


@triton.jit
def _place(i, heads, new, by_batch, by_head, by_token):
    """Where row i of [B, heads, new] is in memory, counted in elements."""
    head = i // new
    return head // heads * by_batch + head % heads * by_head + i % new * by_token


@triton.jit
def _loaded(x, at, exists, cos, sin, angle, columns, COLUMNS: tl.constexpr):
    """Rows of x at `at` [R, 1], rotated by the rows of cos and sin at `angle` if there are any: rounded once, to their type."""
    c = tl.arange(0, COLUMNS)[None, :]
    real = exists & (c < columns)
    values = tl.load(x + at + c, mask=real, other=0)
    if cos is not None:
        half = columns // 2
        other = tl.load(x + at + tl.where(c < half, c + half, c - half), mask=real, other=0).to(tl.float32)
        straight = values.to(tl.float32) * tl.load(cos + angle + c, mask=real, other=0).to(tl.float32)
        crossed = tl.where(c < half, -other, other) * tl.load(sin + angle + c, mask=real, other=0).to(tl.float32)
        values = (straight + crossed).to(values.dtype)
    return values


@triton.jit
def append_kernel(
    queries, keys, values, cos, sin, turned_queries, turned_keys, length, before, counter,
    k_data, k_scale, k_zero, k_outer, k_given, k_middles, v_data, v_scale, v_zero, v_outer, v_given, v_middles,
    batches, query_heads, heads, new, capacity, k_columns, v_columns,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, angle_batch, angle_token,
    k_width, k_blocks, k_zero_width, v_width, v_blocks, v_zero_width,
    K_KIND: tl.constexpr, K_BITS: tl.constexpr, K_FROM: tl.constexpr, K_LOW: tl.constexpr, K_HIGH: tl.constexpr,
    K_GROUP: tl.constexpr, K_SCALE: tl.constexpr, K_TINY: tl.constexpr, K_EMAX: tl.constexpr, K_CEIL: tl.constexpr,
    K_SYMMETRIC: tl.constexpr, K_FLOAT_ZERO: tl.constexpr, K_MIDDLES: tl.constexpr, K_SIGNED: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    V_KIND: tl.constexpr, V_BITS: tl.constexpr, V_FROM: tl.constexpr, V_LOW: tl.constexpr, V_HIGH: tl.constexpr,
    V_GROUP: tl.constexpr, V_SCALE: tl.constexpr, V_TINY: tl.constexpr, V_EMAX: tl.constexpr, V_CEIL: tl.constexpr,
    V_SYMMETRIC: tl.constexpr, V_FLOAT_ZERO: tl.constexpr, V_MIDDLES: tl.constexpr, V_SIGNED: tl.constexpr,
    V_COLUMNS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """keys, values [batches, heads, new, *] with the strides that are given -> rows length .. length + new - 1 of the contiguous
    parts [batches, heads, capacity, *]; `length` grows by `new`, `before` [] gets what it was.

    With cos and sin, keys and queries [batches, query_heads, new, k_columns] are rotated before, and written out as they are
    then, contiguous. A program takes ROWS rows of keys, of values or of queries. The last to finish, which `counter` tells, an
    int32 that is 0 before and after, writes the length: all others have read it. Past the capacity nothing is written.
    """
    start = tl.load(length)
    fits = start + new <= capacity
    rows = batches * heads * new
    parts = tl.cdiv(rows, ROWS)
    program = tl.program_id(0)
    local = tl.arange(0, ROWS)[:, None]
    if program < parts:
        i = program.to(tl.int64) * ROWS + local
        angle = i // new // heads * angle_batch + i % new * angle_token
        at = _place(i, heads, new, k_batch, k_head, k_token)
        turned = _loaded(keys, at, i < rows, cos, sin, angle, k_columns, K_COLUMNS)
        if cos is not None:
            c = tl.arange(0, K_COLUMNS)[None, :]
            tl.store(turned_keys + i * k_columns + c, turned, mask=(i < rows) & (c < k_columns))
        write_rows(turned.to(tl.float32), i // new * capacity + start + i % new, (i < rows) & fits, i // new % heads,
                   k_data, k_scale, k_zero, k_outer, k_given, k_middles, k_columns, k_width, k_blocks, k_zero_width,
                   K_KIND, K_BITS, K_FROM, K_LOW, K_HIGH, K_GROUP, K_SCALE, K_TINY, K_EMAX, K_CEIL, K_SYMMETRIC, K_FLOAT_ZERO,
                   K_MIDDLES, K_SIGNED, K_COLUMNS)  # fmt: skip
    elif program < 2 * parts:
        i = (program - parts).to(tl.int64) * ROWS + local
        at = _place(i, heads, new, v_batch, v_head, v_token)
        taken = _loaded(values, at, i < rows, None, None, 0, v_columns, V_COLUMNS)
        write_rows(taken.to(tl.float32), i // new * capacity + start + i % new, (i < rows) & fits, i // new % heads,
                   v_data, v_scale, v_zero, v_outer, v_given, v_middles, v_columns, v_width, v_blocks, v_zero_width,
                   V_KIND, V_BITS, V_FROM, V_LOW, V_HIGH, V_GROUP, V_SCALE, V_TINY, V_EMAX, V_CEIL, V_SYMMETRIC, V_FLOAT_ZERO,
                   V_MIDDLES, V_SIGNED, V_COLUMNS)  # fmt: skip
    elif cos is not None:
        i = (program - 2 * parts).to(tl.int64) * ROWS + local
        exists = i < batches * query_heads * new
        angle = i // new // query_heads * angle_batch + i % new * angle_token
        at = _place(i, query_heads, new, q_batch, q_head, q_token)
        turned = _loaded(queries, at, exists, cos, sin, angle, k_columns, K_COLUMNS)
        c = tl.arange(0, K_COLUMNS)[None, :]
        tl.store(turned_queries + i * k_columns + c, turned, mask=exists & (c < k_columns))
    tl.debug_barrier()  # every thread has read the length before one of them says so
    if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.store(counter, 0)
        tl.store(before, start)
        tl.store(length, tl.where(fits, start + new, start))
    tl.device_assert(fits, "the KV cache is too short for the tokens that arrive")
