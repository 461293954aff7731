"""Quantizing weights: checked, in bounded memory, and with rows of several weights in one buffer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qpass.algorithms.rounding import NO_INPUT_PARTS, InputParts, rounding_of, rounds_to_nearest
from qpass.errors import QpassError
from qpass.numerics import Power, dequantize, power_of, quantize
from qpass.observers import InputStats
from qpass.ops.cpu import weights as kernel
from qpass.quantized import Quantized
from qpass.spec import QuantSpec

#: Elements quantized at a time: the float temporaries of one step stay below ~32 MB.
CHUNK_ELEMENTS = 1 << 20


def memory_of(param: Tensor) -> tuple[object, ...]:
    """What a weight looks at: the same for tied ones, be they one Parameter or several over the same values."""
    stored = getattr(param, "data_part", None)  # a QTensor has no memory of its own
    if stored is not None:
        return stored.data_ptr(), param.shape, stored.stride(), param.dtype
    return param.data_ptr(), param.shape, param.stride(), param.dtype


def as_rows(weight: Tensor, transposed: bool) -> Tensor:
    """[.., N, K], or [.., K, N] if `transposed`, as it is stored: rows [.. * N, K]; experts lie below each other."""
    rows = weight.mT if transposed else weight
    return rows.reshape(-1, rows.shape[-1])


def from_rows(rows: Tensor, shape: Sequence[int], transposed: bool) -> Tensor:
    """The weight of logical `shape` from its stored rows: undoes `as_rows`."""
    if not transposed:
        return rows.reshape(tuple(shape))
    return rows.reshape(*shape[:-2], shape[-1], shape[-2]).mT


def check_weight(weight: Tensor, spec: QuantSpec, name: str) -> None:
    """Raises `QpassError`, naming the weight, for what cannot be quantized: no data, NaN or inf."""
    if weight.is_meta:
        raise QpassError(f"{name}: the weight is on the meta device; load the real weights first")
    if type(weight).__name__ == "DTensor":
        raise QpassError(f"{name}: the weight is a DTensor; quantize each rank's local model, before sharding")
    if not weight.is_floating_point():
        raise QpassError(f"{name}: the weight is {weight.dtype}, not a float type; is the model already quantized?")
    if weight.numel():
        low, high = torch.aminmax(weight.detach())
        if not (torch.isfinite(low) and torch.isfinite(high)):
            kind = "NaN" if torch.isnan(low) else "inf"
            raise QpassError(f"{name}: the weight holds {kind}; repair the checkpoint, or leave this site in float")


def quantize_weight(
    weight: Tensor,
    spec: QuantSpec,
    tensor_range: tuple[Tensor, Tensor] | None = None,
    stats: InputStats | None = None,
    around: InputParts = NO_INPUT_PARTS,
) -> Quantized:
    """[N, K] float -> Quantized; see `measured_weight`."""
    return measured_weight(weight, spec, tensor_range, stats, around)[0]


def measured_weight(
    weight: Tensor,
    spec: QuantSpec,
    tensor_range: tuple[Tensor, Tensor] | None = None,
    stats: InputStats | None = None,
    around: InputParts = NO_INPUT_PARTS,
) -> tuple[Quantized, Power]:
    """[N, K] float -> Quantized by the algorithms that the spec names, a chunk of rows at a time, and what that loses.

    `tensor_range` replaces the weight's own (lowest, highest). `around`: what is done to the inputs that it is multiplied by,
    `stats`: of them behind that; see `input_parts`. Raises `QpassError` for scales that overflow.
    """
    weight = weight.detach()
    if spec.is_identity or not weight.numel():
        done = quantize(weight, spec)
        return done, power_of(weight, done.data)
    if tensor_range is None and spec.reads_tensor_range:
        tensor_range = weight_range(weight, around)
    fast = kernel.serves(weight, spec)
    if fast and rounds_to_nearest(spec, stats):
        found = kernel.round_weight(weight, spec, tensor_range, around.column_scale)
        if found is not None:
            return replace(found[0], **vars(around)), found[1]
    rows = max(1, CHUNK_ELEMENTS // weight.shape[-1])
    rounding = rounding_of(spec, stats)
    chunks = [rounding(around.columns_of(chunk), tensor_range) for chunk in weight.split(rows)]
    whole = chunks[0] if len(chunks) == 1 else concat_rows(chunks, [len(c.data) for c in chunks], keep_single=True)
    whole = replace(whole, **vars(around))
    return whole, kernel.compare_weight(weight, whole, spec) if fast else _power(weight, whole, spec)


def _power(weight: Tensor, q: Quantized, spec: QuantSpec) -> Power:
    """Of a weight and what it is stored as, a chunk of rows at a time."""
    found = []
    rows = max(1, CHUNK_ELEMENTS // weight.shape[-1])
    for start in range(0, weight.shape[0], rows):
        chunk = weight[start : start + rows]
        found.append(
            power_of(chunk, dequantize(row_range(q, start, len(chunk), weight.shape[0]), spec, chunk.shape[-1]))
        )
    return Power(sum(p.signal for p in found), sum(p.noise for p in found))


def weight_range(weight: Tensor, around: InputParts = NO_INPUT_PARTS) -> tuple[Tensor, Tensor]:
    """(lowest, highest) of what is quantized of a weight [N, K]."""
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[-1]))
    ranges = [torch.aminmax(around.columns_of(chunk)) for chunk in weight.detach().split(rows)]
    return torch.stack([r[0] for r in ranges]).amin(), torch.stack([r[1] for r in ranges]).amax()


def row_range(q: Quantized, start: int, length: int, rows: int) -> Quantized:
    """Rows [start, start + length) as views; parts with one row for all `rows` are kept whole."""
    return q.map(lambda part: part if part.shape[0] != rows else part.narrow(0, start, length))


def concat_rows(weights: Sequence[Quantized], rows: Sequence[int], keep_single: bool = False) -> Quantized:
    """Stack weights of equal columns and spec, which read one input, into one buffer.

    A part with one row (a scale per tensor) is repeated for each row, so that each weight is a row range of the result;
    `keep_single` keeps one such row, for chunks of one weight and weights of one group, whose single rows are equal.
    Raises `QpassError` for weights that are made for differently prepared inputs.
    """

    def stack(index: int) -> Tensor | None:
        parts = [w.parts[index] for w in weights]
        if parts[0] is None:
            return None
        if keep_single and all(p.shape[0] == 1 for p in parts) and any(n != 1 for n in rows):  # type: ignore[union-attr]
            return parts[0]
        return _cat([p.expand(n, *p.shape[1:]) for p, n in zip(parts, rows, strict=True)])  # type: ignore[union-attr]

    first = weights[0].around
    if not all(w.is_for_the_input_of(weights[0]) for w in weights):
        raise QpassError(
            "weights that one operator reads were calibrated apart, on inputs of their own; quantize them together"
        )
    return Quantized(*(stack(i) for i in range(4)), *first)  # type: ignore[call-arg, arg-type]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    """torch.cat for every storage type; 8-bit floats go through their bytes. Parts that lie behind each other already are not
    copied."""
    first, dtype = parts[0], parts[0].dtype
    ends = itertools.accumulate((p.nbytes for p in parts), initial=first.data_ptr())
    same = all(
        p.is_contiguous() and p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for p in parts
    )
    if same and all(p.data_ptr() == start for p, start in zip(parts, ends, strict=False)):
        return first.as_strided((sum(len(p) for p in parts), *first.shape[1:]), first.stride())
    if dtype.is_floating_point and dtype.itemsize == 1:
        return torch.cat([p.contiguous().view(torch.uint8) for p in parts]).view(dtype)
    return torch.cat(list(parts))
