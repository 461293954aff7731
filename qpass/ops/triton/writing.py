"""Floats to stored parts on GPUs: torch.ops.qpass.quantize."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from qpass import numerics
from qpass.granularity import PerTensor, PerTokens
from qpass.ops import reference
from qpass.ops.triton.launching import FLOATS, attempt, code_kind, codebook, kernels_of, serves
from qpass.ops.triton.stored import as_bytes, layout_of
from qpass.rotation import rotate
from qpass.spec import QuantSpec, parse_spec

#: The widest row that kernels write.
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
    if x.dtype not in FLOATS or not x.numel() or x.shape[-1] > _WIDEST or not serves(x, static_scale):
        return False
    if spec.is_identity or spec.format.scale == "e4m3" or isinstance(spec.granularity, PerTensor | PerTokens):
        return False
    of_heads = x.dim() == 4 and static_scale is not None and static_scale.shape == (1, x.shape[1], 1, x.shape[3])
    return not spec.group_size & (spec.group_size - 1) and (of_heads if spec.static else static_scale is None)


@dataclass(frozen=True, eq=False)
class _Target:
    """Parts that rows of `columns` are written to, as kernels take them: data, scale, zero point, outer scale as bytes or floats;
    what is divided by before."""

    spec: QuantSpec
    columns: int
    parts: tuple[Tensor | None, ...]
    given: Tensor | None

    @classmethod
    def of(cls, spec: QuantSpec, columns: int, parts: list[Tensor], given: Tensor | None) -> _Target:
        slots: list[Tensor | None] = [None] * 4
        for slot, part in zip(spec.stored_parts, parts, strict=True):
            slots[slot] = as_bytes(part)
        return cls(spec, columns, tuple(slots), None if given is None else given.contiguous())

    @property
    def padded(self) -> int:
        """The power of two that a row is wide in a program."""
        return max(1 << (self.columns - 1).bit_length(), self.spec.group_size, 8)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The parts, `given`, and the middles between the values of a codebook."""
        data = self.parts[0]
        assert data is not None
        return *self.parts, self.given, codebook(self._middles, data.device) if self._middles else None

    @property
    def widths(self) -> tuple[int, ...]:
        """Elements of a row of data, of scales, of zero points."""
        return tuple(0 if part is None else part.shape[-1] for part in self.parts[:3])

    @property
    def _middles(self) -> tuple[float, ...]:
        codes = self.spec.format.codebook
        return () if codes is None else _middles(codes)

    def constants(self, prefix: str = "") -> dict[str, Any]:
        """Arguments that are known when a kernel is compiled."""
        spec, fmt, middles = self.spec, self.spec.format, self._middles
        low, high = spec.qrange if fmt.kind == "uniform" else (fmt.qmin, fmt.symmetric_qmax)
        info = torch.finfo(spec.scale_dtype)
        tiny = info.smallest_normal * (info.eps if spec.scale_dtype == torch.float16 else 1)  # as numerics has it
        values = {
            "KIND": code_kind(str(spec)), "BITS": fmt.bits,
            "FROM": int(fmt.qmin) if fmt.kind == "uniform" and fmt.bits < 8 else 0, "LOW": float(low), "HIGH": float(high),
            "GROUP": spec.group_size or self.padded, "SCALE": layout_of(str(spec), self.columns)[3], "TINY": tiny,
            "EMAX": math.frexp(fmt.qmax)[1], "CEIL": spec.scale_rounding == "rceil", "SYMMETRIC": spec.symmetric,
            "FLOAT_ZERO": spec.float_zero, "MIDDLES": len(middles), "SIGNED": bool(middles) and middles[0] > 0,
            "COLUMNS": self.padded,
        }  # fmt: skip
        return {prefix + name: value for name, value in values.items()}


def _rows_of_program(columns: int) -> int:
    return max(1, min(8, 2048 // columns))


def _quantize(x: Tensor, spec: QuantSpec, static_scale: Tensor | None) -> list[Tensor]:
    """The parts of contiguous rows."""
    k = x.shape[-1]
    made = reference.quantized_like(x, str(spec))
    target, count = _Target.of(spec, k, made, static_scale), x.numel() // k
    rows = _rows_of_program(target.padded)
    kernels_of("quantizing").quantize_kernel[(-(-count // rows),)](
        x, *target.tensors, count, k, *target.widths, x.shape[-2] if x.dim() > 1 else 1, x.shape[1] if spec.static else 1,
        **target.constants(), ROWS=rows, num_warps=4,
    )  # fmt: skip
    return made


@cache
def _middles(values: tuple[float, ...]) -> tuple[float, ...]:
    """Between the values of a codebook in ascending order, in float32; where its upper half is the lower one negated, of that."""
    grid = torch.tensor(values[: len(values) // 2] if values[0] == 0 else values)
    return tuple(((grid[1:] + grid[:-1]) / 2).tolist())
