"""Floats to stored parts on GPUs: torch.ops.qpass.quantize, append and append_rotated."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from qpass import numerics
from qpass.granularity import PerTensor, PerTokens
from qpass.numerics import constants_on
from qpass.ops import cache_reference, reference
from qpass.ops.triton.launching import FLOATS, attempt, code_kind, kernels_of, serves
from qpass.ops.triton.stored import as_bytes, layout_of
from qpass.ops.triton.workspace import counters
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
        return *self.parts, self.given, constants_on(self._middles, data.device) if self._middles else None

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


# --- into a cache -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rotary:
    """Queries [B, Hq, S, D], cos and sin [B or 1, 1, S, D] of equal strides."""

    queries: Tensor
    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, queries: Tensor, cos: Tensor, sin: Tensor) -> _Rotary:
        if cos.stride() != sin.stride() or cos.stride(-1) != 1:
            cos, sin = cos.contiguous(), sin.contiguous()
        return cls(_in_rows(queries), cos, sin)

    @property
    def sizes(self) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Heads of queries; strides of their batches, heads and tokens; of batches and tokens of angles."""
        apart = self.cos.stride(0) if self.cos.shape[0] > 1 else 0
        return self.queries.shape[1], self.queries.stride()[:3], (apart, self.cos.stride(2))


def append(
    k: list[Tensor],
    v: list[Tensor],
    length: Tensor,
    keys: Tensor,
    values: Tensor,
    k_spec: str,
    v_spec: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """Keys and values [B, H, S, D] into their parts, behind the tokens that are there; gives the length before.

    No scale is checked, which would ask the device: one that overflows is infinite."""
    given = (k, v, length, keys, values, k_spec, v_spec, k_scale, v_scale)
    made = _appended(*given, None)
    return cache_reference.append(*given) if made is None else made[0]


def append_rotated(
    k: list[Tensor],
    v: list[Tensor],
    length: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_spec: str,
    v_spec: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`append` of rotated keys; gives the length before, the rotated queries and keys."""
    rest = (k_spec, v_spec, k_scale, v_scale)
    if _are_rotated_together(queries, keys, cos, sin):
        made = _appended(k, v, length, keys, values, *rest, _Rotary.of(queries, cos, sin))
        if made is not None:
            return made[0], made[1], made[2]
    return cache_reference.append_rotated(k, v, length, queries, keys, values, cos, sin, *rest)


def _are_rotated_together(queries: Tensor, keys: Tensor, cos: Tensor, sin: Tensor) -> bool:
    if queries.dim() != 4 or keys.dim() != 4 or not serves(queries, keys, cos, sin):
        return False
    batch, _, new, columns = keys.shape
    same = queries.shape == (batch, queries.shape[1], new, columns) and queries.dtype == keys.dtype
    angles = all(t.shape[0] in (1, batch) and t.shape[1:] == (1, new, columns) for t in (cos, sin))
    alike = cos.shape == sin.shape and cos.dtype == sin.dtype == keys.dtype
    return same and angles and alike and columns % 2 == 0


def _in_rows(x: Tensor) -> Tensor:
    """With the elements of a row behind each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _appended(
    k: list[Tensor], v: list[Tensor], length: Tensor, keys: Tensor, values: Tensor, k_spec: str, v_spec: str,
    k_scale: Tensor | None, v_scale: Tensor | None, rotary: _Rotary | None,
) -> list[Tensor] | None:  # fmt: skip
    """The length before, and what was rotated; None where the kernel does not serve."""
    if not serves(length, keys, values, *k, *v) or length.dtype != torch.int64 or length.numel() != 1:
        return None
    if keys.dim() != 4 or values.dim() != 4 or keys.shape[:3] != values.shape[:3] or k[0].dim() != 4:
        return None
    capacity = k[0].shape[2]
    to_k = _target(k, keys, k_spec, k_scale, capacity)
    to_v = _target(v, values, v_spec, v_scale, capacity)
    if to_k is None or to_v is None:
        return None
    call = partial(_append, to_k, to_v, capacity, length, _in_rows(keys), _in_rows(values), rotary)
    return attempt(f"append {k_spec}, {v_spec} of {keys.dtype}", keys.device, call)


def _target(parts: list[Tensor], states: Tensor, text: str, scale: Tensor | None, capacity: int) -> _Target | None:
    """Contiguous parts [B, H, capacity, *] of whole tokens in a format that the kernel writes."""
    spec = parse_spec(text)
    if spec.rotated or not _is_written(states, spec, scale) or len(parts) != len(spec.stored_parts):
        return None
    for part, like in zip(parts, reference.quantized_like(states[:1, :1, :1].to("meta"), text), strict=True):
        shape = (*states.shape[:2], capacity, like.shape[-1])
        alike = part.dtype == like.dtype or (part.dtype.itemsize == like.dtype.itemsize == 1)
        if part.shape != shape or not alike or not part.is_contiguous():
            return None
    return _Target.of(spec, states.shape[-1], parts, scale)


def _append(
    k: _Target, v: _Target, capacity: int, length: Tensor, keys: Tensor, values: Tensor, rotary: _Rotary | None
) -> list[Tensor]:
    """The kernel."""
    batch, heads, new, _ = keys.shape
    before = torch.empty_like(length)
    turned = [] if rotary is None else [x.new_empty(x.shape) for x in (rotary.queries, keys)]
    query_heads, q_strides, angle_strides = (0, (0, 0, 0), (0, 0)) if rotary is None else rotary.sizes
    rows = min(_rows_of_program(target.padded) for target in (k, v))
    programs = 2 * -(-batch * heads * new // rows) + -(-batch * query_heads * new // rows)
    counter = counters(1, keys.device)
    if counter is None:  # in a graph that is captured before anything ran: zeros of its own, which the graph sets
        counter = torch.zeros(1, dtype=torch.int32, device=keys.device)
    queries, cos, sin = (None, None, None) if rotary is None else (rotary.queries, rotary.cos, rotary.sin)
    kernels_of("appending").append_kernel[(programs,)](
        queries, keys, values, cos, sin, *(turned or (None, None)), length, before, counter, *k.tensors, *v.tensors,
        batch, query_heads, heads, new, capacity, k.columns, v.columns,
        *q_strides, *keys.stride()[:3], *values.stride()[:3], *angle_strides, *k.widths, *v.widths,
        **k.constants("K_"), **v.constants("V_"), ROWS=rows, num_warps=4, debug=True, sanitize_overflow=False,
    )  # fmt: skip
    return [before, *turned]
