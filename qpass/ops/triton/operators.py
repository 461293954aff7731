"""torch.ops.qpass on GPU tensors: shapes, types and layout are seen to here; what no kernel takes, the reference does."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import constants_on
from qpass.ops import reference
from qpass.ops.around import Around
from qpass.ops.schemas import LIBRARY
from qpass.ops.triton.caches import attention as attention
from qpass.ops.triton.launching import (
    FLOATS,
    attempt,
    code_kind,
    eights,
    kernels_of,
    nf4_table,
    permutes_bytes,
    serves,
)
from qpass.ops.triton.stored import Parts, parts_of
from qpass.ops.triton.table import (
    MOST_ROWS,
    UNIT,
    Tiles,
    bitstream_tiles,
    device_of,
    fused_kind,
    most_rows,
    split_of,
    takes_norm_in,
    tiles_of,
)
from qpass.ops.triton.workspace import counters
from qpass.ops.triton.writing import append as append
from qpass.ops.triton.writing import append_rotated as append_rotated
from qpass.ops.triton.writing import quantize as quantize
from qpass.rotation import rotate

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
    *rest: Any,
) -> Tensor:
    """[.., K] -> [.., N]. Few rows through a kernel that reads the stored weight, more through the dequantized one.

    `rest`: what Around takes."""
    k, stored, around = x.shape[-1], (data, scale, zero_point, outer_scale), Around(*rest)
    tensors = (*stored, bias, around.norm, around.column_scale, around.residual)
    if not serves(x, *tensors) or x.dtype not in FLOATS or not x.numel():
        return reference.linear(x, *stored, bias, spec, *rest)
    parts = parts_of(stored, k, spec)
    if parts is None:
        return reference.linear(x, *stored, bias, spec, *rest)
    count = x.numel() // k
    kind = fused_kind(spec, k, x.dtype) if count <= most_rows(spec, x.dtype) else None
    fits = (bias is None or bias.shape == (parts.rows,)) and parts.data.data_ptr() % 16 == 0
    if kind and fits and _is_taken_in(around, x, parts.rows):
        rows = x.reshape(count, k).contiguous()
        y = attempt(f"linear {spec} of {x.dtype}", x.device, lambda: _product(rows, parts, bias, kind, around))
        if y is not None:
            return y.view(*x.shape[:-1], y.shape[1])
    weight = dequantize(*stored, k, spec, x.dtype)
    y = F.linear(_prepared(x, around), weight, None if bias is None else bias.to(x.dtype))
    return around.after(y).contiguous()


def _is_taken_in(around: Around, x: Tensor, outputs: int) -> bool:
    """Whether the kernels do what is around the product: no vector or residual is broadcast, or of another type."""
    residual = around.residual
    shape = (*x.shape[:-1], outputs // 2 if around.gate else outputs)
    alike = residual is None or (residual.shape == shape and residual.dtype == x.dtype)
    return alike and not (around.gate and outputs % 2) and _are_vectors(around, x.shape[-1])


def _are_vectors(around: Around, columns: int) -> bool:
    return all(v is None or v.shape == (columns,) for v in (around.norm, around.column_scale))


def _prepared(x: Tensor, around: Around) -> Tensor:
    """[.., K] -> [.., K], what is done before the product."""
    if around.changes_input and _are_vectors(around, x.shape[-1]):
        y = attempt(f"a norm of {x.dtype}", x.device, lambda: _norm(x.contiguous(), around))
        if y is not None:
            return y
    return around.before(x)


def _norm(x: Tensor, around: Around) -> Tensor:
    """The same by norm_kernel."""
    k = x.shape[-1]
    y = torch.empty_like(x)
    kernels_of("around").norm_kernel[(x.numel() // k,)](
        x, around.eps, _flat(around.norm), _flat(around.column_scale), y, k,
        COLUMNS=min(_COLUMNS, 1 << max(5, (k - 1).bit_length())), num_warps=4,
    )  # fmt: skip
    return y


def _product(x: Tensor, parts: Parts, bias: Tensor | None, kind: str, around: Around) -> Tensor:
    """[M, K] -> [M, N], or [M, N / 2] with a gate."""
    if around.changes_input and not takes_norm_in(len(x), parts.rows):
        x, around = _norm(x, around), around.behind
    kernel, most = _bitstream if kind == "BITSTREAM" else _fused, MOST_ROWS[x.dtype]
    y = x.new_empty((len(x), parts.rows // 2 if around.gate else parts.rows))
    residual = None if around.residual is None else around.residual.reshape(y.shape)
    readings = -(-len(x) // most)  # but for the first from the second cache, if it holds the weight
    count = -(-len(x) // readings)
    for start in range(0, len(x), count):
        some = slice(start, start + count)
        after = around if residual is None else replace(around, residual=residual[some])
        kernel(x[some], parts, bias, kind, after, y[some])
    return y


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _fused(x: Tensor, parts: Parts, bias: Tensor | None, kind: str, around: Around, y: Tensor) -> None:
    """By linear_kernel, to y."""
    unpacking, bits = kernels_of("unpacking"), parts.spec.format.bits
    (m, k), n, words = x.shape, parts.rows, x.shape[1] * bits // 32
    tiles = tiles_of(m, bits)
    shared = _shared(x, n, words, tiles)
    number, fours = getattr(unpacking, kind).value, words % 4 == 0
    kernels_of("linear").linear_kernel[shared.grid](
        x, parts.data.view(torch.int32), parts.scale, parts.zero, parts.outer, nf4_table({kind}, x.dtype, x.device),
        around.eps, _flat(around.norm), _flat(around.column_scale), _flat(bias), _flat(around.residual), y,
        shared.partial, shared.counters,
        m, n, k, words // 4 if fours else words,
        parts.blocks, parts.scale_stride, parts.zero_stride, parts.outer_stride, shared.chunk,
        KIND=number, PLANES=16 // bits, UNIT=unpacking.unit_of(number, x.dtype), PRMT=permutes_bytes(x.device),
        GROUP=parts.spec.group_size, SCALE=parts.scale_kind, ZERO=int(parts.zero is not None), SPLIT=shared.grid[1],
        FOURS=fours, GATE=kernels_of("around").NUMBERS[around.gate], ONE=m == 1,
        BM=tiles.rows, BN=tiles.outputs, BW=tiles.words, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


def _bitstream(x: Tensor, parts: Parts, bias: Tensor | None, kind: str, around: Around, y: Tensor) -> None:
    """By bitstream_kernel, to y."""
    (m, k), n, units = x.shape, parts.rows, x.shape[1] // UNIT
    tiles, bits = bitstream_tiles(m), parts.spec.format.bits
    shared = _shared(x, n, units, tiles)
    kernels_of("bitstream").bitstream_kernel[shared.grid](
        x, parts.data.view(torch.int32), parts.scale, parts.zero, parts.outer, eights(x.device),
        around.eps, _flat(around.norm), _flat(around.column_scale), _flat(bias), _flat(around.residual), y,
        shared.partial, shared.counters,
        m, n, k, units, parts.blocks, parts.scale_stride, parts.zero_stride, parts.zero_width, parts.outer_stride, shared.chunk,
        BITS=bits, GROUP=parts.spec.group_size, SCALE=parts.scale_kind, FLOAT_ZERO=parts.spec.float_zero, SPLIT=shared.grid[1],
        GATE=kernels_of("around").NUMBERS[around.gate],
        BM=tiles.rows, BN=tiles.outputs, BU=tiles.words, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip


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
    # Products, and the squares of x that each program has seen.
    sums = x.new_empty((split, len(x), outputs + programs), dtype=torch.float32)
    return _Shared((programs, split), chunk, sums, zeros)


# --- embedding, dequantize --------------------------------------------------------------------------------------------


def _rows(parts: Parts, ids: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, or [ids, columns]."""
    fmt, kind = parts.spec.format, code_kind(str(parts.spec))
    count = parts.rows if ids is None else ids.numel()
    y = parts.data.new_empty((count, columns), dtype=dtype)
    if not count:
        return y
    tile = min(_COLUMNS, 1 << max(5, (columns - 1).bit_length()))
    table = constants_on(fmt.codebook, y.device) if fmt.codebook else None
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
    if not serves(*stored) or dtype not in FLOATS or not columns or code_kind(spec) is None:
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


for _name, _function in (("embedding", embedding), ("dequantize", dequantize)):
    LIBRARY.impl(_name, _function, "CUDA")
