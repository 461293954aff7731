"""How many elements share one scale. Groups run along the last axis, which for a weight is in_features, or along tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[.., K] -> [1, .., 1]"""
        return (1,) * len(shape)

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True)
class PerAxis:
    """One scale per row of the last axis: per output channel of a weight, per token (and head) of an activation."""

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[.., K] -> [.., 1]"""
        return (*shape[:-1], 1)

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True)
class PerGroup:
    """One scale per `group_size` consecutive elements of a row; the last group of a row may be shorter."""

    group_size: int

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[.., K] -> [.., ceil(K / group_size)]"""
        return (*shape[:-1], -(-shape[-1] // self.group_size))

    def __str__(self) -> str:
        return f"g{self.group_size}"


@dataclass(frozen=True)
class PerTokens:
    """One scale per channel for `tokens` consecutive rows: of a KV cache, whose keys differ by channel (KIVI, section 3)."""

    tokens: int

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """[.., S, K] -> [.., ceil(S / tokens), K]"""
        return (*shape[:-2], -(-shape[-2] // self.tokens), shape[-1])

    def __str__(self) -> str:
        return f"t{self.tokens}"


Granularity = PerTensor | PerAxis | PerGroup | PerTokens
