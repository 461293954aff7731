"""The reference for the operators of a KV cache: tokens are appended quantized, and read dequantized by attention.

Results are contiguous, as those of reference.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.errors import QpassError
from qpass.ops.residual import append_residual, append_residual_fake
from qpass.ops.schemas import register
from qpass.packing import as_bytes


def read_cache(
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    columns: int,
    spec: str,
    dtype: torch.dtype,
    first: Tensor | None = None,
    last: Tensor | None = None,
    start: Tensor | None = None,
) -> Tensor:
    """Stored parts, and the tokens that are there as floats too -> [B, H, S, columns] in `dtype`."""
    values = torch.ops.qpass.dequantize(data, scale, zero_point, outer_scale, columns, spec, dtype)
    if first is not None:
        values[:, :, : first.shape[2]] = first.to(dtype)[:, :, : values.shape[2]]
    if last is not None:
        assert start is not None
        positions = torch.arange(last.shape[2], device=values.device) + start
        inside = positions < values.shape[2]  # what a residual window has beyond the end is not read
        if values.device.type == "cpu":
            values.index_copy_(2, positions[inside], last[:, :, inside].to(dtype))
        else:
            put_inside(values, positions, inside, last.to(dtype))
    return values


def put_inside(values: Tensor, positions: Tensor, inside: Tensor, last: Tensor) -> None:
    """values[:, :, positions] = last where `inside`, without asking the device how many these are: CUDA graphs allow no question.

    Positions outside write what the first one writes, once more; if that is outside too, what is at the end already.
    """
    if not len(positions):
        return
    end = values.shape[2] - 1
    first = torch.where(inside[0], last[:, :, :1], values[:, :, end:])
    values.index_copy_(
        2,
        torch.where(inside, positions, positions[0].clamp(max=end)),
        torch.where(inside[:, None], last, first),
    )


def _read_cache_fake(data: Tensor, scale: object, zero: object, outer: object, columns: int, spec: str, dtype: torch.dtype,
                     first: object = None, last: object = None, start: object = None) -> Tensor:  # fmt: skip
    return data.new_empty((*data.shape[:-1], columns), dtype=dtype)


def attention(
    q: Tensor,
    k_data: Tensor,
    k_scale: Tensor | None,
    k_zero_point: Tensor | None,
    k_outer_scale: Tensor | None,
    k_spec: str,
    v_data: Tensor,
    v_scale: Tensor | None,
    v_zero_point: Tensor | None,
    v_outer_scale: Tensor | None,
    v_columns: int,
    v_spec: str,
    mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    k_first: Tensor | None = None,
    v_first: Tensor | None = None,
    k_last: Tensor | None = None,
    v_last: Tensor | None = None,
    start: Tensor | None = None,
    soft_cap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, Q, D] against a quantized cache -> [B, Hq, Q, Dv]."""
    k_parts, v_parts = (k_data, k_scale, k_zero_point, k_outer_scale), (v_data, v_scale, v_zero_point, v_outer_scale)
    key = read_cache(*k_parts, q.shape[-1], k_spec, q.dtype, k_first, k_last, start)
    value = read_cache(*v_parts, v_columns, v_spec, q.dtype, v_first, v_last, start)
    if soft_cap or sinks is not None:
        return _written_out(q, key, value, mask, is_causal, scale, soft_cap, sinks)
    return F.scaled_dot_product_attention(
        q, key, value, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=key.shape[1] != q.shape[1]
    ).contiguous()


def _written_out(
    q: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, soft_cap: float,
    sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """softmax(capped(q k^T) + mask, with a score more for each head's sink) v, in float32."""
    groups = q.shape[1] // key.shape[1]
    key, value = (x.float().repeat_interleave(groups, 1) for x in (key, value))
    scores = q.float() @ key.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    if is_causal:
        scores = scores.masked_fill(
            ~torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(), -torch.inf
        )
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    top = scores.amax(-1, keepdim=True)
    if sinks is not None:
        sinks = sinks.float().view(1, -1, 1, 1)
        top = torch.maximum(top, sinks)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0))
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks - top)
    return (weights @ value / total.masked_fill(total == 0, 1)).to(q.dtype).contiguous()


