"""Sub-byte codes to bytes and back, at the true bit width.

The codes of a row form one little-endian bit stream: code i fills bits [i*bits, (i+1)*bits). lcm(bits, 8) bits make a
unit of whole bytes (two 4-bit codes in one byte, eight 3-bit codes in three); a row is padded to whole units with zeros.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _unit(bits: int) -> tuple[int, int]:
    """(codes, bytes) in one unit."""
    width = math.lcm(bits, 8)
    return width // bits, width // 8


def as_bytes(part: Tensor) -> Tensor:
    """8-bit floats as their bytes, everything else as it is: not every device can write rows of such floats."""
    return part.view(torch.uint8) if part.dtype.is_floating_point and part.dtype.itemsize == 1 else part


def packed_length(length: int, bits: int) -> int:
    """Bytes of a packed row of `length` codes."""
    codes, size = _unit(bits)
    return -(-length // codes) * size


def pack(codes: Tensor, bits: int) -> Tensor:
    """[.., K] integer codes in 0 .. 2**bits - 1 -> [.., packed_length(K, bits)] uint8."""
    per_unit, unit_bytes = _unit(bits)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, -codes.shape[-1] % per_unit))
    parts = codes.unflatten(-1, (codes.shape[-1] // per_unit, per_unit))
    if unit_bytes == 1:  # stays in uint8: a 4- or 2-bit tensor is packed without a wide copy
        packed = parts[..., 0].clone()
        for i in range(1, per_unit):
            packed |= parts[..., i] << (i * bits)
        return packed
    word = torch.zeros(parts.shape[:-1], dtype=torch.int64, device=codes.device)
    for i in range(per_unit):
        word |= parts[..., i].to(torch.int64) << (i * bits)
    return torch.stack([(word >> (8 * i)) & 0xFF for i in range(unit_bytes)], dim=-1).to(torch.uint8).flatten(-2)


def unpack(packed: Tensor, bits: int, length: int) -> Tensor:
    """[.., packed_length(K, bits)] uint8 -> [.., K] uint8 codes, with K = `length`."""
    per_unit, unit_bytes = _unit(bits)
    mask = 2**bits - 1
    if unit_bytes == 1:
        codes = torch.stack([(packed >> (i * bits)) & mask for i in range(per_unit)], dim=-1)
    else:
        units = packed.unflatten(-1, (packed.shape[-1] // unit_bytes, unit_bytes)).to(torch.int64)
        word = torch.zeros(units.shape[:-1], dtype=torch.int64, device=packed.device)
        for i in range(unit_bytes):
            word |= units[..., i] << (8 * i)
        codes = torch.stack([(word >> (i * bits)) & mask for i in range(per_unit)], dim=-1).to(torch.uint8)
    return codes.flatten(-2)[..., :length]
