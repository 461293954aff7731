"""The reference for every operator: dequantize, then the float operation. Exact, on every device, not fast.

Results are contiguous whatever the strides of the inputs: Inductor checks them against the fakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.errors import QpassError
from qpass.numerics import dequantize as _dequantize
from qpass.numerics import quantize as _quantize
from qpass.ops.around import Around
from qpass.ops.residual import append_residual, append_residual_fake
from qpass.ops.schemas import BOUND, LIBRARY
from qpass.packing import as_bytes, packed_length
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.weights import row_range


def linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
    *rest: Any,
) -> Tensor:
    """[.., K] -> [.., N]: F.linear with the weight dequantized to x's dtype. `rest`: what Around takes."""
    weight = _dequantize(Quantized(data, scale, zero_point, outer_scale), parse_spec(spec), x.shape[-1], x.dtype)
    around = Around(*rest)
    return around.after(F.linear(around.before(x), weight, None if bias is None else bias.to(x.dtype))).contiguous()


def _linear_fake(x: Tensor, data: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0] // (2 if Around(*rest[_BEFORE_AROUND:]).gate else 1)))


#: Arguments of linear behind `data` and before those of Around: three parts, bias, spec.
_BEFORE_AROUND = 5


def experts(
    x: Tensor,
    ids: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    experts: int,
    spec: str,
) -> Tensor:
    """x [.., K] and ids, broadcast together, -> [.., N]: the experts that are named, one at a time."""
    parts, total = Quantized(data, scale, zero_point, outer_scale), data.shape[0]
    n = total // experts
    lead = torch.broadcast_shapes(x.shape[:-1], ids.shape)
    out = x.new_zeros((*lead, n))
    flat, rows = x.expand(*lead, -1).reshape(-1, x.shape[-1]), out.view(-1, n)
    ids = torch.where(ids < 0, ids + experts, ids).expand(lead).reshape(-1)
    for e in ids.unique().tolist():
        if not 0 <= e <= experts:
            raise IndexError(f"expert {e} of {experts}")
        if e < experts:
            (chosen,) = torch.where(ids == e)
            mine = row_range(parts, e * n, n, total)
            rows[chosen] = torch.ops.qpass.linear(flat[chosen], *mine.parts, None, spec)
    return out


def _experts_fake(x: Tensor, ids: Tensor, data: Tensor, *rest: Any) -> Tensor:
    experts, _ = rest[-2:]
    return x.new_empty((*torch.broadcast_shapes(x.shape[:-1], ids.shape), data.shape[0] // experts))


def embedding(
    indices: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    columns: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """[..] -> [.., columns]: the rows named by `indices`, dequantized after they are gathered."""
    rows = Quantized(data, scale, zero_point, outer_scale).map(
        lambda part: _gather(part, indices) if part.shape[0] == data.shape[0] else part
    )
    return _dequantize(rows, parse_spec(spec), columns, dtype).contiguous()


def _gather(part: Tensor, indices: Tensor) -> Tensor:
    if part.dtype.is_floating_point and part.dtype.itemsize == 1:  # 8-bit floats have no gather on every device
        return F.embedding(indices, part.view(torch.uint8)).view(part.dtype)
    return F.embedding(indices, part)


def _embedding_fake(indices: Tensor, data: Tensor, *rest: Any) -> Tensor:
    *_, columns, _, dtype = rest
    return data.new_empty((*indices.shape, columns), dtype=dtype)


def quantize(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """[.., K] -> the parts that the spec has."""
    done = _quantize(x, parse_spec(spec), static_scale=static_scale)
    return [part.contiguous() for part in done.parts if part is not None]


def quantized_like(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """Empty parts of the shapes and types that `quantize` gives."""
    parsed = parse_spec(spec)
    fmt, lead = parsed.format, x.shape[:-1]
    width = packed_length(x.shape[-1], fmt.bits) if fmt.bits < 8 else x.shape[-1]
    shapes = {0: (*lead, width)}
    if parsed.granularity is not None:
        scales = shapes[1] = parsed.granularity.scale_shape(x.shape)
        packed = fmt.bits < 8 and not parsed.float_zero
        shapes[2] = (*scales[:-1], packed_length(scales[-1], fmt.bits)) if packed else scales
        shapes[3] = (*lead, 1) if parsed.double_quantized else (1,) * x.dim()
    return [x.new_empty(shapes[slot], dtype=dtype) for slot, dtype in parsed.stored_parts.items()]


def dequantize(
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    columns: int,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """Stored parts -> [.., columns] in `dtype`."""
    return _dequantize(Quantized(data, scale, zero_point, outer_scale), parse_spec(spec), columns, dtype).contiguous()


def _dequantize_fake(data: Tensor, *rest: Any) -> Tensor:
    *_, columns, _, dtype = rest
    return data.new_empty((*data.shape[:-1], columns), dtype=dtype)


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


for _name, _implementation, _fake in (
    ("linear", linear, _linear_fake),
    ("experts", experts, _experts_fake),
    ("embedding", embedding, _embedding_fake),
    ("quantize", quantize, quantized_like),
    ("dequantize", dequantize, _dequantize_fake),
    ("read_cache", read_cache, _read_cache_fake),
    ("attention", attention, _attention_fake),
    ("append", append, _append_fake),
    ("append_residual", append_residual, append_residual_fake),
    ("append_rotated", append_rotated, _append_rotated_fake),
    ("write_rotated", write_rotated, _write_rotated_fake),
    ("once", Tensor.clone, torch.empty_like),
    ("cache_positions", cache_positions, _cache_positions_fake),
):
    if _name not in BOUND:  # chosen by device in ops/cpu
        LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"qpass::{_name}", _fake, lib=LIBRARY)
