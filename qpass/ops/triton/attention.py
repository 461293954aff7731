"""A few queries against a stored cache: softmax(q K^T scale + mask) V, with K and V made floats in registers, block by block.

A program takes the query heads that share one head of the cache, and a part of its tokens. The last of them to finish joins the
parts in a fixed order (Dao et al. 2023, Flash-Decoding). Tokens that are there as floats too have a program of their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qpass.ops.triton.unpacking import (
    E4M3,
    E5M2,
    for_words,
    looked_up,
    plane_values,
    planes_of,
    scale_values,
    zero_codes,
)

LOG2_E = tl.constexpr(1.4426950408889634)
NO_MASK, BOOL_MASK, FLOAT_MASK = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _block_scales(scale, token, width, NG: tl.constexpr, GROUP: tl.constexpr, PLANES: tl.constexpr, SCALE: tl.constexpr,
                  DTYPE: tl.constexpr):  # fmt: skip
    """float32 scales of whole tokens [S]; of groups for each word [S, W], as plane_values takes them."""
    if GROUP > 0:
        block = tl.minimum(tl.arange(0, NG)[None, :], width - 1)
        scales = scale_values(tl.load(scale + token[:, None] * width + block), 1.0, SCALE)
        if DTYPE == tl.bfloat16:
            scales = scales.to(DTYPE)
        scales = for_words(scales, GROUP // (2 * PLANES))
    else:
        scales = scale_values(tl.load(scale + token), 1.0, SCALE)
    return scales


@triton.jit
def _zeros_of(zero, token, blocks, zero_width, NG: tl.constexpr, KIND: tl.constexpr, PLANES: tl.constexpr, GROUP: tl.constexpr,
              UNIT: tl.constexpr, DTYPE: tl.constexpr, FLOAT: tl.constexpr):  # fmt: skip
    """Zero points as plane_values takes them: [S, 1], or for each word. FLOAT: they are stored as such."""
    block = token[:, None] * 0
    if GROUP > 0:
        block = tl.minimum(tl.arange(0, NG)[None, :], blocks - 1)
    if FLOAT:
        zeros = tl.load(zero + token[:, None] * zero_width + block).to(tl.float32)
    else:
        zeros = zero_codes(zero, token[:, None], block, zero_width, KIND)
    zeros = (zeros / UNIT).to(DTYPE)
    if GROUP > 0:
        zeros = for_words(zeros, GROUP // (2 * PLANES))
    return zeros


@triton.jit
def _numbers(values, KIND: tl.constexpr, CAST: tl.constexpr):
    """Bits of 8-bit floats that are no number come out too large; scaled, their scale is none either."""
    if CAST and KIND == E4M3:
        values = tl.where(tl.abs(values) > 448.0, float("nan"), values)
    elif CAST and KIND == E5M2:
        values = tl.where(tl.abs(values) > 57344.0, float("nan"), values)
    return values


@triton.jit
def _masked(scores, token, there, mask, mask_row, mask_token, query, soft_cap, SOFT_CAP: tl.constexpr, MASK: tl.constexpr,
            ONE_ROW: tl.constexpr, CAUSAL: tl.constexpr):  # fmt: skip
    """Scores [R, S] in powers of two, -inf where a query does not see a token. mask_row: where rows begin, [R], or the one."""
    if SOFT_CAP:
        scores = soft_cap * (2 * tl.sigmoid(2 * scores / soft_cap) - 1)
    scores *= LOG2_E
    seen = there[None, :]
    if CAUSAL:
        seen = seen & (token[None, :] <= query[:, None])
    if MASK != NO_MASK:
        if ONE_ROW:
            given = tl.load(mask + mask_row + token * mask_token, mask=there, other=0)[None, :]
        else:
            given = tl.load(mask + mask_row[:, None] + token[None, :] * mask_token, mask=there[None, :], other=0)
        if MASK == BOOL_MASK:
            seen = seen & (given != 0)
        else:
            given = given.to(tl.float32)
            finite = tl.maximum(
                given * LOG2_E, -3.0e38
            )  # the least float is not minus infinity: it hides nothing from itself
            scores += tl.where(given == -float("inf"), given, finite)
    return tl.where(seen, scores, -float("inf"))


@triton.jit
def _step(scores, top, total):
    """One step of the softmax: (weights [R, S], by how much earlier sums shrink [R], new top [R], new total [R])."""
    higher = tl.maximum(top, tl.max(scores, 1))
    safe = tl.where(higher == -float("inf"), 0.0, higher)
    weights = tl.exp2(scores - safe[:, None])
    shrink = tl.exp2(top - safe)
    return weights, shrink, higher, total * shrink + tl.sum(weights, 1)


@triton.jit
def _added(sums, shrink, weights, values, above, TAKEN_OUT: tl.constexpr):
    """sums shrink + weights values, times what was taken out of the weights."""
    if TAKEN_OUT:
        sums = sums * shrink[:, None] + tl.dot(weights, values) * above
    else:
        sums = tl.dot(weights, values, sums * shrink[:, None])
    return sums


@triton.jit
def _visible(
    mask, mask_row, mask_token, first, last, real, MASK: tl.constexpr, ONE_ROW: tl.constexpr, SIZE: tl.constexpr
):
    """The part of tokens `first` .. `last` - 1 outside of which no query sees any."""
    hidden: tl.constexpr = 0 if MASK == BOOL_MASK else -float("inf")
    low = last
    high = first
    for at in range(first, last, SIZE):
        token = at + tl.arange(0, SIZE)
        if ONE_ROW:
            seen = tl.load(mask + mask_row + token * mask_token, mask=token < last, other=hidden) != hidden
        else:
            inside = real[:, None] & (token < last)[None, :]
            given = tl.load(mask + mask_row[:, None] + token[None, :] * mask_token, mask=inside, other=hidden)
            seen = tl.max((given != hidden).to(tl.int32), 0) != 0
        low = tl.minimum(low, tl.min(tl.where(seen, token, last), 0))
        high = tl.maximum(high, tl.max(tl.where(seen, token + 1, first), 0))
    return low, high


@triton.jit
def _float_tokens(
    qs, k_first, v_first, k_last, v_last, mask, sums_out, mask_row, mask_token, query, real,
    head, begin, tokens, firsts, lasts, factor, soft_cap,
    MASK: tl.constexpr, ONE_ROW: tl.constexpr, CAUSAL: tl.constexpr, SOFT_CAP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """The part of the first tokens and of those from `begin` on, of which there are floats: writes sums, gives top and total.
    k_last, v_last: those of this head."""
    top = tl.full((R,), -float("inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    sums = tl.zeros((R, BV), tl.float32)
    d, c, r = tl.arange(0, BD)[None, :], tl.arange(0, BV)[None, :], tl.arange(0, R)
    for at in range(0, firsts + lasts, S):
        i = at + tl.arange(0, S)
        of_first = i < firsts
        token = tl.where(of_first, i, begin + i - firsts)
        there = (token < tokens) & (i < firsts + lasts) & ~(of_first & (token >= begin) & (token < begin + lasts))
        row = (i - firsts)[:, None]
        late = (there & ~of_first)[:, None]
        keys = tl.load(k_last + row * D + d, mask=late & (d < D), other=0)
        values = tl.load(v_last + row * DV + c, mask=late & (c < DV), other=0)
        if k_first is not None:
            row = (head * firsts + i)[:, None]
            early = (there & of_first)[:, None]
            keys += tl.load(k_first + row * D + d, mask=early & (d < D), other=0)
            values += tl.load(v_first + row * DV + c, mask=early & (c < DV), other=0)
        scores = tl.dot(qs, tl.trans(keys)) * factor
        scores = _masked(
            scores, token, there, mask, mask_row, mask_token, query, soft_cap, SOFT_CAP, MASK, ONE_ROW, CAUSAL
        )
        weights, shrink, top, total = _step(scores, top, total)
        sums = sums * shrink[:, None] + tl.dot(weights.to(qs.dtype), values)
    tl.store(sums_out + r[:, None] * DV + c, sums, mask=real[:, None] & (c < DV))
    return top, total


@triton.jit
def attention_kernel(
    q, k_data, k_scale, k_zero, v_data, v_scale, v_zero, table, mask, k_first, v_first, k_last, v_last, start, sinks, y,
    part_sums, part_tops, part_totals, counters,
    heads, tokens, chunk, firsts, lasts, factor, soft_cap,
    k_batch, k_head, ks_batch, ks_head, kz_batch, kz_head, k_words, k_blocks, k_zero_width,
    v_batch, v_head, vs_batch, vs_head, vz_batch, vz_head, v_words, v_blocks, v_zero_width,
    mask_batch, mask_head, mask_query, mask_token, k_last_batch, v_last_batch,
    K_KIND: tl.constexpr, K_PLANES: tl.constexpr, K_UNIT: tl.constexpr, K_GROUP: tl.constexpr, K_SCALE: tl.constexpr,
    V_KIND: tl.constexpr, V_PLANES: tl.constexpr, V_UNIT: tl.constexpr, V_GROUP: tl.constexpr, V_SCALE: tl.constexpr,
    PRMT: tl.constexpr, K_CAST: tl.constexpr, V_CAST: tl.constexpr, MASK: tl.constexpr, ONE_ROW: tl.constexpr,
    CAUSAL: tl.constexpr, SOFT_CAP: tl.constexpr, FLOATS: tl.constexpr, PARTS: tl.constexpr, QUERIES: tl.constexpr,
    GROUPS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr, S: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    SCAN: tl.constexpr, JOIN: tl.constexpr, K_FOURS: tl.constexpr, V_FOURS: tl.constexpr, K_TOKENS: tl.constexpr,
    K_FLOAT_ZERO: tl.constexpr, V_FLOAT_ZERO: tl.constexpr,
):  # fmt: skip
    """q [B, heads * GROUPS, QUERIES, D], caches [B, heads, tokens, *] with strides of batches and heads, data as 32-bit words.

    PARTS programs share the tokens, `chunk` each; with FLOATS, the last of them has the float tokens instead: k_first
    [B, heads, firsts, D], k_last [B, heads, lasts, D] from token `start` on, sequences `k_last_batch` apart. R: rows of a
    program, padded; S: tokens at a time. K_FOURS, V_FOURS: words, and strides of data, are counted in fours, as in linear.py.
    K_TOKENS: so many tokens have scales [D] together, and zero points if there are any; as many as S, or 0.
    """
    if K_FOURS:
        k_words, k_head, k_batch = k_words * 4, k_head * 4, k_batch * 4
    if V_FOURS:
        v_words, v_head, v_batch = v_words * 4, v_head * 4, v_batch * 4
    DTYPE: tl.constexpr = q.dtype.element_ty
    WK: tl.constexpr = BD // (2 * K_PLANES)
    WV: tl.constexpr = BV // (2 * V_PLANES)
    CV: tl.constexpr = BV // V_PLANES
    K_NG: tl.constexpr = BD // K_GROUP if K_GROUP > 0 else 1
    V_NG: tl.constexpr = BV // V_GROUP if V_GROUP > 0 else 1
    b = (tl.program_id(0) // heads).to(tl.int64)
    h = (tl.program_id(0) % heads).to(tl.int64)
    part = tl.program_id(1)
    r = tl.arange(0, R)
    real = r < GROUPS * QUERIES
    query = r % QUERIES
    row = (b * heads + h) * GROUPS * QUERIES + r
    head = h * GROUPS + r // QUERIES
    mask_row = b * mask_batch + head * mask_head + query * mask_query
    mask_row = b * mask_batch if ONE_ROW else tl.where(real, mask_row, 0)
    begin = tokens
    if FLOATS:
        begin = tl.load(start).to(tl.int32)
    end = begin + lasts
    d = tl.arange(0, BD)
    qs = tl.load(q + row[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0)
    top = tl.full((R,), -float("inf"), tl.float32)
    total = tl.zeros((R,), tl.float32)
    place = (tl.program_id(0).to(tl.int64) * PARTS + part) * R
    if FLOATS and part == PARTS - 1:
        top, total = _float_tokens(
            qs, k_first, v_first, k_last + b * k_last_batch + h * lasts * D, v_last + b * v_last_batch + h * lasts * DV,
            mask, part_sums + place * DV, mask_row, mask_token, query, real, b * heads + h, begin, tokens, firsts, lasts,
            factor, soft_cap, MASK, ONE_ROW, CAUSAL, SOFT_CAP, D, DV, R, S, BD, BV,
        )  # fmt: skip
    else:
        first = part * chunk
        last = tl.minimum(first + chunk, tokens)
        if MASK != NO_MASK:
            first, last = _visible(mask, mask_row, mask_token, first, last, real, MASK, ONE_ROW, SCAN)
            if K_TOKENS > 0:
                first = first // K_TOKENS * K_TOKENS
        k_data += b * k_batch + h * k_head
        v_data += b * v_batch + h * v_head
        q0, q1, q2, q3 = planes_of(qs, K_PLANES)
        planes = (q0, q1, q2, q3)
        wk = tl.arange(0, WK)
        wv = tl.arange(0, WV)
        v0 = tl.zeros((R, CV), tl.float32)
        v1 = tl.zeros((R, CV), tl.float32)
        v2 = tl.zeros((R, CV), tl.float32)
        v3 = tl.zeros((R, CV), tl.float32)
        # Of float16, which has few small numbers, the largest scale of a block is taken out of its weights.
        TAKEN_OUT: tl.constexpr = DTYPE == tl.float16 and V_GROUP == 0 and v_scale is not None
        above = 1.0
        for at in range(first, last, S):
            token = at + tl.arange(0, S)
            there = token < last
            token = tl.minimum(token, last - 1)
            if FLOATS:
                there = there & (token >= firsts) & ((token < begin) | (token >= end))
            kp = tl.load(k_data + token[:, None] * k_words + wk[None, :], mask=(wk < k_words)[None, :], other=0)
            vp = tl.load(v_data + token[:, None] * v_words + wv[None, :], mask=(wv < v_words)[None, :], other=0)
            scores = tl.zeros((R, S), tl.float32)
            if K_TOKENS > 0:  # q k = (q scale) (code - zero)
                of_group = at // K_TOKENS * D + d
                group_scale = tl.load(k_scale + b * ks_batch + h * ks_head + of_group, mask=d < D, other=0).to(
                    tl.float32
                )
                scaled = (qs * group_scale[None, :]).to(DTYPE)
                q0, q1, q2, q3 = planes_of(scaled, K_PLANES)
                planes = (q0, q1, q2, q3)
                if k_zero is not None:
                    group_zero = tl.load(k_zero + b * kz_batch + h * kz_head + of_group, mask=d < D, other=0).to(
                        tl.float32
                    )
                    scores -= tl.sum(scaled.to(tl.float32) * group_zero[None, :], 1)[:, None] / K_UNIT
            if k_zero is None or K_TOKENS > 0:
                kz = 0.0
            else:
                kz = _zeros_of(k_zero + b * kz_batch + h * kz_head, token, k_blocks, k_zero_width, K_NG, K_KIND,
                               K_PLANES, K_GROUP, K_UNIT, DTYPE, K_FLOAT_ZERO)  # fmt: skip
            kp = looked_up(kp, table, K_KIND, DTYPE, PRMT)
            k_scales = 1.0
            if k_scale is not None and K_TOKENS == 0:
                k_scales = _block_scales(
                    k_scale + b * ks_batch + h * ks_head, token, k_blocks, K_NG, K_GROUP, K_PLANES, K_SCALE, DTYPE
                )
            for plane in tl.static_range(K_PLANES):
                values = plane_values(kp[plane], kz, k_scales, plane, K_KIND, DTYPE, K_GROUP > 0)
                values = _numbers(values, K_KIND, K_CAST)
                scores = tl.dot(planes[plane], tl.trans(values), scores)
            scores *= factor * K_UNIT
            if K_GROUP == 0 and K_TOKENS == 0 and k_scale is not None:
                scores *= k_scales[None, :]
            scores = _masked(
                scores, token, there, mask, mask_row, mask_token, query, soft_cap, SOFT_CAP, MASK, ONE_ROW, CAUSAL
            )
            weights, shrink, top, total = _step(scores, top, total)
            v_scales = 1.0
            if v_scale is not None:
                v_scales = _block_scales(
                    v_scale + b * vs_batch + h * vs_head, token, v_blocks, V_NG, V_GROUP, V_PLANES, V_SCALE, DTYPE
                )
            if TAKEN_OUT:
                above = tl.max(v_scales, 0)
                above = tl.where(above == 0, 1.0, above)
                weights *= (v_scales / above)[None, :]
            elif V_GROUP == 0 and v_scale is not None:
                weights *= v_scales[None, :]
            weights = weights.to(DTYPE)
            if v_zero is None:
                vz = 0.0
            else:
                vz = _zeros_of(v_zero + b * vz_batch + h * vz_head, token, v_blocks, v_zero_width, V_NG, V_KIND,
                               V_PLANES, V_GROUP, V_UNIT, DTYPE, V_FLOAT_ZERO)  # fmt: skip
            vp = looked_up(vp, table, V_KIND, DTYPE, PRMT)
            for plane in tl.static_range(V_PLANES):
                values = plane_values(vp[plane], vz, v_scales, plane, V_KIND, DTYPE, V_GROUP > 0)
                values = _numbers(values, V_KIND, V_CAST)
                if plane == 0:
                    v0 = _added(v0, shrink, weights, values, above, TAKEN_OUT)
                elif plane == 1:
                    v1 = _added(v1, shrink, weights, values, above, TAKEN_OUT)
                elif plane == 2:
                    v2 = _added(v2, shrink, weights, values, above, TAKEN_OUT)
                else:
                    v3 = _added(v3, shrink, weights, values, above, TAKEN_OUT)
        sums = (v0, v1, v2, v3)
        c = tl.arange(0, CV)
        for plane in tl.static_range(V_PLANES):  # column c of a plane: of word c // 2, its lower or its upper half
            column = (c // 2) * (2 * V_PLANES) + (c % 2) * V_PLANES + plane
            tl.store(part_sums + (place + r)[:, None] * DV + column[None, :], sums[plane] * V_UNIT,
                     mask=real[:, None] & (column < DV)[None, :])  # fmt: skip
    tl.store(part_tops + place + r, top)
    tl.store(part_totals + place + r, total)
    tl.debug_barrier()  # every thread has written before one of them says so
    mine = counters + tl.program_id(0)
    if tl.atomic_add(mine, 1, sem="acq_rel", scope="gpu") == PARTS - 1:
        tl.store(mine, 0)
        whole = tl.program_id(0).to(tl.int64) * PARTS * R
        _join(part_sums, part_tops, part_totals, sinks, y, row, head, real, whole, PARTS, R, DV, BV, JOIN)


@triton.jit
def _join(part_sums, part_tops, part_totals, sinks, y, row, head, real, place, PARTS: tl.constexpr, R: tl.constexpr,
          DV: tl.constexpr, BV: tl.constexpr, JOIN: tl.constexpr):  # fmt: skip
    """The parts of R rows, JOIN at a time, in order."""
    r = tl.arange(0, R)
    c = tl.arange(0, BV)
    top = tl.full((R,), -float("inf"), tl.float32)
    if sinks is not None:
        top = tl.load(sinks + head, mask=real, other=0).to(tl.float32) * LOG2_E
    for at in range(0, PARTS, JOIN):
        p = at + tl.arange(0, JOIN)
        tops = tl.load(part_tops + place + p[:, None] * R + r[None, :], mask=(p < PARTS)[:, None], other=-float("inf"),
                       cache_modifier=".cg")  # fmt: skip
        top = tl.maximum(top, tl.max(tops, 0))
    safe = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros((R,), tl.float32)
    if sinks is not None:
        total = tl.exp2(tl.load(sinks + head, mask=real, other=0).to(tl.float32) * LOG2_E - safe)
    sums = tl.zeros((R, BV), tl.float32)
    for at in range(0, PARTS, JOIN):
        p = at + tl.arange(0, JOIN)
        where = place + p[:, None] * R + r[None, :]
        inside = (p < PARTS)[:, None] & real[None, :]
        tops = tl.load(part_tops + where, mask=inside, other=-float("inf"), cache_modifier=".cg")
        weight = tl.exp2(tops - safe[None, :])
        total += tl.sum(weight * tl.load(part_totals + where, mask=inside, other=0, cache_modifier=".cg"), 0)
        whole = inside[:, :, None] & (c < DV)[None, None, :]
        of_part = tl.load(part_sums + where[:, :, None] * DV + c, mask=whole, other=0, cache_modifier=".cg")
        sums += tl.sum(of_part * weight[:, :, None], 0)
    sums /= tl.where(total == 0, 1.0, total)[:, None]
    tl.store(y + row[:, None] * DV + c[None, :], sums.to(y.dtype.element_ty), mask=real[:, None] & (c < DV)[None, :])
