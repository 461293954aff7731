"""What kernels are told of stored parts: checked, since they believe it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpass.packing import packed_length
from qpass.spec import QuantSpec, parse_spec

#: Type of a scale -> its number in unpacking.py; 8-bit floats are passed as their bytes.
_FLOAT, _E8M0, _E4M3, _BYTE = range(4)


@dataclass(frozen=True, eq=False)
class Parts:
    """Stored parts of a matrix of `rows` rows, contiguous; `blocks`: scales of a row. Strides of rows: 0 where all share."""

    spec: QuantSpec
    rows: int
    blocks: int
    data: Tensor
    scale: Tensor | None
    zero: Tensor | None
    outer: Tensor | None
    scale_kind: int

    @property
    def scale_stride(self) -> int:
        """0 for a scale for all."""
        return self.blocks if self.scale is not None and self.scale.numel() > self.blocks else 0

    @property
    def zero_width(self) -> int:
        """Elements of a row of zero points."""
        return 0 if self.zero is None else self.zero.shape[-1]

    @property
    def zero_stride(self) -> int:
        """0 for a zero point for all."""
        return self.zero_width if self.zero is not None and self.zero.numel() > self.zero_width else 0

    @property
    def outer_stride(self) -> int:
        """0 for an outer scale for all."""
        return int(self.outer is not None and self.outer.numel() > 1)


@cache
def layout_of(text: str, columns: int) -> tuple[int, int, tuple[torch.dtype, ...], int]:
    """Of columns in a spec: bytes of a row, its blocks, types of its scales, their kind."""
    spec = parse_spec(text)
    fmt = spec.format
    group = spec.group_size
    width = packed_length(columns, fmt.bits) if fmt.bits < 8 else columns
    blocks = -(-columns // group) if group else 1
    if spec.granularity is None:
        return width, blocks, (), _FLOAT
    if spec.double_quantized:
        return width, blocks, (torch.uint8,), _BYTE
    if fmt.scale == "e8m0":
        return width, blocks, (torch.float8_e8m0fnu, torch.uint8), _E8M0
    if fmt.scale == "e4m3":
        return width, blocks, (torch.float8_e4m3fn, torch.uint8), _E4M3
    return width, blocks, (spec.scale_dtype,), _FLOAT


def parts_of(parts: tuple[Tensor | None, ...], columns: int, text: str) -> Parts | None:
    """(data, scale, zero_point, outer_scale) as kernels take them; None if they are not what the spec says of `columns`."""
    data, scale, zero, outer = parts
    spec = parse_spec(text)
    fmt = spec.format
    width, blocks, scale_types, kind = layout_of(text, columns)
    bytes_too = (torch.uint8,) if fmt.kind == "float8" else ()
    if data is None or data.dtype not in (fmt.storage, *bytes_too) or not data.numel() or data.shape[-1] != width:
        return None
    rows = data.numel() // width
    if (scale is not None) != bool(scale_types) or (zero is not None) != spec.has_zero_point:
        return None
    if scale is not None and (scale.dtype not in scale_types or scale.numel() not in (blocks, rows * blocks)):
        return None
    if zero is not None:
        assert scale is not None
        packed = fmt.bits < 8 and not spec.float_zero
        zero_width = packed_length(blocks, fmt.bits) if packed else blocks
        kept = spec.scale_dtype if spec.float_zero else fmt.storage
        if zero.dtype != kept or zero.numel() * blocks != scale.numel() * zero_width:
            return None
    if (outer is not None) != (kind in (_E4M3, _BYTE)):
        return None
    if outer is not None and (outer.dtype != torch.float32 or outer.numel() not in (1, rows)):
        return None
    if any(p is not None and p.device != data.device for p in (scale, zero, outer)):
        return None
    scale, zero, outer = (None if p is None else as_bytes(p).contiguous() for p in (scale, zero, outer))
    return Parts(spec, rows, blocks, as_bytes(data).contiguous(), scale, zero, outer, kind)


def as_bytes(part: Tensor) -> Tensor:
    """8-bit types as bytes; signed integers too."""
    return part.view(torch.uint8) if part.dtype.itemsize == 1 and part.dtype != torch.uint8 else part
