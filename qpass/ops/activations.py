"""Quantized activations: the input of a linear in codes, and products of integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass.compute import has_fp8_products
from qpass.compute import multiplies_fp8 as multiplies_fp8
from qpass.compute import multiplies_integers as multiplies_integers
from qpass.numerics import choose_qparams, codes_of, for_whole_tensor, quantize_to, round_to
from qpass.ops.cpu.build import cpu_features
from qpass.ops.schemas import LIBRARY, register
from qpass.ops.triton.launching import attempt, kernels_of, serves
from qpass.ops.triton.table import INTEGER_TILE, INTEGERS
from qpass.quantized import Quantized
from qpass.spec import parse_spec

#: From so many rows of the input on the product of integers is faster on a CPU than a kernel that reads the weight for a few.
_ROWS = 8


def quantize_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: str) -> list[Tensor]:
    """[.., K] -> [codes], with [scale, zero point] of each row or group if none are given."""
    parsed = parse_spec(spec)
    if scale is not None:
        return [quantize_to(x, for_whole_tensor(parsed), (scale, zero_point, None)).data]
    scale, zero_point, outer = choose_qparams(x, parsed, checked=False)
    data = quantize_to(x, parsed, (scale, zero_point, outer)).data
    return [part for part in (data, scale, zero_point) if part is not None]


def round_input(x: Tensor, scale: Tensor | None, zero_point: Tensor | None, spec: str) -> Tensor:
    """[.., K] -> the same as it comes back from codes, in x's dtype."""
    parsed = parse_spec(spec)
    if scale is not None:
        return round_to(x, for_whole_tensor(parsed), (scale, zero_point, None)).to(x.dtype)
    return round_to(x, parsed, choose_qparams(x, parsed, checked=False)).to(x.dtype)


def integer_linear(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
    dtype: torch.dtype,
) -> Tensor:
    """Codes [.., K] -> [.., N]: (x - x_zero) (W - zero)^T in integers, times both scales. See `multiplies_integers`.

    Or x W^T of fp8, on GPUs that have such products; on others through floats. See `multiplies_fp8`.
    """
    parsed, k = parse_spec(spec), x.shape[-1]
    rows = x.reshape(-1, k)
    if x.dtype.is_floating_point and fp8_products_serve(rows, data, dtype):
        return _fp8_product(rows, x_scale, data, scale, bias, dtype).view(*x.shape[:-1], -1)
    if x.dtype.is_floating_point or scale is None or not int8_products_pay(rows, data.shape[0]):
        floats = rows.float() if x_zero_point is None else rows.float() - x_zero_point.reshape(-1, 1)
        floats = floats * x_scale.reshape(-1, 1)
        # Kernels of the CPU take float32 as it is; GPUs have tensor cores for the others.
        floats = floats.to(dtype) if x.dtype.is_floating_point or x.device.type == "cuda" else floats
        y = torch.ops.qpass.linear(floats, data, scale, zero_point, outer_scale, bias, spec)
        return y.to(dtype).view(*x.shape[:-1], -1)
    codes, zero = codes_of(Quantized(data, scale, zero_point), parsed, k)
    sums = _Sums(
        torch._int_mm(rows, codes.mT), k, x_scale.float().reshape(-1), _flat(x_zero_point),
        None if zero is None else rows.sum(1, dtype=torch.int32), scale.reshape(-1), _flat(zero),
        None if x_zero_point is None else codes.sum(1, dtype=torch.int32), _flat(bias),
    )  # fmt: skip
    y = None
    if serves(sums.total):
        y = attempt("the scales of integer products", x.device, lambda: sums.rescaled_by_kernel(dtype))
    return (sums.rescaled(dtype) if y is None else y).view(*x.shape[:-1], -1)


