"""Products of integer codes -> floats: zero points, both scales and the bias in one reading of the sums."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rescale_kernel(
    total, x_scale, x_zero, row_sums, scale, zero, column_sums, bias, y, N, K, x_stride, stride, COLUMNS: tl.constexpr
):
    """`total` [M, N] int32 -> y [M, N], a program for some columns of a row: (total - x_zero * column_sums - (row_sums -
    K * x_zero) * zero) * x_scale * scale + bias. Of rows: x_scale, x_zero; of columns: scale, zero; strides 0 where there is one
    for all. `row_sums` [M] of the input's codes, `column_sums` [N] of the weight's. What is not there is None."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = c < N
    sums = tl.load(total + row * N + c, mask=inside, other=0)
    above = 0
    if x_zero is not None:
        above = tl.load(x_zero + row * x_stride).to(tl.int32)
        sums -= above * tl.load(column_sums + c, mask=inside, other=0)
    if zero is not None:
        of_row = tl.load(row_sums + row) - K * above
        sums -= of_row * tl.load(zero + c * stride, mask=inside, other=0).to(tl.int32)
    values = sums.to(tl.float32) * tl.load(x_scale + row * x_stride)
    values *= tl.load(scale + c * stride, mask=inside, other=0).to(tl.float32)
    if bias is not None:
        values += tl.load(bias + c, mask=inside, other=0).to(tl.float32)
    tl.store(y + row * N + c, values.to(y.dtype.element_ty), mask=inside)
