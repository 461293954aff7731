"""torch.ops.qpass on GPU tensors: shapes, types and layout are seen to here; what no kernel takes, the reference does."""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.ops import reference
from qpass.ops.schemas import LIBRARY
from qpass.ops.triton.stored import Parts, parts_of
from qpass.ops.triton.table import device_of, fused_kind, most_rows, split_of, tiles_of
from qpass.rotation import rotate
from qpass.spec import parse_spec

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: What the fused kernel multiplies.
_HALVES = (torch.bfloat16, torch.float16)
#: Files of kernels, and their kernels.
KERNELS = {"linear": ("linear_kernel",), "rows": ("rows_kernel",)}
#: Columns of a row that a program of rows_kernel takes at most.
_COLUMNS = 2048


@cache
def available() -> bool:
    """Whether triton is installed."""
    return importlib.util.find_spec("triton") is not None


@cache
def _module(name: str) -> Any:
    """A file of kernels, which imports triton."""
    return importlib.import_module(f"qpass.ops.triton.{name}")


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there: on a GPU that they are for, and where Triton interprets them, on the CPU."""
    if not available() or device.type not in ("cuda", "cpu"):
        return False
    return device_of(device).served if device.type == "cuda" else bool(_module("triton_private").interpreted())


def _serves(*tensors: Tensor | None) -> bool:
    """Whether all are where kernels run."""
    first = tensors[0]
    return first is not None and runs_on(first.device) and all(t is None or t.device == first.device for t in tensors)


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
    if not _serves(x, *stored, bias) or x.dtype not in _FLOATS or not x.numel():
        return reference.linear(x, *stored, bias, spec)
    parts = parts_of(stored, k, spec)
    if parts is None:
        return reference.linear(x, *stored, bias, spec)
    count = x.numel() // k
    kind = fused_kind(spec, k)
    fused = kind is not None and x.dtype in _HALVES and count <= most_rows(parts.spec)
    if fused and (bias is None or bias.shape == (parts.rows,)) and parts.data.data_ptr() % 16 == 0:
        assert kind is not None
        return _fused(x.reshape(count, k).contiguous(), parts, bias, kind).view(*x.shape[:-1], parts.rows)
    weight = dequantize(*stored, k, spec, x.dtype)
    return F.linear(x, weight, None if bias is None else bias.to(x.dtype)).contiguous()


def _fused(x: Tensor, parts: Parts, bias: Tensor | None, kind: str) -> Tensor:
    """[M, K] -> [M, N]."""
    kernels, unpacking = _module("linear"), _module("unpacking")
    (m, k), n, bits = x.shape, parts.rows, parts.spec.format.bits
    device = device_of(x.device)
    tiles = tiles_of(m, bits)
    data = parts.data.view(torch.int32)
    words = k * bits // 32
    programs = -(-n // tiles.outputs)
    split = split_of(n, words, tiles, device.multiprocessors)
    shared = _module("workspace").counters(programs, x.device) if split > 1 else None
    if shared is None:
        split = 1
    chunk = -(-words // split)
    chunk = -(-chunk // tiles.words) * tiles.words
    split = -(-words // chunk)
    number = getattr(unpacking, kind).value
    y = x.new_empty((m, n))
    kernels.linear_kernel[(programs, split)](
        x, data, parts.scale, parts.zero, parts.outer, None if bias is None else bias.contiguous(),
        _patterns(x.dtype, x.device) if kind == "NF4" and not _permutes_bytes(x.device) else None,
        y, x.new_empty((split, m, n), dtype=torch.float32) if split > 1 else None, shared if split > 1 else None,
        m, n, k, words, parts.blocks, parts.scale_stride, parts.zero_stride, parts.outer_stride, chunk,
        KIND=number, PLANES=16 // bits, UNIT=unpacking.unit_of(number, x.dtype), PRMT=_permutes_bytes(x.device),
        GROUP=parts.spec.group_size, SCALE=parts.scale_kind, ZERO=int(parts.zero is not None), SPLIT=split,
        BM=tiles.rows, BN=tiles.outputs, BW=tiles.words, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    return y


def _permutes_bytes(device: torch.device) -> bool:
    """Whether the device has NVIDIA's prmt."""
    return device.type == "cuda" and device_of(device).capability is not None


@cache
def _patterns(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(_module("unpacking").nf4_patterns(dtype), dtype=torch.int32, device=device)


# --- embedding, dequantize --------------------------------------------------------------------------------------------


@cache
def _rows_kind(text: str) -> int | None:
    """How rows_kernel reads codes of a format; None if it does not."""
    rows, fmt = _module("rows"), parse_spec(text).format
    if fmt.kind == "uniform" and fmt.bits in (2, 3, 4, 5, 6, 8):
        return rows.UNIFORM.value
    if fmt.codebook is not None and fmt.bits == 4 and len(fmt.codebook) == 16:
        return rows.CODEBOOK.value
    if fmt.kind == "float8":
        return rows.FLOAT8_E4M3.value if fmt.storage == torch.float8_e4m3fn else rows.FLOAT8_E5M2.value
    return None


@cache
def _codebook(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _rows(parts: Parts, ids: Tensor | None, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, columns] in `dtype`, or [ids, columns]."""
    fmt, kind = parts.spec.format, _rows_kind(str(parts.spec))
    count = parts.rows if ids is None else ids.numel()
    y = parts.data.new_empty((count, columns), dtype=dtype)
    if not count:
        return y
    tile = min(_COLUMNS, 1 << max(5, (columns - 1).bit_length()))
    table = _codebook(fmt.codebook, y.device) if fmt.codebook else None
    _module("rows").rows_kernel[(count, -(-columns // tile))](
        parts.data, parts.scale, parts.zero, parts.outer, table, ids, y,
        parts.rows, columns, parts.data.shape[-1], parts.blocks, parts.zero_width,
        parts.scale_stride, parts.zero_stride, parts.outer_stride,
        KIND=kind, BITS=fmt.bits, MIDDLE=int(-fmt.qmin) if fmt.kind == "uniform" else 0, GROUP=parts.spec.group_size,
        SCALE=parts.scale_kind, FLOAT_ZERO=parts.spec.float_zero, COLUMNS=tile, num_warps=4,
    )  # fmt: skip
    return y


def _readable(stored: tuple[Tensor | None, ...], columns: int, spec: str, dtype: torch.dtype) -> Parts | None:
    """The parts, if rows_kernel reads them."""
    if not _serves(*stored) or dtype not in _FLOATS or not columns or _rows_kind(spec) is None:
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
    if parts.spec.rotated:
        return rotate(_rows(parts, None, columns, torch.float32)).to(dtype).view(*data.shape[:-1], columns)
    return _rows(parts, None, columns, dtype).view(*data.shape[:-1], columns)


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
    if parts is None or parts.spec.rotated:
        return reference.embedding(indices, *stored, columns, spec, dtype)
    return _rows(parts, indices.contiguous().view(-1), columns, dtype).view(*indices.shape, columns)


for _name, _function in (("embedding", embedding), ("dequantize", dequantize)):
    LIBRARY.impl(_name, _function, "CUDA")
