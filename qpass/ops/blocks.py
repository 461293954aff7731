"""The MX formats and nvfp4 for weights and activations both: blocks with scales of 8 bits, multiplied as they are by new GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.compute import has_block_products, multiplies_blocks
from qpass.numerics import constants, fake_quantize_rows, quantize_rows
from qpass.ops.schemas import register
from qpass.ops.triton.launching import attempt
from qpass.ops.triton.table import most_rows
from qpass.packing import unpack
from qpass.quantized import Quantized
from qpass.spec import QuantSpec, parse_spec

#: Rows and columns of a tile of scales, as cuBLAS reads them, and how many rows of it lie side by side.
_ROWS, _COLUMNS, _STRIDE = 128, 4, 32


def round_blocks(x: Tensor, spec: str) -> Tensor:
    """[.., K] -> [.., K]; what is not finite gives NaN."""
    return fake_quantize_rows(x, parse_spec(spec)).masked_fill(~x.isfinite(), torch.nan)


def block_linear(
    x: Tensor,
    data: Tensor,
    scale: Tensor | None,
    zero_point: Tensor | None,
    outer_scale: Tensor | None,
    bias: Tensor | None,
    spec: str,
) -> Tensor:
    """[.., K] -> [.., N], in blocks where the device has such products, of rounded floats elsewhere."""
    parsed, k, n = parse_spec(spec), x.shape[-1], data.shape[0]
    assert parsed.activations is not None
    if _serves(x, n, parsed):
        rows, weight = x.reshape(-1, k), Quantized(data, scale, zero_point, outer_scale)
        y = attempt(f"products of {spec}", x.device, lambda: block_product(rows, weight, parsed))
        if y is not None:
            y = y if bias is None else (y.float() + bias.float()).to(x.dtype)
            return y.view(*x.shape[:-1], n)
    rounded = round_blocks(x, str(parsed.activations))
    y = torch.ops.qpass.linear(rounded, data, scale, zero_point, outer_scale, bias, spec)
    return y.contiguous()


def _serves(x: Tensor, outputs: int, spec: QuantSpec) -> bool:
    """Whether cuBLAS takes these sizes and types. Few rows of mxfp4, which it reads as fp8, read the weight as it is stored."""
    if not multiplies_blocks(spec) or not has_block_products(x.device.type):
        return False
    k = x.shape[-1]
    whole = k % 32 == 0 and outputs % 16 == 0 and x.numel() > 0 and x.dtype == torch.bfloat16
    return whole and (spec.format.name != "mxfp4" or x.numel() > most_rows("mxfp4", x.dtype) * k)


def block_product(x: Tensor, weight: Quantized, spec: QuantSpec) -> Tensor:
    """x [M, K] bfloat16 and codes [N, K] with their scales -> [M, N]; NaN in rows that are not finite."""
    assert spec.activations is not None
    rows = quantize_rows(x, spec.activations)
    assert weight.scale is not None
    assert rows.scale is not None
    y = torch._scaled_mm(
        _codes(rows.data, spec.activations),
        _codes(weight.data, spec).t(),
        scale_a=in_tiles(rows.scale),
        scale_b=in_tiles(weight.scale),
        out_dtype=x.dtype,
    )
    if rows.outer_scale is not None and weight.outer_scale is not None:
        # one of the weight, or, of weights that were joined, one for each row
        y = (y.float() * rows.outer_scale * weight.outer_scale.reshape(1, -1)).to(x.dtype)
    return y.masked_fill(~x.isfinite().all(-1, keepdim=True), torch.nan)


def _codes(data: Tensor, spec: QuantSpec) -> Tensor:
    """Stored codes as cuBLAS multiplies them. It takes E8M0 scales with fp8 only, which holds all of E2M1."""
    if spec.format.name == "nvfp4":
        return data.view(torch.float4_e2m1fn_x2)
    if spec.format.codebook is not None:
        values = constants(spec.format.codebook, data).to(torch.float8_e4m3fn)
        data = values.view(torch.uint8)[unpack(data, spec.format.bits, 2 * data.shape[1]).int()]
    return data.view(torch.float8_e4m3fn)


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [R, C] as cuBLAS reads them, flat and padded with zeros: tiles of 128 x 4, in which the one at (r, c) is number
    (r % 32) * 16 + (r // 32) * 4 + c (cuBLAS documentation, "1D block scaling factors layout")."""
    r, c = scale.shape
    padded = F.pad(scale.view(torch.uint8), (0, -c % _COLUMNS, 0, -r % _ROWS))
    tiles = padded.view(-1, _ROWS // _STRIDE, _STRIDE, padded.shape[1] // _COLUMNS, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(scale.dtype)


def _fake(x: Tensor, data: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


register("round_blocks", round_blocks, lambda x, spec: torch.empty_like(x))
register("block_linear", block_linear, _fake)
