"""torch.ops.qpass.attention on CPU tensors: what is stored is read as it is, a block of tokens at a time."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.ops import cache_reference
from qpass.ops.cpu.library import c_functions, remember
from qpass.ops.cpu.matrix import DTYPES, CpuSpec, Frame, FrameStruct, Matrix, contiguous, cpu_spec, fits, has_kernels

#: From this many queries a head on, attention over keys and values that are floats is torch's own.
_MANY_QUERIES = 8
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _of_cache(parts: tuple[Tensor | None, ...], columns: int, known: CpuSpec) -> tuple[Matrix, int]:
    """Keys or values [B, H, S, ..] as one matrix, and the tokens from one head to the next in memory.

    Tokens of one head lie behind each other; the heads may be apart, as in the filled part of a longer cache.
    """
    first = parts[0]
    assert first is not None
    batch, heads, tokens = first.shape[:3]
    if known.struct.tokens:  # scales are per group of tokens: a cut is copied
        parts = tuple(contiguous(p) for p in parts)
        return Matrix(parts, batch * heads * tokens, columns, known, cut=True), tokens
    capacity = (
        first.stride(1) // first.shape[3] if heads > 1 else (first.stride(0) // first.shape[3] if batch > 1 else tokens)
    )
    layout = [p is None or p.numel() == 1 or _is_cut(p, capacity) for p in parts]
    if not all(layout) or capacity < tokens:
        parts, capacity = tuple(contiguous(p) for p in parts), tokens
    return Matrix(parts, batch * heads * capacity, columns, known, cut=True), capacity


def _is_cut(part: Tensor, capacity: int) -> bool:
    _, heads, tokens, width = part.shape
    expected = (heads * capacity * width, capacity * width, width, 1)
    return (
        all(n == 1 or s == e for n, s, e in zip(part.shape, part.stride(), expected, strict=True))
        and capacity >= tokens
    )


class ExtrasStruct(ctypes.Structure):
    """struct Extras of extras.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("k_first", "v_first", "k_last", "v_last", "sinks")),
        *((name, ctypes.c_int64) for name in ("firsts", "lasts", "start")),
        ("soft_cap", ctypes.c_float),
        ("keys", FrameStruct),
        ("values", FrameStruct),
    ]


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
    """q [B, Hq, Q, D] against a quantized cache -> [B, Hq, Q, Dv]; floats of at most a block of tokens at a time."""
    keys, values = (k_data, k_scale, k_zero_point, k_outer_scale), (v_data, v_scale, v_zero_point, v_outer_scale)
    floats, capped = (k_first, v_first, k_last, v_last), soft_cap or sinks is not None
    if not capped and not is_causal and _whole_chunk(q, k_data.shape[2], mask, k_last, start):
        assert k_last is not None
        assert v_last is not None
        count = min(k_last.shape[2], k_data.shape[2])  # the window of floats may be longer than the cache
        k, v = k_last[:, :, :count].to(q.dtype), v_last[:, :, :count].to(q.dtype)
        seen = None if mask is None else mask[..., :count]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True).contiguous()
    floats_alone = k_spec == v_spec == _FLOATS.get(q.dtype) and k_first is None and k_last is None and not capped
    if floats_alone and q.shape[2] >= _MANY_QUERIES:
        return F.scaled_dot_product_attention(
            q, k_data, v_data, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        ).contiguous()
    readable = has_kernels(k_spec) and has_kernels(v_spec)
    if not readable or not _serves(q, keys, cpu_spec(k_spec), values, v_columns, cpu_spec(v_spec)):
        return cache_reference.attention(
            q, *keys, k_spec, *values, v_columns, v_spec, mask, is_causal, scale, *floats, start, soft_cap, sinks
        )
    k_known, v_known = cpu_spec(k_spec), cpu_spec(v_spec)
    y = q.new_empty((*q.shape[:-1], v_columns))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    fp32 = [None if x is None else x.float().contiguous() for x in floats]
    _attend(
        q.float(), keys, k_known, values, v_known, v_columns, mask, is_causal, scale, fp32, start, soft_cap, sinks, y
    )
    return y


