"""The MX formats for weights and activations both: blocks of 32 that share a power of two, multiplied as they are by new GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from qpass.compute import has_block_products, multiplies_blocks
from qpass.numerics import fake_quantize, quantize
from qpass.ops.schemas import LIBRARY
from qpass.ops.triton.launching import attempt
from qpass.spec import parse_spec

#: Rows and columns of a tile of scales, as cuBLAS reads them, and how many rows of it lie side by side.
_ROWS, _COLUMNS, _STRIDE = 128, 4, 32


def round_blocks(x: Tensor, spec: str) -> Tensor:
    """[.., K] -> [.., K]."""
    return fake_quantize(x, parse_spec(spec))


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
    whole = k % 32 == 0 and n % 16 == 0 and x.numel() > 0 and x.dtype == torch.bfloat16
    if scale is not None and whole and multiplies_blocks(parsed) and has_block_products(x.device.type):
        rows, weight_scale = x.reshape(-1, k), scale
        y = attempt(
            f"products of {spec}", x.device, lambda: block_product(rows, data, weight_scale, str(parsed.activations))
        )
        if y is not None:
            y = y if bias is None else (y.float() + bias.float()).to(x.dtype)
            return y.view(*x.shape[:-1], n)
    rounded = round_blocks(x, str(parsed.activations))
    y = torch.ops.qpass.linear(rounded, data, scale, zero_point, outer_scale, bias, spec)
    return y.contiguous()


def block_product(x: Tensor, data: Tensor, scale: Tensor, activations: str) -> Tensor:
    """x [M, K] bfloat16 and codes [N, K] with their scales [N, K / 32] -> [M, N]."""
    codes = quantize(x, parse_spec(activations))
    assert codes.scale is not None
    return torch._scaled_mm(
        codes.data.view(torch.float8_e4m3fn),
        data.view(torch.float8_e4m3fn).t(),
        scale_a=in_tiles(codes.scale),
        scale_b=in_tiles(scale),
        out_dtype=x.dtype,
    )


def in_tiles(scale: Tensor) -> Tensor:
    """Scales [R, C] as cuBLAS reads them, flat and padded with zeros: tiles of 128 x 4, in which the one at (r, c) is number
    (r % 32) * 16 + (r // 32) * 4 + c (cuBLAS documentation, "1D block scaling factors layout")."""
    r, c = scale.shape
    padded = F.pad(scale.view(torch.uint8), (0, -c % _COLUMNS, 0, -r % _ROWS))
    tiles = padded.view(-1, _ROWS // _STRIDE, _STRIDE, padded.shape[1] // _COLUMNS, _COLUMNS)
    return tiles.permute(0, 3, 2, 1, 4).reshape(-1).view(torch.float8_e8m0fnu)


def _fake(x: Tensor, data: Tensor, *rest: object) -> Tensor:
    return x.new_empty((*x.shape[:-1], data.shape[0]))


LIBRARY.impl("round_blocks", round_blocks, "CompositeExplicitAutograd")
LIBRARY.impl("block_linear", block_linear, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::round_blocks", lambda x, spec: torch.empty_like(x), lib=LIBRARY)
torch.library.register_fake("qpass::block_linear", _fake, lib=LIBRARY)
