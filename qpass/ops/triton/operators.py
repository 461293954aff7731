"""torch.ops.qpass on GPU tensors: shapes, types and layout are seen to here; what no kernel takes, the reference does."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass import numerics
from qpass.granularity import PerTensor, PerTokens
from qpass.ops import reference
from qpass.ops.schemas import LIBRARY
from qpass.ops.triton.caches import attention as attention
from qpass.ops.triton.launching import HALVES, attempt, codebook, eights, kernels_of, nf4_table, permutes_bytes, serves
from qpass.ops.triton.stored import Parts, as_bytes, layout_of, parts_of
from qpass.ops.triton.table import MOST_ROWS, UNIT, Tiles, bitstream_tiles, device_of, fused_kind, split_of, tiles_of
from qpass.ops.triton.workspace import counters
from qpass.rotation import rotate
from qpass.spec import QuantSpec, parse_spec

_FLOATS = (torch.float32, *HALVES)
#: Columns of a row that a program of rows_kernel takes at most.
_COLUMNS = 2048


# --- linear -----------------------------------------------------------------------------------------------------------


def linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """[.., K] -> [.., N]. Few rows through a kernel that reads the stored weight, more through the dequantized one."""
    k, stored = x.shape[-1], (data, scale, zero_point, outer_scale)
    if not serves(x, *stored, bias) or x.dtype not in _FLOATS or not x.numel():
        return reference.linear(x, *stored, bias, spec)
    parts = parts_of(stored, k, spec)
    if parts is None:
        return reference.linear(x, *stored, bias, spec)
    count = x.numel() // k
    kind = fused_kind(spec, k, x.dtype) if count <= MOST_ROWS[x.dtype] else None
    if kind and (bias is None or bias.shape == (parts.rows,)) and parts.data.data_ptr() % 16 == 0:
        rows = x.reshape(count, k).contiguous()
        fused = _bitstream if kind == "BITSTREAM" else _fused
        y = attempt(f"linear {spec} of {x.dtype}", x.device, lambda: fused(rows, parts, bias, kind))
        if y is not None:
            return y.view(*x.shape[:-1], parts.rows)
    weight = dequantize(*stored, k, spec, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


def _fused(x: Tensor, parts: Parts, bias: Tensor | None, kind: str) -> Tensor:
    """[M, K] -> [M, N] by linear_kernel."""
    unpacking, bits = kernels_of("unpacking"), parts.spec.format.bits
    (m, k), n, words = x.shape, parts.rows, x.shape[1] * bits // 32
    tiles = tiles_of(m, bits)
    shared = _shared(x, n, words, tiles)
    number = getattr(unpacking, kind).value
    y = x.new_empty((m, n))
    kernels_of("linear").linear_kernel[shared.grid](
        x, parts.data.view(torch.int32), parts.scale, parts.zero, parts.outer, None if bias is None else bias.contiguous(),
        nf4_table({kind}, x.dtype, x.device), y, shared.partial, shared.counters,
        m, n, k, words, parts.blocks, parts.scale_stride, parts.zero_stride, parts.outer_stride, shared.chunk,
        KIND=number, PLANES=16 // bits, UNIT=unpacking.unit_of(number, x.dtype), PRMT=permutes_bytes(x.device),
        GROUP=parts.spec.group_size, SCALE=parts.scale_kind, ZERO=int(parts.zero is not None), SPLIT=shared.grid[1],
        BM=tiles.rows, BN=tiles.outputs, BW=tiles.words, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def _bitstream(x: Tensor, parts: Parts, bias: Tensor | None, kind: str) -> Tensor:
    """[M, K] -> [M, N] by bitstream_kernel."""
    (m, k), n, units = x.shape, parts.rows, x.shape[1] // UNIT
    tiles, bits = bitstream_tiles(m), parts.spec.format.bits
    shared = _shared(x, n, units, tiles)
    y = x.new_empty((m, n))
    kernels_of("bitstream").bitstream_kernel[shared.grid](
        x, parts.data.view(torch.int32), parts.scale, parts.zero, parts.outer, eights(x.device),
        None if bias is None else bias.contiguous(), y, shared.partial, shared.counters,
        m, n, k, units, parts.blocks, parts.scale_stride, parts.zero_stride, parts.zero_width, parts.outer_stride, shared.chunk,
        BITS=bits, GROUP=parts.spec.group_size, SCALE=parts.scale_kind, FLOAT_ZERO=parts.spec.float_zero,
        SPLIT=shared.grid[1], BM=tiles.rows, BN=tiles.outputs, BU=tiles.words, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


@dataclass(frozen=True)
class _Shared:
    """How programs share a product: so many along (outputs, columns), each with `chunk` pieces of a row; what they sum in."""

    grid: tuple[int, int]
    chunk: int
    partial: Tensor | None = None
    counters: Tensor | None = None


def _shared(x: Tensor, outputs: int, pieces: int, tiles: Tiles) -> _Shared:
    """Of x [M, K] with weights of so many words, or units, in a row."""
    programs = -(-outputs // tiles.outputs)
    split = split_of(outputs, pieces, tiles, device_of(x.device).multiprocessors)
    zeros = counters(programs, x.device) if split > 1 else None
    chunk = pieces if zeros is None else -(-pieces // split)
    chunk = -(-chunk // tiles.words) * tiles.words
    split = -(-pieces // chunk)
    if split == 1:
        return _Shared((programs, 1), chunk)
    return _Shared((programs, split), chunk, x.new_empty((split, len(x), outputs), dtype=torch.float32), zeros)


# --- embedding, dequantize --------------------------------------------------------------------------------------------


@cache
def _rows_kind(text: str) -> int | None:
    """How rows_kernel reads codes of a format; None if it does not."""
    rows, fmt = kernels_of("rows"), parse_spec(text).format
    if fmt.kind == "uniform" and fmt.bits in (2, 3, 4, 5, 6, 8):
        return rows.UNIFORM.value
    if fmt.codebook is not None and fmt.bits == 4 and len(fmt.codebook) == 16:
        return rows.CODEBOOK.value
    if fmt.kind == "float8":
        return rows.FLOAT8_E4M3.value if fmt.storage == torch.float8_e4m3fn else rows.FLOAT8_E5M2.value
    return None


def _rows(parts: Parts, ids: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, or [ids, columns]."""
    fmt, kind = parts.spec.format, _rows_kind(str(parts.spec))
    count = parts.rows if ids is None else ids.numel()
    y = parts.data.new_empty((count, columns), dtype=dtype)
    if not count:
        return y
    tile = min(_COLUMNS, 1 << max(5, (columns - 1).bit_length()))
    table = codebook(fmt.codebook, y.device) if fmt.codebook else None
    kernels_of("rows").rows_kernel[(count, -(-columns // tile))](
        parts.data, parts.scale, parts.zero, parts.outer, table, ids, y,
        parts.rows, columns, parts.data.shape[-1], parts.blocks, parts.zero_width,
        parts.scale_stride, parts.zero_stride, parts.outer_stride,
        KIND=kind, BITS=fmt.bits, MIDDLE=int(-fmt.qmin) if fmt.kind == "uniform" else 0, GROUP=parts.spec.group_size,
        SCALE=parts.scale_kind, FLOAT_ZERO=parts.spec.float_zero, COLUMNS=tile, num_warps=4,
    )  # fmt: skip
    return y


def _readable(stored: tuple[Tensor | None, ...], columns: int, spec: str, dtype: torch.dtype) -> Parts | None:
    """The parts, if rows_kernel reads them."""
    if not serves(*stored) or dtype not in _FLOATS or not columns or _rows_kind(spec) is None:
        return None
    parts = parts_of(stored, columns, spec)
    only = None if parts is None else parts.spec.of_caches_only
    return parts if only in (None, "rotated") else None


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
    stored = (data, scale, zero_point, outer_scale)
    parts = _readable(stored, columns, spec, dtype)
    if parts is None:
        return reference.dequantize(*stored, columns, spec, dtype)
    made_as = torch.float32 if parts.spec.rotated else dtype
    y = attempt(f"dequantize {spec}", data.device, lambda: _rows(parts, None, columns, made_as))
    if y is None:
        return reference.dequantize(*stored, columns, spec, dtype)
    return (rotate(y).to(dtype) if parts.spec.rotated else y).view(*data.shape[:-1], columns)


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
    """[..] -> [.., columns]: only the named rows are read. An index outside of the table gives a row of NaN."""
    stored = (data, scale, zero_point, outer_scale)
    parts = _readable(stored, columns, spec, dtype) if indices.device == data.device else None
    if parts is not None and not parts.spec.rotated:
        y = attempt(
            f"embedding {spec}", data.device, lambda: _rows(parts, indices.contiguous().view(-1), columns, dtype)
        )
        if y is not None:
            return y.view(*indices.shape, columns)
    return reference.embedding(indices, *stored, columns, spec, dtype)


#: The widest row that quantize_kernel takes.
_WIDEST = 4096


def quantize(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """[.., K] -> the parts that the spec has. In a CUDA graph no scale is checked, which would ask the device: one that overflows
    is infinite there."""
    captured = x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    parsed = parse_spec(spec)
    if _is_written(x, parsed, static_scale):
        rows = rotate(x.float()) if parsed.rotated else x
        made = attempt(
            f"quantize {spec} of {rows.dtype}", x.device, lambda: _quantize(rows.contiguous(), parsed, static_scale)
        )
        unchecked = captured or made is None or len(made) < 2 or made[1].dtype.itemsize == 1
        if made is not None and (unchecked or not bool(torch.isinf(made[1]).any())):
            return made
    done = numerics.quantize(x, parsed, static_scale=static_scale, checked=not captured)
    return [part.contiguous() for part in done.parts if part is not None]


def _is_written(x: Tensor, spec: QuantSpec, static_scale: Tensor | None) -> bool:
    """Whether the kernel does it: rows that fit a program, scales of them or of groups of a power of two, or none."""
    if x.dtype not in _FLOATS or not x.numel() or x.shape[-1] > _WIDEST or not serves(x, static_scale):
        return False
    if spec.is_identity or spec.format.scale == "e4m3" or isinstance(spec.granularity, PerTensor | PerTokens):
        return False
    of_heads = x.dim() == 4 and static_scale is not None and static_scale.shape == (1, x.shape[1], 1, x.shape[3])
    return not spec.group_size & (spec.group_size - 1) and (of_heads if spec.static else static_scale is None)


def _quantize(x: Tensor, spec: QuantSpec, static_scale: Tensor | None) -> list[Tensor]:
    """The parts of contiguous rows."""
    fmt, k = spec.format, x.shape[-1]
    made = reference.quantized_like(x, str(spec))
    slots: list[Tensor | None] = [None] * 4
    for slot, part in zip(spec.stored_parts, made, strict=True):
        slots[slot] = as_bytes(part)
    data, scale, zero, outer = slots
    assert data is not None
    group, count = spec.group_size, x.numel() // k
    padded = max(1 << (k - 1).bit_length(), group, 8)
    per_program = max(1, min(8, 2048 // padded))
    low, high = spec.qrange if fmt.kind == "uniform" else (fmt.qmin, fmt.symmetric_qmax)
    info = torch.finfo(spec.scale_dtype)
    tiny = info.smallest_normal * (info.eps if spec.scale_dtype == torch.float16 else 1)  # as numerics has it
    middles = () if fmt.codebook is None else _middles(fmt.codebook)
    kernels_of("quantizing").quantize_kernel[(-(-count // per_program),)](
        x, data, scale, zero, outer, None if static_scale is None else static_scale.contiguous(),
        codebook(middles, x.device) if middles else None,
        count, k, data.shape[-1], 0 if scale is None else scale.shape[-1], 0 if zero is None else zero.shape[-1],
        x.shape[-2] if x.dim() > 1 else 1, x.shape[1] if spec.static else 1,
        KIND=_rows_kind(str(spec)), BITS=fmt.bits, FROM=int(fmt.qmin) if fmt.kind == "uniform" and fmt.bits < 8 else 0,
        LOW=float(low), HIGH=float(high), GROUP=group or padded, SCALE=layout_of(str(spec), k)[3], TINY=tiny,
        EMAX=math.frexp(fmt.qmax)[1], CEIL=spec.scale_rounding == "rceil", SYMMETRIC=spec.symmetric, FLOAT_ZERO=spec.float_zero,
        MIDDLES=len(middles), SIGNED=bool(middles) and middles[0] > 0, ROWS=per_program, COLUMNS=padded, num_warps=4,
    )  # fmt: skip
    return made


@cache
def _middles(values: tuple[float, ...]) -> tuple[float, ...]:
    """Between the values of a codebook in ascending order, in float32; where its upper half is the lower one negated, of that."""
    grid = torch.tensor(values[: len(values) // 2] if values[0] == 0 else values)
    return tuple(((grid[1:] + grid[:-1]) / 2).tolist())


for _name, _function in (("embedding", embedding), ("dequantize", dequantize)):
    LIBRARY.impl(_name, _function, "CUDA")
