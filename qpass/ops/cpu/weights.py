"""Weights on the CPU: rounded to nearest, and compared with what they were, in one pass over them."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.granularity import PerTensor
from qpass.memory import for_huge_pages
from qpass.numerics import Power, outer_scale_of, quantize
from qpass.ops import reference
from qpass.ops.cpu.library import c_functions
from qpass.ops.cpu.matrix import DTYPES, Matrix, cpu_spec, has_kernels
from qpass.quantized import Quantized
from qpass.spec import QuantSpec

#: enum Work and enum Trouble of quantize.h.
_SCALES_AND_CODES, _CODES_ONLY, _COMPARE = range(3)
_INFINITE_SCALE = 1


def serves(weight: Tensor, spec: QuantSpec) -> bool:
    """Whether the kernel takes a weight [N, K]. Scales in 8 bits it makes for tables of values only."""
    there = weight.device.type == "cpu" and weight.dtype in DTYPES and weight.numel() > 0
    known = not spec.is_identity and (not spec.double_quantized or spec.format.kind == "codebook")
    return there and known and has_kernels(str(spec)) and c_functions() is not None


def round_weight(
    weight: Tensor, spec: QuantSpec, tensor_range: tuple[Tensor, Tensor] | None, columns: Tensor | None = None
) -> tuple[Quantized, Power] | None:
    """[N, K] float -> rounded to nearest, to the bit as qpass.numerics does; divided by `columns` [1, K] first, if there are.

    `tensor_range`: (lowest, highest) of what is quantized, where the spec reads it. None if a scale overflows, or the weight is
    not finite: who asks for the reference instead is told.
    """
    slots: list[Tensor | None] = [None] * 4
    for slot, part in zip(spec.stored_parts, reference.quantized_like(weight, str(spec)), strict=True):
        slots[slot] = for_huge_pages(part)
    work = _SCALES_AND_CODES
    if isinstance(spec.granularity, PerTensor):
        slots[1:] = quantize(weight[:1], spec, tensor_range).parts[1:]
        work = _CODES_ONLY
    elif spec.format.scale == "e4m3":
        assert tensor_range is not None
        slots[3] = outer_scale_of(spec, torch.maximum(-tensor_range[0], tensor_range[1]).float()).reshape(1, 1)
    power = _run(weight, Quantized(*slots), spec, columns, work)  # type: ignore[arg-type]
    return None if power is None else (Quantized(*slots), power)  # type: ignore[arg-type]


def compare_weight(weight: Tensor, stored: Quantized, spec: QuantSpec) -> Power:
    """Of a weight [N, K] and what it is stored as."""
    found = _run(weight, stored, spec, stored.column_scale, _COMPARE)
    return found or Power(torch.nan, torch.nan)


def _run(weight: Tensor, stored: Quantized, spec: QuantSpec, columns: Tensor | None, work: int) -> Power | None:
    n, k = weight.shape
    weight = weight.contiguous()
    columns = None if columns is None else columns.float().contiguous()
    power = torch.empty((n, 2), dtype=torch.float64)
    matrix = Matrix(stored.parts, n, k, cpu_spec(str(spec)))
    trouble = c_functions().qpass_quantize_weight(
        *matrix.arguments,
        weight.data_ptr(),
        DTYPES[weight.dtype],
        None if columns is None else columns.data_ptr(),
        work,
        power.data_ptr(),
        torch.get_num_threads(),
    )
    signal, noise = power.sum(0).tolist()
    return None if trouble else Power(signal, noise)