@dataclass(frozen=True)
class _Sums:
    """Products of codes [M, N] over k columns and what makes floats of them. Of rows, or one for all: x_scale, x_zero; of
    columns, or one for all: scale, zero. Sums of codes: of the input's rows [M], of the weight's [N]."""

    total: Tensor
    k: int
    x_scale: Tensor
    x_zero: Tensor | None
    row_sums: Tensor | None
    scale: Tensor
    zero: Tensor | None
    column_sums: Tensor | None
    bias: Tensor | None

    def rescaled(self, dtype: torch.dtype) -> Tensor:
        """(total - x_zero * column_sums - (row_sums - k * x_zero) * zero) * x_scale * scale + bias."""
        total = self.total
        if self.x_zero is not None and self.column_sums is not None:
            total = total - self.x_zero.int().unsqueeze(1) * self.column_sums
        if self.zero is not None and self.row_sums is not None:
            sums = self.row_sums if self.x_zero is None else self.row_sums - self.k * self.x_zero.int()
            total = total - sums.unsqueeze(1) * self.zero.int()
        y = total.float() * self.x_scale.unsqueeze(1) * self.scale.float()
        return (y if self.bias is None else y + self.bias.float()).to(dtype)

    def rescaled_by_kernel(self, dtype: torch.dtype) -> Tensor:
        """The same, in one reading of the sums."""
        m, n = self.total.shape
        y = self.total.new_empty((m, n), dtype=dtype)
        columns = min(2048, 1 << max(5, (n - 1).bit_length()))
        kernels_of("rescaling").rescale_kernel[(m, -(-n // columns))](
            self.total, self.x_scale, self.x_zero, self.row_sums, self.scale, self.zero, self.column_sums, self.bias, y,
            n, self.k, int(len(self.x_scale) > 1), int(len(self.scale) > 1), COLUMNS=columns, num_warps=4,
        )  # fmt: skip
        return y


def _flat(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.reshape(-1)


def _integer_linear_fake(x: Tensor, x_scale: object, x_zero: object, data: Tensor, *rest: Any) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]), dtype=rest[-1])


def int8_products_pay(rows: Tensor, outputs: int) -> bool:
    """Whether torch multiplies int8 faster than floats: on a CPU with VNNI, on a GPU in whole tiles."""
    if rows.device.type == "cpu":
        return len(rows) >= _ROWS and bool(cpu_features() & {"avx512_vnni", "avx_vnni", "amx_int8"})
    whole = rows.shape[1] % INTEGER_TILE == 0 and outputs % INTEGER_TILE == 0
    return rows.device.type == "cuda" and len(rows) >= INTEGERS and whole


def fp8_products_serve(rows: Tensor, data: Tensor, dtype: torch.dtype) -> bool:
    """Whether torch multiplies these codes [M, K] and [N, K]: with scales of rows E4M3, in sixteens, to bfloat16."""
    known = rows.dtype == data.dtype == torch.float8_e4m3fn
    whole = rows.shape[1] % 16 == 0 and data.shape[0] % 16 == 0 and rows.numel() > 0
    return known and whole and dtype == torch.bfloat16 and has_fp8_products(rows.device.type)


def _fp8_product(
    rows: Tensor, x_scale: Tensor, data: Tensor, scale: Tensor | None, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """[M, K] and [N, K] -> [M, N]. Sums are float32: fast accumulation on Hopper keeps 14 bits of them."""
    m, n = len(rows), len(data)
    ones = rows.new_ones((1, 1), dtype=torch.float32) if scale is None else scale.float().reshape(1, -1)
    y = torch._scaled_mm(
        rows.contiguous(),
        data.contiguous().t(),
        scale_a=x_scale.float().reshape(-1, 1).expand(m, 1).contiguous(),
        scale_b=ones.expand(1, n).contiguous(),
        out_dtype=dtype,
        use_fast_accum=False,
    )
    return y if bias is None else (y.float() + bias.float()).to(dtype)


register("integer_linear", integer_linear, _integer_linear_fake)
for _name, _written_out in (("quantize_input", quantize_input), ("round_input", round_input)):
    LIBRARY.impl(_name, _written_out, "CompositeImplicitAutograd")