def _attention_fake(q: Tensor, *arguments: Any, **_: Any) -> Tensor:
    return q.new_empty((*q.shape[:-1], arguments[_V_COLUMNS - 1]))


#: Position of `v_columns` among the arguments of attention.
_V_COLUMNS = list(attention.__code__.co_varnames).index("v_columns")


def append(
    k: list[Tensor],
    v: list[Tensor],
    length: Tensor,
    keys: Tensor,
    values: Tensor,
    k_spec: str,
    v_spec: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Keys and values [B, H, S, D] into their parts, behind the tokens that are there; gives the length before."""
    new = keys.shape[2]
    positions = cache_positions(length, new, k[0].shape[2])
    # In order, for of such rows binding.cpp remembers what kernel serves them.
    quantized = [
        torch.ops.qpass.quantize(states.contiguous(), spec, scale)
        for states, spec, scale in ((keys, k_spec, k_scale), (values, v_spec, v_scale))
    ]
    for parts, codes in zip((k, v), quantized, strict=True):
        for part, code in zip(parts, codes, strict=True):
            part.index_copy_(2, positions, as_bytes(code))
    before = length.clone()
    length.add_(new)
    return before


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, S, D], in its dtype: rounded once, as compilers do."""
    wide, cos, sin = (t.float() if t.dtype.itemsize == 2 else t for t in (x, cos, sin))
    first, second = wide.chunk(2, -1)
    return (wide * cos + torch.cat((-second, first), -1) * sin).to(x.dtype).contiguous()


def append_rotated(
    k: list[Tensor],
    v: list[Tensor],
    length: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """`append` of rotated keys; gives the length before, the rotated queries and keys."""
    q, keys = rotated(queries, cos, sin), rotated(keys, cos, sin)
    return torch.ops.qpass.append(k, v, length, keys, values, *rest), q, keys


def write_rotated(
    k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    """Rotated keys, and values, [B, H, S, D] to their positions in caches of floats; gives the rotated queries.

    Raises `QpassError` for a position that there is not, before anything is written.
    """
    capacity = min(k.shape[2], v.shape[2])
    wrong = positions[(positions < 0) | (positions >= capacity)]
    if wrong.numel():
        raise QpassError(
            f"a cache of {capacity} tokens has no position {int(wrong[0])}: make it longer (max_cache_len). It is unchanged."
        )
    k.index_copy_(2, positions, rotated(keys, cos, sin))
    v.index_copy_(2, positions, values)
    return rotated(queries, cos, sin)


def _write_rotated_fake(k: Tensor, v: Tensor, positions: Tensor, queries: Tensor, *rest: Any) -> Tensor:
    return queries.new_empty(queries.shape)


def _append_rotated_fake(
    k: list[Tensor], v: list[Tensor], length: Tensor, queries: Tensor, keys: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(length), queries.new_empty(queries.shape), keys.new_empty(keys.shape)


def _append_fake(k: list[Tensor], v: list[Tensor], length: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(length)


def cache_positions(length: Tensor, new: int, capacity: int) -> Tensor:
    """[] int64 -> [new]: where the next `new` tokens go. Raises `QpassError` before anything is written past the end."""
    positions = torch.arange(new, device=length.device) + length
    if length.device.type == "cpu":
        if int(length) + new > capacity:
            raise QpassError(
                f"KV cache of {capacity} tokens is too short: it holds {int(length)} and {new} more arrive; "
                f"make it with max_cache_len={int(length) + new} or more. The cache is unchanged."
            )
    else:  # no host synchronization on a GPU: the device asserts
        torch._assert_async(positions[-1] < capacity)
    return positions


def _cache_positions_fake(length: Tensor, new: int, capacity: int) -> Tensor:
    return length.new_empty((new,))


register("read_cache", read_cache, _read_cache_fake)
register("attention", attention, _attention_fake)
register("append", append, _append_fake)
register("append_residual", append_residual, append_residual_fake)
register("append_rotated", append_rotated, _append_rotated_fake)
register("write_rotated", write_rotated, _write_rotated_fake)
register("cache_positions", cache_positions, _cache_positions_fake)