def _whole_chunk(q: Tensor, tokens: int, mask: Tensor | None, last: Tensor | None, start: Tensor | None) -> bool:
    """Whether all tokens that many queries may see are in `last`, as floats: a prefill of an empty cache."""
    if last is None or start is None or q.shape[2] < _MANY_QUERIES or int(start):
        return False
    return last.shape[2] >= tokens or (
        mask is not None and mask.dtype == torch.bool and not mask[..., last.shape[2] :].any()
    )


def _serves(q: Tensor, keys: tuple[Tensor | None, ...], k: CpuSpec, values: tuple[Tensor | None, ...], v_columns: int,
            v: CpuSpec) -> bool:  # fmt: skip
    """Whether the kernel can read what is stored."""
    k_data, v_data = keys[0], values[0]
    assert k_data is not None
    assert v_data is not None
    if c_functions() is None or q.dtype not in DTYPES or not (q.numel() and v_columns and k_data.numel()):
        return False
    if k_data.shape[:3] != v_data.shape[:3] or k_data.shape[0] != q.shape[0] or q.shape[1] % k_data.shape[1]:
        return False
    stored = [(None,) if known.spec.static else (parts[1],) for known, parts in ((k, keys), (v, values))]
    return all(
        fits((parts[0], *scale, *parts[2:]), columns, str(known.spec))
        for parts, scale, columns, known in ((keys, stored[0], q.shape[-1], k), (values, stored[1], v_columns, v))
    )


def _attend(q: Tensor, keys: tuple[Tensor | None, ...], k_known: CpuSpec, values: tuple[Tensor | None, ...], v_known: CpuSpec,
            v_columns: int, mask: Tensor | None, is_causal: bool, scale: float, floats: list[Tensor | None],
            start: Tensor | None, soft_cap: float, sinks: Tensor | None, y: Tensor) -> None:  # fmt: skip
    """The kernel: q [B, Hq, Q, D] float32, `floats` k_first, v_first, k_last, v_last as float32; writes y."""
    library = c_functions()
    batch, heads, queries, width = q.shape
    scales = keys[1], values[1]
    frames = Frame(k_known.spec, width, keys[1]), Frame(v_known.spec, v_columns, values[1])
    if k_known.spec.static:
        keys = (keys[0], None, *keys[2:])
    if v_known.spec.static:
        values = (values[0], None, *values[2:])
    k_matrix, k_capacity = _of_cache(keys, width, k_known)
    v_matrix, v_capacity = _of_cache(values, v_columns, v_known)
    key_heads, tokens = keys[0].shape[1:3]  # type: ignore[union-attr]
    q = q.contiguous()
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.to(torch.float32)).expand(batch, heads, queries, tokens)
        strides = mask.stride()
    if sinks is not None:
        sinks = sinks.to(torch.float32).contiguous()
    sizes = (batch, heads, key_heads, queries, tokens, k_capacity, v_capacity, *strides)
    more = ExtrasStruct(
        *(None if x is None else x.data_ptr() for x in (*floats, sinks)),
        0 if floats[0] is None else floats[0].shape[2],
        0 if floats[2] is None else floats[2].shape[2],
        0 if start is None else int(start),
        soft_cap,
        *(f.struct for f in frames),
    )
    library.qpass_attention(
        *k_matrix.arguments,
        *v_matrix.arguments,
        q.data_ptr(),
        None if mask is None else mask.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes),
        0 if mask is None else (1 if mask.dtype == torch.bool else 2),
        is_causal,
        scale,
        y.data_ptr(),
        DTYPES[y.dtype],
        ctypes.addressof(more),
        torch.get_num_threads(),
    )
    given = all(f.is_given(scale) for f, scale in zip(frames, scales, strict=True))
    if given and all(a is b for a, b in zip((*k_matrix.parts, *v_matrix.parts), (*keys, *values), strict=True)):
        # With more queries a prefill of an empty cache may be torch's own.
        remember(
            "attention", library.qpass_attention, k_matrix, v_matrix,
            rest=(*(f.rotation for f in frames), *(f.heads for f in frames), k_capacity, v_capacity, _MANY_QUERIES - 1),
        )  # fmt: skip
