"""The one definition of quantization: q = clamp(round_half_even(x / scale) + zero_point), x' = (q - zero_point) * scale.

This is ONNX QuantizeLinear / DequantizeLinear. Everything else (operators, kernels, exporters) is checked against it.
Tensors are [.., K]; scales have one entry a block along K (see granularity). Scale arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from qpass.blocks import spread, value_range
from qpass.errors import QpassError
from qpass.formats import Format
from qpass.granularity import PerTensor
from qpass.memory import outside_of_graphs
from qpass.packing import pack, unpack
from qpass.quantized import Quantized
from qpass.rotation import rotate
from qpass.spec import QuantSpec

_E4M3_MAX = 448.0
_E4M3_TINY = 2.0**-9  # the smallest E4M3 subnormal
_E8M0_BIAS = 127  # OCP MX v1.0, section 5.4.1


# --- scales ---------------------------------------------------------------------------------------------------------


def _guard(scale: Tensor, amax: Tensor, checked: bool) -> Tensor:
    """No stored scale is zero: 1 where the block is all zero, the smallest positive value where the scale underflowed."""
    info = torch.finfo(scale.dtype)
    tiny = info.smallest_normal * (info.eps if scale.dtype == torch.float16 else 1)
    scale = torch.where(amax == 0, torch.ones_like(scale), scale.clamp(min=tiny))
    if not checked or torch.compiler.is_compiling() or not torch.isinf(scale).any():
        return scale
    raise QpassError(f"a scale of up to {float(amax.max()):.3g} / qmax overflows {scale.dtype}; use scale=fp32")


def _e8m0(amax: Tensor, fmt: Format, rounding: str) -> Tensor:
    """The power of two for each block. floor: 2^(floor(log2 amax) - emax of the element). rceil: >= amax / max."""
    if rounding == "rceil":
        mantissa, exponent = torch.frexp(amax / fmt.qmax)  # amax/max = mantissa * 2^exponent, mantissa in [.5, 1)
        exponent = torch.where(mantissa == 0.5, exponent - 1, exponent)
    else:
        exponent = torch.frexp(amax)[1] - math.frexp(fmt.qmax)[1]
    exponent = torch.where(amax == 0, torch.zeros_like(exponent), exponent.clamp(-_E8M0_BIAS, _E8M0_BIAS))
    return (exponent + _E8M0_BIAS).to(torch.uint8).view(torch.float8_e8m0fnu)


#: Scale, zero point as integer codes, outer scale.
QParams = tuple[Tensor | None, Tensor | None, Tensor | None]


def choose_qparams(
    x: Tensor,
    spec: QuantSpec,
    tensor_range: tuple[Tensor, Tensor] | None = None,
    shrink: Tensor | None = None,
    checked: bool = True,
) -> QParams:
    """Round-to-nearest scales of `x` [.., K]: (scale, zero_point, outer_scale) with zero_point as integer codes, unpacked.

    `tensor_range`: (lowest, highest) of the whole tensor where `x` is a part of it: what a scale per tensor and
    nvfp4's outer scale are taken from; for the latter also [.., 1], of each row. `shrink`: of the shape of the scales, by how
    much smaller a range they cover.
    `checked`: raise `QpassError` for a scale that overflows, which cannot be known while a graph is traced.
    """
    fmt, granularity = spec.format, spec.granularity
    if granularity is None:
        return None, None, None
    if tensor_range is not None and isinstance(granularity, PerTensor):
        shape = granularity.scale_shape(x.shape)
        low, high = (end.float().reshape(shape) for end in tensor_range)
        low, high = low.clamp(max=0), high.clamp(min=0)
    else:
        low, high = value_range(x, granularity, with_zero=not spec.float_zero)
    if shrink is not None:
        low, high = low * shrink, high * shrink
    amax = torch.maximum(-low, high)
    if fmt.scale == "e8m0":
        return _e8m0(amax, fmt, spec.scale_rounding), None, None
    if fmt.scale == "e4m3":
        whole = amax.amax() if tensor_range is None else torch.maximum(-tensor_range[0], tensor_range[1]).float()
        outer = outer_scale_of(spec, whole)
        outer = outer if outer.dim() == x.dim() else outer.reshape((1,) * x.dim())
        scale = (amax / fmt.qmax / outer).clamp(_E4M3_TINY, _E4M3_MAX)
        return scale.to(torch.float8_e4m3fn), None, outer
    return _affine(low, high, amax, spec, checked)


def _affine(low: Tensor, high: Tensor, amax: Tensor, spec: QuantSpec, checked: bool) -> QParams:
    """The scales and zero points that take each range [low, high] to the codes of the format. `amax`: the larger magnitude."""
    fmt = spec.format
    if spec.symmetric:
        scale = amax / fmt.symmetric_qmax
    else:
        scale = high / (fmt.qmax - fmt.qmin) - low / (fmt.qmax - fmt.qmin)
    if spec.float_zero:
        # Not less, or the zero point of a block of nearly one value is beyond float16.
        scale = torch.maximum(scale, amax * 2.0**-15)
        amax = high - low  # a block of one value: the scale is 1, and the zero point holds the value
    row_scale = None
    if spec.double_quantized:
        row_scale = scale.amax(-1, keepdim=True) / 255
        row_scale = torch.where(row_scale == 0, torch.ones_like(row_scale), row_scale)
        stored = torch.round(scale / row_scale).clamp(1, 255).to(torch.uint8)
    else:
        stored = _guard(scale.to(spec.scale_dtype), amax, checked)
    if spec.symmetric:
        return stored, None, row_scale
    zero_point = fmt.qmin - low / scale_values(stored, row_scale)
    if spec.float_zero:
        return stored, zero_point.to(spec.scale_dtype), row_scale
    return stored, torch.round(zero_point).clamp(fmt.qmin, fmt.qmax).to(torch.int8), row_scale


def outer_scale_of(spec: QuantSpec, amax: Tensor) -> Tensor:
    """What multiplies the E4M3 scales of nvfp4, from the largest magnitude of the tensor."""
    outer = amax / (_E4M3_MAX * spec.format.qmax)
    return torch.where(outer == 0, torch.ones_like(outer), outer)


def scale_values(scale: Tensor, outer_scale: Tensor | None) -> Tensor:
    """Stored scales -> the float32 numbers that multiply the codes."""
    return scale.float() if outer_scale is None else scale.float() * outer_scale


# --- codes ----------------------------------------------------------------------------------------------------------


def constants(values: tuple[float, ...], like: Tensor) -> Tensor:
    """float32 values where `like` is. On a GPU they are kept: a CUDA graph that is captured cannot copy them there."""
    if type(like) is Tensor and like.is_cuda and not torch.compiler.is_compiling():
        return constants_on(values, like.device)
    return torch.tensor(values, dtype=torch.float32, device=like.device)


@cache
def constants_on(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 values on a device, made once."""
    return outside_of_graphs(lambda: torch.tensor(values, dtype=torch.float32, device=device))


