"""torch.ops.qpass on CPU tensors: shapes, types and layout are seen to here, the arithmetic is in kernels.cpp."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.compute import ON_CHANGE, compute_of
from qpass.ops import reference
from qpass.ops.cpu.build import Kernels, Missing, binding, cpu_features, kernels
from qpass.ops.cpu.matrix import DTYPES, CpuSpec, Matrix, SpecStruct, contiguous, cpu_spec, fits
from qpass.ops.schemas import LIBRARY
from qpass.packing import packed_length
from qpass.rotation import rotate
from qpass.spec import QuantSpec, parse_spec

#: From this many rows of x on, a product in float goes through tiles of the dequantized weight and torch's own product.
WIDE = {"avx512-vnni": 1024, "avx512": 1024, "avx2": 33, "portable": 9}
#: The same for a bfloat16 product, in whatever type the kernels compute, where the processor multiplies bfloat16 itself.
WIDE_BF16 = 33
#: From this many queries a head on, attention over keys and values that are floats is torch's own.
_MANY_QUERIES = 8
_FLOATS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
#: Elements of a tile: with the weight it comes from it stays in the caches.
_TILE = 1 << 20


@cache
def _functions(found: Kernels) -> Any:
    """The library, told once what its functions take."""
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrix = [pointer] * 5 + [size] * 4
    library = found.library
    library.qpass_linear.argtypes = [*matrix, pointer, pointer, pointer, size, small, small, small, small]
    library.qpass_rows.argtypes = [*matrix, pointer, size, size, pointer, small, small]
    library.qpass_quantize.argtypes = [*matrix, pointer, size, small, small]
    attention = [
        *matrix, *matrix, pointer, pointer, pointer, small, small, ctypes.c_float, pointer, small, pointer, small,
    ]  # fmt: skip
    library.qpass_attention.argtypes = attention
    library.qpass_rows.restype = library.qpass_quantize.restype = size
    library.qpass_linear.restype = library.qpass_attention.restype = None
    assert library.qpass_spec_bytes() == ctypes.sizeof(SpecStruct)
    return library


def _library() -> Any:
    found = kernels()
    return _functions(found) if isinstance(found, Kernels) else None


#: No limit to the rows of a call.
_ANY = 1 << 62


def _most_rows(dtype: torch.dtype, int8: bool) -> int:
    """Of an input that a kernel multiplies itself; more of them go through tiles."""
    found = kernels()
    most = WIDE[found.isa] - 1 if isinstance(found, Kernels) and not int8 else _ANY
    return min(most, WIDE_BF16 - 1) if dtype == torch.bfloat16 and _has_bf16_products() else most


#: The library of binding.cpp, once it is in use.
_bound: list[ctypes.CDLL] = []


def bind() -> str | None:
    """From now on calls on CPU tensors that are like an earlier one do without Python (binding.cpp). Gives what prevents it."""
    beside = threading.Thread(target=binding)  # two compilers at once, the first time
    beside.start()
    built = kernels()
    beside.join()
    found = built if isinstance(built, Missing) else binding()
    if isinstance(found, Missing):
        return found.reason
    if not _bound:
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        found.qpass_remember_linear.argtypes = [pointer, pointer, size, size, size, ctypes.c_int32]
        found.qpass_remember_attention.argtypes = [
            pointer, pointer, size, size, pointer, size, size, size, size, size,
        ]  # fmt: skip
        ON_CHANGE.append(found.qpass_forget)
        _bound.append(found)
    return None


def _remember(what: str, kernel: Any, *matrices: Matrix, rest: tuple[int, ...]) -> None:
    """Tell binding.cpp, if it is there and asked for this call, what a kernel was called with."""
    for library in _bound:
        stored = [x for m in matrices for x in (m.arguments[0], *m.arguments[-2:])]
        getattr(library, f"qpass_remember_{what}")(ctypes.cast(kernel, ctypes.c_void_p), *stored, *rest)


def linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """[.., K] -> [.., N]. One row and a few go through kernels that read the stored weight, many in float through tiles."""
    library, dtype = _library(), DTYPES.get(x.dtype)
    k, n = x.shape[-1], data.shape[0]
    if library is None or dtype is None or not (k and n) or not fits((data, scale, zero_point, outer_scale), k, spec):
        return reference.linear(x, data, scale, zero_point, outer_scale, bias, spec)
    if bias is not None and bias.shape != (n,):  # what addmm adds may be a matrix
        return linear(x, data, scale, zero_point, outer_scale, None, spec) + bias.to(x.dtype)
    known = cpu_spec(spec)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and (bias.dtype not in DTYPES or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    count = x.numel() // k
    matrix = Matrix((data, scale, zero_point, outer_scale), n, k, known)
    int8 = compute_of(known.spec) == "int8"
    most_rows = _most_rows(x.dtype, int8)
    if count > most_rows:
        return _through_tiles(library, x.reshape(count, k), matrix, n, bias).view(*x.shape[:-1], n)
    y = x.new_empty((*x.shape[:-1], n))
    if count:
        library.qpass_linear(
            *matrix.arguments,
            x.data_ptr(),
            None if bias is None else bias.data_ptr(),
            y.data_ptr(),
            count,
            dtype,
            0 if bias is None else DTYPES[bias.dtype],
            int8,
            torch.get_num_threads(),
        )
        if all(a is b for a, b in zip(matrix.parts, (data, scale, zero_point, outer_scale), strict=True)):
            _remember("linear", library.qpass_linear, matrix, rest=(most_rows, int8))
    return y


@cache
def _has_bf16_products() -> bool:
    """Whether torch's own bfloat16 product is faster than its float32 one."""
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"})


