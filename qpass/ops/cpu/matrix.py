"""What a kernel is told of a quantized matrix: its spec as a C struct, and where its stored parts lie."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qpass.formats import Format
from qpass.ops.around import Around
from qpass.packing import packed_length
from qpass.rotation import rotation
from qpass.spec import QuantSpec, parse_spec

#: Activation type -> enum Dtype of weight.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KINDS = {"fp32": 0, "bf16": 1, "fp16": 2, "fp8_e4m3": 3, "mxfp8": 3, "fp8_e5m2": 4, "int8": 5}
_CODES, _CODEBOOK = 6, 7
#: Bits of packed integers that kernels unpack, and values of a codebook.
_WIDTHS, _VALUES = (2, 3, 4, 5, 6), 16
_SCALES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3}


class SpecStruct(ctypes.Structure):
    """struct Spec of weight.h."""

    _fields_ = [
        *((name, ctypes.c_int32) for name in ("kind", "bits", "group", "tokens", "scale", "zero_point", "ceil")),
        ("unit", ctypes.c_float),
        ("codebook", ctypes.c_float * _VALUES),
        ("integers", ctypes.c_int8 * _VALUES),
    ]


@dataclass(frozen=True)
class CpuSpec:
    """A spec, and the same for the kernels."""

    spec: QuantSpec
    struct: SpecStruct
    address: int

    def blocks(self, columns: int) -> int:
        """Scales of a row, or of a group of tokens."""
        g = self.spec.group_size
        return columns if self.struct.tokens else -(-columns // g) if g else 1


def _unit(fmt: Format) -> float:
    """What the values of a codebook are multiples of, for int8 products: E2M1 has halves; others are rounded to 127ths."""
    if not fmt.codebook:
        return 1.0
    return 0.5 if all((2 * value).is_integer() for value in fmt.codebook) else 1 / 127


@cache
def has_kernels(text: str) -> bool:
    """Whether kernels read codes of this format; a row that is added to the table may have any width."""
    fmt = parse_spec(text).format
    if fmt.codebook:
        return fmt.bits == 4 and len(fmt.codebook) == _VALUES and max(map(abs, fmt.codebook)) <= 127 * _unit(fmt)
    return fmt.name in _KINDS or (fmt.kind == "uniform" and fmt.bits in _WIDTHS)


@cache
def cpu_spec(text: str) -> CpuSpec:
    spec = parse_spec(text)
    fmt = spec.format
    book, unit = fmt.codebook or (), _unit(fmt)
    if spec.granularity is None:
        scale = 0
    elif spec.double_quantized:
        scale = 6
    else:
        scale = {"e8m0": 4, "e4m3": 5}.get(fmt.scale) or _SCALES[spec.scale_dtype]
    struct = SpecStruct(
        _KINDS.get(fmt.name, _CODEBOOK if book else _CODES),
        fmt.bits,
        spec.group_size,
        spec.tokens,
        scale,
        spec.has_zero_point + spec.float_zero,
        spec.scale_rounding != "floor",
        unit,
        (ctypes.c_float * _VALUES)(*book),
        (ctypes.c_int8 * _VALUES)(*(round(v / unit) for v in book)),
    )
    return CpuSpec(spec, struct, ctypes.addressof(struct))


def contiguous(part: Tensor | None) -> Tensor | None:
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
    known = cpu_spec(text)
    fmt = known.spec.format
    width = packed_length(k, fmt.bits) if fmt.bits < 8 else k
    bytes_too = (torch.uint8,) if fmt.kind == "float8" else ()
    return width, known.blocks(k), (fmt.storage, *bytes_too), _SCALE_TYPES.get(known.struct.scale, ())


def fits(parts: tuple[Tensor | None, ...], k: int, text: str) -> bool:
    """Whether the stored parts are what the spec says of k columns: a kernel believes it. The reference sees to the rest."""
    data, scale, zero, outer = parts
    if not has_kernels(text):
        return False
    width, blocks, data_types, scale_types = _layout(text, k)
    if data is None or data.dtype not in data_types or data.shape[-1] != width:
        return False
    rows = data.numel() // width
    spec, tokens = cpu_spec(text).spec, cpu_spec(text).struct.tokens
    if tokens:
        rows = rows // data.shape[-2] * -(-data.shape[-2] // tokens)
    if (scale is not None) != bool(scale_types) or (zero is not None) != spec.has_zero_point:
        return False
    if scale is not None and (scale.dtype not in scale_types or scale.numel() not in (blocks, rows * blocks)):
        return False
    if zero is not None and spec.float_zero:
        if zero.dtype != scale.dtype or zero.shape != scale.shape:  # type: ignore[union-attr]
            return False
    elif zero is not None:
        zero_width = packed_length(blocks, spec.format.bits) if spec.format.bits < 8 else blocks
        if zero.dtype != spec.format.storage or zero.numel() * blocks != scale.numel() * zero_width:  # type: ignore[union-attr]
            return False
    return outer is None or (outer.dtype == torch.float32 and outer.numel() in (1, rows))


class AroundStruct(ctypes.Structure):
    """struct Around of extras.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("norm", "columns", "residual")),
        ("eps", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("normalizes", "norm_dtype", "gate")),
    ]