def _nearest_code(x: Tensor, values: tuple[float, ...]) -> Tensor:
    """Index of the nearest of ascending `values`; a tie goes to the even index (E2M1: the even mantissa)."""
    grid = constants(values, x)
    middle = (grid[1:] + grid[:-1]) / 2
    x = x.contiguous()
    below = torch.bucketize(x, middle, out_int32=True)
    above = torch.bucketize(x, middle, out_int32=True, right=True)
    return torch.where(below % 2 == 0, below, above)


def _encode(scaled: Tensor, spec: QuantSpec, zero_point: Tensor | None) -> Tensor:
    """x / scale -> codes: int8 for uniform formats, float8, or codebook indices."""
    fmt = spec.format
    if fmt.kind == "uniform":
        if zero_point is not None and zero_point.is_floating_point():
            codes = torch.round(scaled + zero_point)
        else:
            codes = torch.round(scaled) if zero_point is None else torch.round(scaled) + zero_point
        return codes.clamp(*spec.qrange).to(torch.int8)
    if fmt.kind == "float8":
        return scaled.clamp(fmt.qmin, fmt.qmax).to(fmt.storage)
    assert fmt.codebook is not None
    if fmt.codebook[0] == 0:  # sign and magnitude
        half = len(fmt.codebook) // 2
        sign = torch.signbit(scaled).to(torch.int32) * half
        return (_nearest_code(scaled.abs(), fmt.codebook[:half]) + sign).to(torch.uint8)
    return _nearest_code(scaled, fmt.codebook).to(torch.uint8)


def _store(codes: Tensor, fmt: Format) -> Tensor:
    """Codes -> what is kept: 8-bit codes as they are, smaller ones packed as unsigned."""
    if fmt.bits >= 8:
        return codes
    return pack(codes if fmt.kind == "codebook" else codes - int(fmt.qmin), fmt.bits)


def _load(stored: Tensor, fmt: Format, length: int) -> Tensor:
    """Inverse of `_store`: int8 codes, float8, or codebook indices, [.., length]."""
    if fmt.bits >= 8:
        return stored
    codes = unpack(stored, fmt.bits, length)
    return codes if fmt.kind == "codebook" else codes.to(torch.int8) + int(fmt.qmin)


def quantize(
    x: Tensor,
    spec: QuantSpec,
    tensor_range: tuple[Tensor, Tensor] | None = None,
    static_scale: Tensor | None = None,
    checked: bool = True,
) -> Quantized:
    """[.., K] float -> Quantized, by round to nearest. See `choose_qparams` for `tensor_range` and `checked`.

    `static_scale`: broadcasts to x; the scale of a static spec, which is kept by whoever gave it.
    """
    if spec.is_identity:
        return Quantized(x.to(spec.format.storage))
    if spec.rotated:
        x = rotate(x.float())
    qparams = choose_qparams(x, spec, tensor_range, checked=checked)
    return quantize_to(x if static_scale is None else x.float() / static_scale, spec, qparams)