def _through_tiles(library: Any, x: Tensor, matrix: Matrix, n: int, bias: Tensor | None) -> Tensor:
    """[M, K] -> [M, N], some rows of the weight at a time."""
    dtype = x.dtype if x.dtype == torch.bfloat16 and _has_bf16_products() else torch.float32
    inputs, k = x.detach().to(dtype), x.shape[1]
    y = inputs.new_empty((x.shape[0], n))
    rows = max(1, min(n, _TILE // k))
    tile = inputs.new_empty((rows, k))
    for start in range(0, n, rows):
        count = min(rows, n - start)
        library.qpass_rows(
            *matrix.arguments, None, start, count, tile.data_ptr(), DTYPES[dtype], torch.get_num_threads()
        )
        torch.mm(inputs, tile[:count].t(), out=y[:, start : start + count])
    if bias is not None:
        y += bias.detach()
    return y.to(x.dtype)


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
    """[..] -> [.., columns]. Raises `IndexError` for an index outside of the table."""
    library, n = _library(), data.shape[0]
    parts = (data, scale, zero_point, outer_scale)
    if library is None or dtype not in DTYPES or not (columns and n) or not fits(parts, columns, spec):
        return reference.embedding(indices, *parts, columns, spec, dtype)
    wanted = indices.to(torch.int64).contiguous()
    y = data.new_empty((*indices.shape, columns), dtype=dtype)
    matrix = Matrix(parts, n, columns, cpu_spec(spec))
    bad = library.qpass_rows(
        *matrix.arguments, wanted.data_ptr(), 0, wanted.numel(), y.data_ptr(), DTYPES[dtype], torch.get_num_threads()
    )
    if bad >= 0:
        raise IndexError(f"index {int(wanted.flatten()[bad])} in an embedding table of {n} rows")
    return y


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
    library = _library()
    parts = (data, scale, zero_point, outer_scale)
    only = parse_spec(spec).of_caches_only is not None
    if (
        only
        or library is None
        or dtype not in DTYPES
        or not (columns and data.numel())
        or not fits(parts, columns, spec)
    ):
        return reference.dequantize(*parts, columns, spec, dtype)
    y = data.new_empty((*data.shape[:-1], columns), dtype=dtype)
    n = y.numel() // columns
    matrix = Matrix(parts, n, columns, cpu_spec(spec))
    library.qpass_rows(*matrix.arguments, None, 0, n, y.data_ptr(), DTYPES[dtype], torch.get_num_threads())
    return y


#: What the kernel that quantizes writes; other formats go through the reference.
_WRITTEN = frozenset({"int8", "int4", "int2", "fp8_e4m3", "fp8_e5m2"})


def quantize(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """[.., K] -> the parts that the spec has, to the bit those of the reference."""
    library, known = _library(), cpu_spec(spec)
    s, k = known.spec, x.shape[-1]
    served = s.format.name in _WRITTEN and not s.double_quantized and not s.static and str(s.granularity) != "tensor"
    if library is None or x.dtype not in DTYPES or not x.numel() or not served:
        return reference.quantize(x, spec, static_scale)
    x = rotate(x.float()) if s.rotated else x.contiguous()
    lead, bits = x.shape[:-1], s.format.bits
    parts = [x.new_empty((*lead, packed_length(k, bits) if bits < 8 else k), dtype=s.format.storage)]
    if s.granularity is not None:
        blocks = s.granularity.scale_shape(x.shape)
        parts.append(x.new_empty(blocks, dtype=s.scale_dtype))
        if s.float_zero:
            parts.append(x.new_empty(blocks, dtype=s.scale_dtype))
        elif s.has_zero_point:
            width = packed_length(blocks[-1], bits) if bits < 8 else blocks[-1]
            parts.append(x.new_empty((*blocks[:-1], width), dtype=s.format.storage))
    matrix = Matrix((*parts, None, None, None)[:4], x.numel() // k, k, known)
    tokens = x.shape[-2] if x.dim() > 1 else 1
    bad = library.qpass_quantize(*matrix.arguments, x.data_ptr(), tokens, DTYPES[x.dtype], torch.get_num_threads())
    return parts if not bad else reference.quantize(x, spec)  # which says what is wrong


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
    if _whole_chunk(q, k_data.shape[2], mask, k_last, start) and not capped and not is_causal:
        seen = None if mask is None else mask[..., : k_last.shape[2]]  # type: ignore[union-attr]
        return F.scaled_dot_product_attention(
            q, k_last.to(q.dtype), v_last.to(q.dtype), attn_mask=seen, scale=scale, enable_gqa=True  # type: ignore[union-attr]
        ).contiguous()  # fmt: skip
    floats_alone = k_spec == v_spec == _FLOATS.get(q.dtype) and k_first is None and k_last is None and not capped
    if floats_alone and q.shape[2] >= _MANY_QUERIES:
        return F.scaled_dot_product_attention(
            q, k_data, v_data, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=True
        ).contiguous()
    k_known, v_known = cpu_spec(k_spec), cpu_spec(v_spec)
    if not _serves(q, keys, k_known, values, v_columns, v_known):
        return reference.attention(
            q, *keys, k_spec, *values, v_columns, v_spec, mask, is_causal, scale, *floats, start, soft_cap, sinks
        )
    y = q.new_empty((*q.shape[:-1], v_columns))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    # Rotations and static scales are the queries' and the results': what is stored is read as it is.
    queries = _as_stored(q.float(), k_known.spec, k_scale, inverse=True)
    fp32 = [None if x is None else _as_stored(x.float(), known.spec, part).contiguous()
            for x, known, part in zip(floats, (k_known, v_known) * 2, (k_scale, v_scale) * 2, strict=True)]  # fmt: skip
    changed = any(known.spec.rotated or known.spec.static for known in (k_known, v_known))
    found = _attend(queries, keys, k_known, values, v_known, v_columns, mask, is_causal, scale, fp32, start, soft_cap, sinks,
                    torch.empty_like(y, dtype=torch.float32) if changed else y, remember=not changed)  # fmt: skip
    return _as_stored(found, v_known.spec, v_scale, inverse=True).to(q.dtype) if changed else y


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
    if _library() is None or q.dtype not in DTYPES or not (q.numel() and v_columns and k_data.numel()):
        return False
    if k_data.shape[:3] != v_data.shape[:3] or k_data.shape[0] != q.shape[0] or q.shape[1] % k_data.shape[1]:
        return False
    stored = [(None,) if known.spec.static else (parts[1],) for known, parts in ((k, keys), (v, values))]
    return all(
        fits((parts[0], *scale, *parts[2:]), columns, str(known.spec))
        for parts, scale, columns, known in ((keys, stored[0], q.shape[-1], k), (values, stored[1], v_columns, v))
    )


def _as_stored(x: Tensor, spec: QuantSpec, scale: Tensor | None, inverse: bool = False) -> Tensor:
    """x [B, H, S, D] in the coordinates that K or V is stored in; `inverse`: what is multiplied by K, or is made of V."""
    if spec.rotated:
        x = rotate(x)
    if spec.static:
        assert scale is not None
        wide = scale.repeat_interleave(x.shape[1] // scale.shape[1], 1) if scale.shape[1] > 1 else scale
        x = x * wide if inverse else x / wide
    return x


def _attend(q: Tensor, keys: tuple[Tensor | None, ...], k_known: CpuSpec, values: tuple[Tensor | None, ...], v_known: CpuSpec,
            v_columns: int, mask: Tensor | None, is_causal: bool, scale: float, floats: list[Tensor | None],
            start: Tensor | None, soft_cap: float, sinks: Tensor | None, y: Tensor, remember: bool) -> Tensor:  # fmt: skip
    """The kernel: q [B, Hq, Q, D] float32, `floats` k_first, v_first, k_last, v_last as float32; writes y."""
    library = _library()
    batch, heads, queries, width = q.shape
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
    if remember and all(a is b for a, b in zip((*k_matrix.parts, *v_matrix.parts), (*keys, *values), strict=True)):
        # With more queries a prefill of an empty cache may be torch's own.
        _remember(
            "attention", library.qpass_attention, k_matrix, v_matrix, rest=(k_capacity, v_capacity, _MANY_QUERIES - 1)
        )
    return y


def _on_any_device(name: str) -> Callable[..., Any]:
    on_cpu, elsewhere = globals()[name], getattr(reference, name)
    return lambda x, *rest: (on_cpu if x.device.type == "cpu" else elsewhere)(x, *rest)


for _name, _function in (("embedding", embedding), ("quantize", quantize), ("dequantize", dequantize)):
    LIBRARY.impl(_name, _function, "CPU")
for _name in ("linear", "attention"):  # the CPU's own key is binding.cpp's
    LIBRARY.impl(_name, _on_any_device(_name), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_name}_checked", globals()[_name], "CPU")