#: Gate -> enum Gate of extras.h.
_GATES = {name: i for i, name in enumerate(("", "silu", "gelu", "gelu_tanh"))}


def around_struct(around: Around, x: Tensor, n: int) -> AroundStruct | None:
    """What a kernel is told to do beside the product of x [.., K] with n rows; None if it cannot."""
    norm, columns, residual = around.norm, around.column_scale, around.residual
    k, width = x.shape[-1], n // 2 if around.gate else n
    if norm is not None and (norm.shape != (k,) or norm.dtype not in DTYPES or not norm.is_contiguous()):
        return None
    if columns is not None and (columns.shape != (k,) or columns.dtype != torch.float32 or not columns.is_contiguous()):
        return None
    shape = (*x.shape[:-1], width)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype or not residual.is_contiguous()):
        return None
    if around.gate and n % 2:
        return None
    return AroundStruct(
        *(None if t is None else t.data_ptr() for t in (norm, columns, residual)),
        around.eps or 0.0,
        around.eps is not None,
        0 if norm is None else DTYPES[norm.dtype],
        _GATES[around.gate],
    )


class FrameStruct(ctypes.Structure):
    """struct Frame of extras.h."""

    _fields_ = [("rotation", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("heads", ctypes.c_int64)]


@cache
def _rotation(columns: int) -> Tensor:
    return rotation(columns).contiguous()


class Frame:
    """How rows of `columns` are changed before they are stored: `rotation`, an address or None; static scales of `heads`."""

    def __init__(self, spec: QuantSpec, columns: int, static_scale: Tensor | None) -> None:
        self.rotation = _rotation(columns).data_ptr() if spec.rotated else None
        self.scale, self.heads = None, 0
        if spec.static and static_scale is not None:
            self.scale = static_scale.to(torch.float32).expand(*static_scale.shape[:-1], columns).contiguous()
            self.heads = self.scale.numel() // columns
        self.struct = FrameStruct(self.rotation, None if self.scale is None else self.scale.data_ptr(), self.heads)

    def is_given(self, static_scale: Tensor | None) -> bool:
        """Whether the kernel reads the static scale where it was given."""
        return self.scale is None or (static_scale is not None and self.scale.data_ptr() == static_scale.data_ptr())


class Matrix:
    """The arguments that name a matrix of n rows and k columns to a kernel; holds what they point to."""

    def __init__(self, parts: tuple[Tensor | None, ...], n: int, k: int, known: CpuSpec, cut: bool = False) -> None:
        """`cut`: the parts are views that the kernel steps through by itself."""
        self.known = known
        self.parts = data, scale, zero, outer = parts if cut else tuple(contiguous(p) for p in parts)
        assert data is not None
        self.arguments = (
            known.address,
            data.data_ptr(),
            None if scale is None else scale.data_ptr(),
            None if zero is None else zero.data_ptr(),
            None if outer is None else outer.data_ptr(),
            n,
            k,
            self._scale_rows(n, k),
            n if outer is not None and outer.numel() > 1 else 1,
        )

    def _scale_rows(self, n: int, k: int) -> int:
        """Rows that the scales have: n, or 1 where all share them; of scales for groups of tokens, the groups of a head."""
        scale = self.parts[1]
        if self.known.struct.tokens and scale is not None:
            return scale.shape[-2]
        return n if scale is not None and scale.numel() > self.known.blocks(k) else 1