def quantize_to(x: Tensor, spec: QuantSpec, qparams: QParams) -> Quantized:
    """[.., K] float -> Quantized with the given scales and zero points, of the form that `choose_qparams` gives."""
    scale, zero_point, outer = qparams
    scaled = x.float()
    if scale is not None:
        scaled = scaled / spread(scale_values(scale, outer), spec.granularity, x.shape)
    spread_zero = None if zero_point is None else spread(zero_point, spec.granularity, x.shape)
    data = _store(_encode(scaled, spec, spread_zero), spec.format)
    if zero_point is not None and not spec.float_zero:
        zero_point = _store(zero_point, spec.format)
    return Quantized(data, scale, zero_point, outer)


def grid_of(spec: QuantSpec, qparams: QParams, shape: Sequence[int]) -> Grid:
    """The representable values of each element of a tensor [.., K] with these scales."""
    scale, zero_point, outer = qparams

    def over(per_block: Tensor | None) -> Tensor | None:
        return None if per_block is None else spread(per_block, spec.granularity, shape).expand(*shape)

    return Grid(spec, over(None if scale is None else scale_values(scale, outer)), over(zero_point))


@dataclass(frozen=True)
class Grid:
    """What each element [.., K] may become: `scale` and `zero_point` of its block, spread over the block."""

    spec: QuantSpec
    scale: Tensor | None
    zero_point: Tensor | None

    def column(self, x: Tensor, k: int) -> Tensor:
        """Column `x` [..] of number `k`, each rounded to its nearest value."""
        scale = None if self.scale is None else self.scale[..., k]
        zero = None if self.zero_point is None else self.zero_point[..., k]
        codes = _encode(x if scale is None else x / scale, self.spec, zero)
        values = _code_values(codes, self.spec.format)
        values = values if zero is None else values - zero.float()
        return values if scale is None else values * scale


def _code_values(codes: Tensor, fmt: Format) -> Tensor:
    """Codes -> the float32 numbers that scales multiply."""
    if fmt.codebook is None:
        return codes.float()
    return constants(fmt.codebook, codes)[codes.int()]


def dequantize(q: Quantized, spec: QuantSpec, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Quantized -> [.., columns] in `dtype`; computed in float32."""
    fmt = spec.format
    if spec.is_identity:
        return q.data.to(dtype)
    values = _code_values(_load(q.data, fmt, columns), fmt)
    if q.zero_point is not None:
        assert q.scale is not None
        zero_point = q.zero_point if spec.float_zero else _load(q.zero_point, fmt, q.scale.shape[-1])
        values = values - spread(zero_point.float(), spec.granularity, values.shape)
    if q.scale is not None:
        values = values * spread(scale_values(q.scale, q.outer_scale), spec.granularity, values.shape)
    if q.column_scale is not None:
        values = values * q.column_scale
    return (rotate(values) if spec.rotated else values).to(dtype)


def codes_of(q: Quantized, spec: QuantSpec, columns: int) -> tuple[Tensor, Tensor | None]:
    """Integer codes [.., columns] and zero points as int8, of a uniform format."""
    zero = q.zero_point
    if zero is not None and q.scale is not None:
        zero = _load(zero, spec.format, q.scale.shape[-1])
    return _load(q.data, spec.format, columns), zero


def for_whole_tensor(spec: QuantSpec) -> QuantSpec:
    """The spec by which a static one quantizes, once its scale is there."""
    return replace(spec, static=False, granularity=PerTensor())


def round_to(x: Tensor, spec: QuantSpec, qparams: QParams) -> Tensor:
    """[.., K] -> float32 as it comes back from codes with the given scales and zero points."""
    return dequantize(quantize_to(x, spec, qparams), spec, x.shape[-1])


def quantize_rows(x: Tensor, spec: QuantSpec) -> Quantized:
    """[.., K] -> Quantized, each row by itself, as inputs are: nvfp4 has an outer scale for each, [.., 1]."""
    if spec.format.scale != "e4m3":
        return quantize(x, spec, checked=False)
    none = x.new_zeros((*x.shape[:-1], 1))
    return quantize(x, spec, torch.aminmax(x, dim=-1, keepdim=True) if x.numel() else (none, none), checked=False)


def fake_quantize_rows(x: Tensor, spec: QuantSpec) -> Tensor:
    """[.., K] -> the same as it comes back from codes, each row rounded by itself, in x's dtype."""
    return dequantize(quantize_rows(x, spec), spec, x.shape[-1], x.dtype)


def fake_quantize(x: Tensor, spec: QuantSpec) -> Tensor:
    """[.., K] -> the same tensor as it comes back from storage, in x's dtype."""
    return dequantize(quantize(x, spec), spec, x.shape[-1], x.dtype)


@dataclass(frozen=True)
class Power:
    """Of a tensor: sum x^2, and of its error sum (x - x')^2."""

    signal: float
    noise: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, 10 log10(signal / noise); inf if nothing was lost."""
        return 10 * math.log10(self.signal / self.noise) if self.noise > 0 and self.signal > 0 else math.inf


def power_of(x: Tensor, approximation: Tensor) -> Power:
    """Of a tensor and what it comes back as, summed in float64."""
    error = x.float() - approximation.float()
    return Power(float(x.float().square().sum(dtype=torch.float64)), float(error.square().sum(dtype=torch.float64)))
