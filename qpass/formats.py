"""Number formats: one row each. A new format is one row here; packing and numerics follow from its fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from qpass.errors import QpassError, nearest

#: QLoRA (Dettmers et al. 2023), appendix E: quantiles of N(0,1) in [-1, 1], with an exact zero.
NF4_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
#: OCP Microscaling Formats (MX) v1.0, section 5.3.3: E2M1 in bit-pattern order, the sign in bit 3.
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

Kind = Literal["identity", "uniform", "float8", "codebook"]
#: How a scale is stored: a float, an eight-bit exponent (E8M0), or E4M3 times one float per tensor.
ScaleKind = Literal["none", "float", "e8m0", "e4m3"]


@dataclass(frozen=True)
class Format:
    """One number format.

    `qmin`, `qmax`: the range of the codes for a uniform format, of the element values otherwise.
    `group_size`: elements that share a scale when a spec names no granularity (0: one scale a row).
    """

    name: str
    kind: Kind
    bits: int
    qmin: float
    qmax: float
    storage: torch.dtype
    scale: ScaleKind = "float"
    group_size: int = 0
    codebook: tuple[float, ...] | None = None
    onnx_dtype: str | None = None

    @property
    def symmetric_qmax(self) -> float:
        """Largest magnitude in symmetric use: 127, 7, 3, 1 (the most negative integer is left out)."""
        return min(-self.qmin, self.qmax)


def _uniform(bits: int, onnx_dtype: str | None, group_size: int) -> Format:
    half = 2 ** (bits - 1)
    storage = torch.int8 if bits == 8 else torch.uint8
    return Format(f"int{bits}", "uniform", bits, -half, half - 1, storage, "float", group_size, onnx_dtype=onnx_dtype)


_E4M3 = (-448.0, 448.0, torch.float8_e4m3fn)
_E5M2 = (-57344.0, 57344.0, torch.float8_e5m2)

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        Format("fp32", "identity", 32, 0, 0, torch.float32, "none", onnx_dtype="FLOAT"),
        Format("bf16", "identity", 16, 0, 0, torch.bfloat16, "none", onnx_dtype="BFLOAT16"),
        Format("fp16", "identity", 16, 0, 0, torch.float16, "none", onnx_dtype="FLOAT16"),
        Format("fp8_e4m3", "float8", 8, *_E4M3, onnx_dtype="FLOAT8E4M3FN"),
        Format("fp8_e5m2", "float8", 8, *_E5M2, onnx_dtype="FLOAT8E5M2"),
        Format("mxfp8", "float8", 8, *_E4M3, "e8m0", 32),
        _uniform(8, "INT8", 0),
        _uniform(6, None, 32),
        _uniform(5, None, 32),
        _uniform(4, "INT4", 128),
        _uniform(3, None, 128),
        _uniform(2, "INT2", 128),
        Format("nf4", "codebook", 4, -1.0, 1.0, torch.uint8, "float", 64, NF4_VALUES),
        Format("fp4_e2m1", "codebook", 4, -6.0, 6.0, torch.uint8, "float", 32, E2M1_VALUES, "FLOAT4E2M1"),
        Format("mxfp4", "codebook", 4, -6.0, 6.0, torch.uint8, "e8m0", 32, E2M1_VALUES, "FLOAT4E2M1"),
        Format("nvfp4", "codebook", 4, -6.0, 6.0, torch.uint8, "e4m3", 16, E2M1_VALUES, "FLOAT4E2M1"),
    )
}


def get_format(name: str) -> Format:
    """The format called `name`; `QpassError` with the nearest name if there is none."""
    if name not in FORMATS:
        raise QpassError(f"unknown format {name!r}: {nearest(name, FORMATS)}")
    return FORMATS[name]
