"""The reference for all operators but those of a cache: dequantize, then the float operation. Exact, on every device, not fast.

Results are contiguous whatever the strides of the inputs: Inductor checks them against the fakes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.numerics import dequantize as _dequantize
from qpass.numerics import quantize as _quantize
from qpass.ops.around import Around
from qpass.ops.schemas import register
from qpass.packing import packed_length
from qpass.quantized import Quantized
from qpass.spec import parse_spec
from qpass.weights import row_range


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
    """[.., K] -> [.., N]: F.linear with the weight dequantized to x's dtype. `rest`: what Around takes."""
    weight = _dequantize(Quantized(data, scale, zero_point, outer_scale), parse_spec(spec), x.shape[-1], x.dtype)
    around = Around(*rest)
    return around.after(F.linear(around.before(x), weight, None if bias is None else bias.to(x.dtype))).contiguous()


def _linear_fake(x: Tensor, data: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0] // (2 if Around(*rest[_BEFORE_AROUND:]).gate else 1)))


#: Arguments of linear behind `data` and before those of Around: three parts, bias, spec.
_BEFORE_AROUND = 5


def experts(
    x: Tensor,
    ids: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    experts: int,
    spec: str,
) -> Tensor:
    """x [.., K] and ids, broadcast together, -> [.., N]: the experts that are named, one at a time."""
    parts, total = Quantized(data, scale, zero_point, outer_scale), data.shape[0]
    n = total // experts
    lead = torch.broadcast_shapes(x.shape[:-1], ids.shape)
    out = x.new_zeros((*lead, n))
    flat, rows = x.expand(*lead, -1).reshape(-1, x.shape[-1]), out.view(-1, n)
    ids = torch.where(ids < 0, ids + experts, ids).expand(lead).reshape(-1)
    for e in ids.unique().tolist():
        if not 0 <= e <= experts:
            raise IndexError(f"expert {e} of {experts}")
        if e < experts:
            (chosen,) = torch.where(ids == e)
            mine = row_range(parts, e * n, n, total)
            rows[chosen] = torch.ops.qpass.linear(flat[chosen], *mine.parts, None, spec)
    return out


def _experts_fake(x: Tensor, ids: Tensor, data: Tensor, *rest: Any) -> Tensor:
    experts, _ = rest[-2:]
    return x.new_empty((*torch.broadcast_shapes(x.shape[:-1], ids.shape), data.shape[0] // experts))


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
    """[..] -> [.., columns]: the rows named by `indices`, dequantized after they are gathered."""
    rows = Quantized(data, scale, zero_point, outer_scale).map(
        lambda part: _gather(part, indices) if part.shape[0] == data.shape[0] else part
    )
    return _dequantize(rows, parse_spec(spec), columns, dtype).contiguous()


def _gather(part: Tensor, indices: Tensor) -> Tensor:
    if part.dtype.is_floating_point and part.dtype.itemsize == 1:  # 8-bit floats have no gather on every device
        return F.embedding(indices, part.view(torch.uint8)).view(part.dtype)
    return F.embedding(indices, part)


def _embedding_fake(indices: Tensor, data: Tensor, *rest: Any) -> Tensor:
    *_, columns, _, dtype = rest
    return data.new_empty((*indices.shape, columns), dtype=dtype)


def quantize(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """[.., K] -> the parts that the spec has."""
    done = _quantize(x, parse_spec(spec), static_scale=static_scale)
    return [part.contiguous() for part in done.parts if part is not None]


def quantized_like(x: Tensor, spec: str, static_scale: Tensor | None = None) -> list[Tensor]:
    """Empty parts of the shapes and types that `quantize` gives."""
    parsed = parse_spec(spec)
    fmt, lead = parsed.format, x.shape[:-1]
    width = packed_length(x.shape[-1], fmt.bits) if fmt.bits < 8 else x.shape[-1]
    shapes = {0: (*lead, width)}
    if parsed.granularity is not None:
        scales = shapes[1] = parsed.granularity.scale_shape(x.shape)
        packed = fmt.bits < 8 and not parsed.float_zero
        shapes[2] = (*scales[:-1], packed_length(scales[-1], fmt.bits)) if packed else scales
        shapes[3] = (*lead, 1) if parsed.double_quantized else (1,) * x.dim()
    return [x.new_empty(shapes[slot], dtype=dtype) for slot, dtype in parsed.stored_parts.items()]


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
    return _dequantize(Quantized(data, scale, zero_point, outer_scale), parse_spec(spec), columns, dtype).contiguous()


def _dequantize_fake(data: Tensor, *rest: Any) -> Tensor:
    *_, columns, _, dtype = rest
    return data.new_empty((*data.shape[:-1], columns), dtype=dtype)


register("linear", linear, _linear_fake)
register("experts", experts, _experts_fake)
register("embedding", embedding, _embedding_fake)
register("quantize", quantize, quantized_like)
register("dequantize", dequantize, _dequantize_fake)
register("once", Tensor.clone, torch.empty_like)
