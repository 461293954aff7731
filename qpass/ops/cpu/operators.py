"""torch.ops.qpass on CPU tensors: shapes, types and layout are seen to here, the arithmetic is in kernels.cpp."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qpass.compute import compute_of
from qpass.ops import reference
from qpass.ops.cpu.build import Kernels, cpu_features, kernels
from qpass.ops.schemas import LIBRARY
from qpass.packing import packed_length
from qpass.spec import QuantSpec, parse_spec

#: From this many rows of x on, a product in float goes through tiles of the dequantized weight and torch's own product.
WIDE = {"avx512-vnni": 1024, "avx512": 1024, "avx2": 33, "portable": 9}
#: The same for a bfloat16 product, in whatever type the kernels compute, where the processor multiplies bfloat16 itself.
WIDE_BF16 = 33
#: Elements of a tile: with the weight it comes from it stays in the caches.
_TILE = 1 << 20

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "fp8_e4m3": 3, "mxfp8": 3, "fp8_e5m2": 4, "int8": 5}
_CODES, _CODEBOOK = 6, 7
_SCALES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class _Spec(ctypes.Structure):
    """struct Spec of weight.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "bits", "group", "scale", "zero_point")),
        ("unit", ctypes.c_float),
        ("codebook", ctypes.c_float * 16),
        ("integers", ctypes.c_int8 * 16),
    ]


