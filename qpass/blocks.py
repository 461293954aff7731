"""Tensors [.., K] cut into the blocks that share a scale: sums and ranges of each, and what each has spread over it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qpass.granularity import Granularity, PerGroup, PerTensor, PerTokens


def as_blocks(x: Tensor, granularity: Granularity, edge: bool = False) -> Tensor:
    """[.., K] -> [.., blocks, block]; the ragged end is padded with zeros, or (`edge`) with its last value."""
    if isinstance(granularity, PerGroup):
        g = granularity.group_size
        missing = -x.shape[-1] % g
        if missing:  # not by F.pad, which makes constants of symbolic sizes
            shape = (*x.shape[:-1], missing)
            x = torch.cat([x, x[..., -1:].expand(shape) if edge else x.new_zeros(shape)], -1)
        return x.unflatten(-1, (x.shape[-1] // g, g))
    return x.unsqueeze(-2)


def spread(per_block: Tensor, granularity: Granularity | None, shape: Sequence[int]) -> Tensor:
    """[.., blocks] -> [.., K], or the tensor itself where it broadcasts. `shape`: of what is quantized."""
    if isinstance(granularity, PerTokens):
        return per_block.repeat_interleave(granularity.tokens, dim=-2)[..., : shape[-2], :]
    if isinstance(granularity, PerGroup) and per_block.shape[-1] > 1:
        return per_block.repeat_interleave(granularity.group_size, dim=-1)[..., : shape[-1]]
    return per_block


def block_sums(x: Tensor, granularity: Granularity) -> Tensor:
    """[.., K] -> the sum over each block, shaped like the scales."""
    if isinstance(granularity, PerTensor):
        return x.sum().reshape(granularity.scale_shape(x.shape))
    return as_blocks(x, granularity).sum(-1)


def value_range(x: Tensor, granularity: Granularity, with_zero: bool = True) -> tuple[Tensor, Tensor]:
    """[.., K] -> (lowest, highest) value of each block in float32, both including 0 unless told; shaped like the scales."""
    if isinstance(granularity, PerTokens):
        low, high = value_range(x.mT, PerGroup(granularity.tokens), with_zero)
        return low.mT, high.mT
    if x.numel() == 0:
        zeros = torch.zeros(granularity.scale_shape(x.shape), device=x.device)
        return zeros, zeros
    if isinstance(granularity, PerTensor):
        low, high = torch.aminmax(x)
        shape = granularity.scale_shape(x.shape)
        low, high = low.reshape(shape), high.reshape(shape)
    else:
        low, high = torch.aminmax(as_blocks(x, granularity, edge=not with_zero), dim=-1)
    low, high = low.float(), high.float()
    return (low.clamp(max=0), high.clamp(min=0)) if with_zero else (low, high)
