"""torch.ops.qpass on CPU tensors: shapes, types and layout are seen to here, the arithmetic is in kernels.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qpass.compute import compute_of
from qpass.errors import kept_for_cpp
from qpass.ops import cache_reference as cache_reference  # gives REFERENCES its own
from qpass.ops import reference
from qpass.ops import triton as on_gpu
from qpass.ops.around import Around
from qpass.ops.cpu.attention import attention
from qpass.ops.cpu.build import Kernels, cpu_features, kernels
from qpass.ops.cpu.library import c_functions, remember
from qpass.ops.cpu.matrix import DTYPES, Frame, Matrix, around_struct, cpu_spec, fits
from qpass.ops.schemas import BOUND, LIBRARY, REFERENCES
from qpass.spec import parse_spec

#: From this many rows of x on, a product in float goes through tiles of the dequantized weight and torch's own product.
WIDE = {"avx512-vnni": 1024, "avx512": 1024, "avx2": 33, "portable": 9}
#: The same for a bfloat16 product, in whatever type the kernels compute, where the processor multiplies bfloat16 itself.
WIDE_BF16 = 33
#: No limit to the rows of a call.
_ANY = 1 << 62
#: Elements of a tile: with the weight it comes from it stays in the caches.
_TILE = 1 << 20


def _most_rows(dtype: torch.dtype, int8: bool) -> int:
    """Of an input that a kernel multiplies itself; more of them go through tiles."""
    found = kernels()
    most = WIDE[found.isa] - 1 if isinstance(found, Kernels) and not int8 else _ANY
    return min(most, WIDE_BF16 - 1) if dtype == torch.bfloat16 and _has_bf16_products() else most


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
    """[.., K] -> [.., N]. One row and a few go through kernels that read the stored weight, many in float through tiles.

    `rest`: what Around takes."""
    library, dtype, around = c_functions(), DTYPES.get(x.dtype), Around(*rest)
    k, n = x.shape[-1], data.shape[0]
    if library is None or dtype is None or not (k and n) or not fits((data, scale, zero_point, outer_scale), k, spec):
        return reference.linear(x, data, scale, zero_point, outer_scale, bias, spec, *rest)
    known = cpu_spec(spec)
    int8 = compute_of(known.spec) == "int8"
    most_rows = _most_rows(x.dtype, int8)
    beside = around_struct(around, x, n)
    matrix_added = bias is not None and bias.shape != (n,)  # by addmm
    if beside is None or matrix_added or (rest and x.numel() // k > most_rows):
        added = None if matrix_added else bias
        y = linear(around.before(x), data, scale, zero_point, outer_scale, added, spec)
        return around.after(y + bias.to(x.dtype) if matrix_added and bias is not None else y)
    if not x.is_contiguous():
        x = x.contiguous()
    if bias is not None and (bias.dtype not in DTYPES or not bias.is_contiguous()):
        bias = bias.to(x.dtype).contiguous()
    count = x.numel() // k
    matrix = Matrix((data, scale, zero_point, outer_scale), n, k, known)
    if count > most_rows:
        return _through_tiles(library, x.reshape(count, k), matrix, n, bias).view(*x.shape[:-1], n)
    y = x.new_empty((*x.shape[:-1], n // 2 if around.gate else n))
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
            ctypes.addressof(beside),
            torch.get_num_threads(),
        )
        if all(a is b for a, b in zip(matrix.parts, (data, scale, zero_point, outer_scale), strict=True)):
            remember("linear", library.qpass_linear, matrix, rest=(most_rows, int8))
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
    library, n = c_functions(), data.shape[0]
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
    library = c_functions()
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
    """[.., K] -> the parts that the spec has, to the bit those of the reference, but for the last bit of a rotation."""
    library, s, k = c_functions(), parse_spec(spec), x.shape[-1]
    served = s.format.name in _WRITTEN and not s.double_quantized and str(s.granularity) != "tensor"
    heads = x.shape[-3] if x.dim() > 2 else 1
    if s.static:
        served = static_scale is not None and static_scale.shape in ((1, heads, 1, k), (1, 1, 1, k)) and x.dim() == 4
    if library is None or x.dtype not in DTYPES or not x.numel() or not served:
        return reference.quantize(x, spec, static_scale)
    x = x.contiguous()
    parts = reference.quantized_like(x, spec)
    slots: list[Tensor | None] = [None] * 4
    for slot, part in zip(s.stored_parts, parts, strict=True):
        slots[slot] = part
    matrix, frame = Matrix(tuple(slots), x.numel() // k, k, cpu_spec(spec)), Frame(s, k, static_scale)
    tokens = x.shape[-2] if x.dim() > 1 else 1
    bad = library.qpass_quantize(
        *matrix.arguments,
        x.data_ptr(),
        tokens,
        DTYPES[x.dtype],
        ctypes.addressof(frame.struct),
        torch.get_num_threads(),
    )
    if bad:
        return reference.quantize(x, spec, static_scale)  # which says what is wrong
    if frame.is_given(static_scale):
        remember("quantize", library.qpass_quantize, matrix, rest=(
            frame.rotation, frame.heads, x.numel() // k, k, tokens, sum(1 << slot for slot in s.stored_parts)
        ))  # fmt: skip
    return parts


def _on_any_device(
    on_cpu: Callable[..., Any], on_gpu: Callable[..., Any], elsewhere: Callable[..., Any]
) -> Callable[..., Any]:
    by_device = {"cpu": on_cpu, "cuda": on_gpu}

    def chosen(x: Tensor | list[Tensor], *rest: Any) -> Any:
        first = x if isinstance(x, Tensor) else x[0]
        return by_device.get(first.device.type, elsewhere)(x, *rest)

    return chosen


for _name, _function in (("embedding", embedding), ("dequantize", dequantize)):
    LIBRARY.impl(_name, _function, "CPU")
_on_cpu_here: dict[str, Callable[..., Any]] = {"linear": linear, "attention": attention, "quantize": quantize}
for _name in BOUND:  # the CPU's own key is binding.cpp's
    _reference = REFERENCES[_name]
    _on_cpu = _on_cpu_here.get(_name, _reference)
    _gpu = getattr(on_gpu.operators, _name, _reference)
    LIBRARY.impl(_name, _on_any_device(_on_cpu, _gpu, _reference), "CompositeExplicitAutograd")
    LIBRARY.impl(f"{_name}_checked", kept_for_cpp(_on_cpu), "CPU")