@dataclass(frozen=True)
class _Known:
    """A spec, and the same for the kernels."""

    spec: QuantSpec
    struct: _Spec
    address: int

    def blocks(self, columns: int) -> int:
        g = self.spec.group_size
        return -(-columns // g) if g else 1


@cache
def _known(text: str) -> _Known:
    spec = parse_spec(text)
    fmt = spec.format
    book, unit = fmt.codebook or (), 1.0
    if book:  # nf4 is rounded to 127ths; twice the numbers of E2M1 are integers
        unit = 0.5 if fmt.qmax == 6 else 1 / 127
    if spec.granularity is None:
        scale = 0
    elif spec.double_quantized:
        scale = 6
    else:
        scale = {"e8m0": 4, "e4m3": 5}.get(fmt.scale) or _SCALES[spec.scale_dtype]
    struct = _Spec(
        _KINDS.get(fmt.name, _CODEBOOK if book else _CODES),
        fmt.bits,
        spec.group_size,
        scale,
        spec.has_zero_point,
        unit,
        (ctypes.c_float * 16)(*book),
        (ctypes.c_int8 * 16)(*(round(v / unit) for v in book)),
    )
    return _Known(spec, struct, ctypes.addressof(struct))


@cache
def _functions(found: Kernels) -> Any:
    """The library, told once what its functions take."""
    pointer, size, small = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    matrix = [pointer] * 5 + [size] * 4
    library = found.library
    library.qpass_linear.argtypes = [*matrix, pointer, pointer, pointer, size, small, small, small, small]
    library.qpass_rows.argtypes = [*matrix, pointer, size, size, pointer, small, small]
    library.qpass_quantize.argtypes = [*matrix, pointer, small, small]
    attention = [*matrix, *matrix, pointer, pointer, pointer, small, small, ctypes.c_float, pointer, small, small]
    library.qpass_attention.argtypes = attention
    library.qpass_rows.restype = library.qpass_quantize.restype = size
    library.qpass_linear.restype = library.qpass_attention.restype = None
    assert library.qpass_spec_bytes() == ctypes.sizeof(_Spec)
    return library


def _library() -> Any:
    found = kernels()
    return _functions(found) if isinstance(found, Kernels) else None


def _goes_through_tiles(count: int, dtype: torch.dtype, int8: bool) -> bool:
    if dtype == torch.bfloat16 and count >= WIDE_BF16 and _has_bf16_products():
        return True
    found = kernels()
    return not int8 and isinstance(found, Kernels) and count >= WIDE[found.isa]


def _contiguous(part: Tensor | None) -> Tensor | None:
    return part if part is None or part.is_contiguous() else part.contiguous()


_SCALE_TYPES: dict[int, tuple[torch.dtype, ...]] = {
    **{code: (dtype,) for dtype, code in _SCALES.items()},
    4: (torch.float8_e8m0fnu, torch.uint8),
    5: (torch.float8_e4m3fn, torch.uint8),
    6: (torch.uint8,),
}


@cache
def _layout(text: str, k: int) -> tuple[int, int, tuple[torch.dtype, ...], tuple[torch.dtype, ...]]:
    """Of k columns in a spec: width of the data, blocks, types that data and scales may have."""
    known = _known(text)
    fmt = known.spec.format
    width = packed_length(k, fmt.bits) if fmt.bits < 8 else k
    bytes_too = (torch.uint8,) if fmt.kind == "float8" else ()
    return width, known.blocks(k), (fmt.storage, *bytes_too), _SCALE_TYPES.get(known.struct.scale, ())


def _fits(parts: tuple[Tensor | None, ...], k: int, text: str) -> bool:
    """Whether the stored parts are what the spec says of k columns: a kernel believes it. The reference sees to the rest."""
    data, scale, zero, outer = parts
    width, blocks, data_types, scale_types = _layout(text, k)
    if data is None or data.dtype not in data_types or data.shape[-1] != width:
        return False
    rows = data.numel() // width
    spec = _known(text).spec
    if (scale is not None) != bool(scale_types) or (zero is not None) != spec.has_zero_point:
        return False
    if scale is not None and (scale.dtype not in scale_types or scale.numel() not in (blocks, rows * blocks)):
        return False
    if zero is not None:
        zero_width = packed_length(blocks, spec.format.bits) if spec.format.bits < 8 else blocks
        if zero.dtype != spec.format.storage or zero.numel() * blocks != scale.numel() * zero_width:  # type: ignore[union-attr]
            return False
    return outer is None or (outer.dtype == torch.float32 and outer.numel() in (1, rows))


class _Matrix:
    """The arguments that name a matrix of n rows and k columns to a kernel; holds what they point to."""

    def __init__(self, parts: tuple[Tensor | None, ...], n: int, k: int, known: _Known, cut: bool = False) -> None:
        """`cut`: the parts are views that the kernel steps through by itself."""
        self.known = known
        self.parts = data, scale, zero, outer = parts if cut else tuple(_contiguous(p) for p in parts)
        assert data is not None
        self.arguments = (
            known.address,
            data.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if outer is None else outer.data_ptr(),
            n,
            k,
            n if scale is not None and scale.numel() > known.blocks(k) else 1,
            n if outer is not None and outer.numel() > 1 else 1,
        )


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
    library, dtype = _library(), _DTYPES.get(x.dtype)
    k, n = x.shape[-1], data.shape[0]
    if library is None or dtype is None or not (k and n) or not _fits((data, scale, zero_point, outer_scale), k, spec):
        return reference.linear(x, data, scale, zero_point, outer_scale, bias, spec)
    if bias is not None and bias.shape != (n,):  # what addmm adds may be a matrix
        return linear(x, data, scale, zero_point, outer_scale, None, spec) + bias.to(x.dtype)
    known = _known(spec)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and (bias.dtype not in _DTYPES or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    count = x.numel() // k
    matrix = _Matrix((data, scale, zero_point, outer_scale), n, k, known)
    int8 = compute_of(known.spec) == "int8"
    if _goes_through_tiles(count, x.dtype, int8):
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
            0 if bias is None else _DTYPES[bias.dtype],
            int8,
            torch.get_num_threads(),
        )
    return y


@cache
def _has_bf16_products() -> bool:
    """Whether torch's own bfloat16 product is faster than its float32 one."""
    return bool(cpu_features() & {"avx512_bf16", "amx_bf16", "bf16"})


def _through_tiles(library: Any, x: Tensor, matrix: _Matrix, n: int, bias: Tensor | None) -> Tensor:
    """[M, K] -> [M, N], some rows of the weight at a time."""
    dtype = x.dtype if x.dtype == torch.bfloat16 and _has_bf16_products() else torch.float32
    inputs, k = x.detach().to(dtype), x.shape[1]
    y = inputs.new_empty((x.shape[0], n))
    rows = max(1, min(n, _TILE // k))
    tile = inputs.new_empty((rows, k))
    for start in range(0, n, rows):
        count = min(rows, n - start)
        library.qpass_rows(
            *matrix.arguments, None, start, count, tile.data_ptr(), _DTYPES[dtype], torch.get_num_threads()
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
    if library is None or dtype not in _DTYPES or not (columns and n) or not _fits(parts, columns, spec):
        return reference.embedding(indices, *parts, columns, spec, dtype)
    wanted = indices.to(torch.int64).contiguous()
    y = data.new_empty((*indices.shape, columns), dtype=dtype)
    matrix = _Matrix(parts, n, columns, _known(spec))
    bad = library.qpass_rows(
        *matrix.arguments, wanted.data_ptr(), 0, wanted.numel(), y.data_ptr(), _DTYPES[dtype], torch.get_num_threads()
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
    if library is None or dtype not in _DTYPES or not (columns and data.numel()) or not _fits(parts, columns, spec):
        return reference.dequantize(*parts, columns, spec, dtype)
    y = data.new_empty((*data.shape[:-1], columns), dtype=dtype)
    n = y.numel() // columns
    matrix = _Matrix(parts, n, columns, _known(spec))
    library.qpass_rows(*matrix.arguments, None, 0, n, y.data_ptr(), _DTYPES[dtype], torch.get_num_threads())
    return y


#: What the kernel that quantizes writes; other formats go through the reference.
_WRITTEN = frozenset({"int8", "int4", "fp8_e4m3", "fp8_e5m2"})


def quantize(x: Tensor, spec: str) -> list[Tensor]:
    """[.., K] -> the parts that the spec has, to the bit those of the reference."""
    library, known = _library(), _known(spec)
    s, k = known.spec, x.shape[-1]
    served = s.format.name in _WRITTEN and not s.double_quantized and s.scale_dtype == torch.float32
    if library is None or x.dtype not in _DTYPES or not x.numel() or not served or str(s.granularity) == "tensor":
        return reference.quantize(x, spec)
    x = x if x.is_contiguous() else x.contiguous()
    lead, blocks, bits = x.shape[:-1], known.blocks(k), s.format.bits
    parts = [x.new_empty((*lead, packed_length(k, bits) if bits < 8 else k), dtype=s.format.storage)]
    if s.granularity is not None:
        parts.append(x.new_empty((*lead, blocks), dtype=torch.float32))
    if s.has_zero_point:
        width = packed_length(blocks, bits) if bits < 8 else blocks
        parts.append(x.new_empty((*lead, width), dtype=s.format.storage))
    matrix = _Matrix((*parts, None, None, None)[:4], x.numel() // k, k, known)
    bad = library.qpass_quantize(*matrix.arguments, x.data_ptr(), _DTYPES[x.dtype], torch.get_num_threads())
    return parts if not bad else reference.quantize(x, spec)  # which says what is wrong


def _of_cache(parts: tuple[Tensor | None, ...], columns: int, known: _Known) -> tuple[_Matrix, int]:
    """Keys or values [B, H, S, ..] as one matrix, and the tokens from one head to the next in memory.

    Tokens of one head lie behind each other; the heads may be apart, as in the filled part of a longer cache.
    """
    first = parts[0]
    assert first is not None
    batch, heads, tokens = first.shape[:3]
    capacity = (
        first.stride(1) // first.shape[3] if heads > 1 else (first.stride(0) // first.shape[3] if batch > 1 else tokens)
    )
    layout = [p is None or p.numel() == 1 or _is_cut(p, capacity) for p in parts]
    if not all(layout) or capacity < tokens:
        parts, capacity = tuple(_contiguous(p) for p in parts), tokens
    return _Matrix(parts, batch * heads * capacity, columns, known, cut=True), capacity


def _is_cut(part: Tensor, capacity: int) -> bool:
    _, heads, tokens, width = part.shape
    expected = (heads * capacity * width, capacity * width, width, 1)
    return (
        all(n == 1 or s == e for n, s, e in zip(part.shape, part.stride(), expected, strict=True))
        and capacity >= tokens
    )


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
) -> Tensor:
    """q [B, Hq, Q, D] against a quantized cache -> [B, Hq, Q, Dv]; floats of at most a block of tokens at a time."""
    library = _library()
    batch, heads, queries, width = q.shape
    keys, values = (k_data, k_scale, k_zero_point, k_outer_scale), (v_data, v_scale, v_zero_point, v_outer_scale)
    served = q.numel() and v_columns and k_data.numel() and q.dtype in _DTYPES and library is not None
    if not (
        served
        and k_data.shape[:3] == v_data.shape[:3]
        and k_data.shape[0] == batch
        and heads % k_data.shape[1] == 0
        and _fits(keys, width, k_spec)
        and _fits(values, v_columns, v_spec)
    ):
        return reference.attention(q, *keys, k_spec, *values, v_columns, v_spec, mask, is_causal, scale)
    k_known, v_known = _known(k_spec), _known(v_spec)
    k_matrix, k_capacity = _of_cache(keys, width, k_known)
    v_matrix, v_capacity = _of_cache(values, v_columns, v_known)
    tokens, key_heads = k_data.shape[2], k_data.shape[1]
    queries_fp32 = q.to(torch.float32).contiguous()
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        mask = (mask if mask.dtype == torch.bool else mask.to(torch.float32)).expand(batch, heads, queries, tokens)
        strides = mask.stride()
    y = q.new_empty((batch, heads, queries, v_columns))
    sizes = (batch, heads, key_heads, queries, tokens, k_capacity, v_capacity, *strides)
    library.qpass_attention(
        *k_matrix.arguments,
        *v_matrix.arguments,
        queries_fp32.data_ptr(),
        None if mask is None else mask.data_ptr(),
        (ctypes.c_int64 * len(sizes))(*sizes),
        0 if mask is None else (1 if mask.dtype == torch.bool else 2),
        is_causal,
        width**-0.5 if scale is None else scale,
        y.data_ptr(),
        _DTYPES[q.dtype],
        torch.get_num_threads(),
    )
    return y


for _name, _function in (
    ("linear", linear),
    ("embedding", embedding),
    ("quantize", quantize),
    ("dequantize", dequantize),
    ("attention", attention),
):
    LIBRARY.impl(_name, _function, "CPU")
