"""A cache whose last tokens are floats and leave their window in blocks (KIVI, Liu et al. 2024, section 3.3)."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.packing import as_bytes

#: Tokens that leave the window together, and are quantized together whatever the formats.
BLOCK = 32


def quantized_before(length: Tensor, window: int) -> Tensor:
    """Of a cache of `length` [] tokens, those before this one are read as quantized: whole blocks, and none of the last
    `window` tokens."""
    return (length - window).clamp(min=0) // BLOCK * BLOCK


def append_residual(
    k: list[Tensor],
    v: list[Tensor],
    floats: list[Tensor],
    length: Tensor,
    keys: Tensor,
    values: Tensor,
    k_spec: str,
    v_spec: str,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """One token behind those that are there; gives the first that is read as a float. A block that is then before it is
    quantized, and the floats behind it move to the front."""
    begin = int(torch.ops.qpass.cache_positions(length, 1, k[0].shape[2]))
    window = floats[0].shape[2] - BLOCK
    held_from, start = quantized_before(length, window), quantized_before(length + 1, window)
    at, leaves = int(held_from), bool(start > held_from)
    quantized: list[list[Tensor]] = [[], []]
    if leaves:  # both, before anything is written, for a number may be none
        given = zip(floats[:2], (k_spec, v_spec), (k_scale, v_scale), strict=True)
        quantized = [torch.ops.qpass.quantize(x[:, :, :BLOCK].contiguous(), spec, scale) for x, spec, scale in given]
    for parts, codes, states, last, first in zip(
        (k, v), quantized, (keys, values), floats[:2], floats[2:], strict=True
    ):
        last[:, :, begin - at] = states[:, :, 0]
        if begin < first.shape[2]:
            first[:, :, begin] = states[:, :, 0]
        if leaves:
            for part, code in zip(parts, codes, strict=True):
                rows = code.shape[2]  # of codes as many as tokens, of scales perhaps one
                place = at * rows // BLOCK
                part[:, :, place : place + rows] = as_bytes(code)
            last[:, :, :window] = last[:, :, BLOCK:].clone()
    length.add_(1)
    return start


def append_residual_fake(
    k: list[Tensor], v: list[Tensor], floats: list[Tensor], length: Tensor, *rest: object
) -> Tensor:
    """The shape of its result."""
    return torch.empty_like(length)
