"""Quantized: a tensor as it is stored, in parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Quantized:
    """A quantized tensor as it is stored: a row range of it is a row range of each part that has rows.

    data: [.., packed K]. scale: [.., blocks], [.., token blocks, K] or [1, .., 1], None for a direct cast. zero_point: integer,
    shaped like `data` over the blocks (packed below 8 bits), or a float like the scale; None if symmetric. outer_scale:
    float32, what stored 8-bit scales are multiplied by: [1, .., 1] for nvfp4, [.., 1] for double quantization, otherwise None.
    Of a weight, for the input that it multiplies: column_scale [1, K], by which the input is multiplied first (the columns
    were divided by it before they were quantized); input_scale, input_zero_point [1, 1] of an input quantized statically.
    """

    data: Tensor
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    outer_scale: Tensor | None = None
    column_scale: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Stored bytes of all parts."""
        return sum(part.nbytes for part in self.all_parts if part is not None)

    @property
    def parts(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(data, scale, zero_point, outer_scale): the order in which operators take them."""
        return self.data, self.scale, self.zero_point, self.outer_scale

    @property
    def around(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What is done to the input: (column_scale, input_scale, input_zero_point)."""
        return self.column_scale, self.input_scale, self.input_zero_point

    def is_for_the_input_of(self, other: Quantized) -> bool:
        """Whether both are multiplied by inputs that are prepared in the same way."""
        pairs = zip(self.around, other.around, strict=True)
        return all(a is b or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)

    @property
    def all_parts(self) -> tuple[Tensor | None, ...]:
        """In the order of PART_NAMES."""
        return *self.parts, *self.around

    def map(self, function: Callable[[Tensor], Tensor]) -> Quantized:
        """`function` applied to each part that is there."""
        return Quantized(*(None if part is None else function(part) for part in self.all_parts))  # type: ignore[arg-type]


PART_NAMES = ("data", "scale", "zero_point", "outer_scale", "column_scale", "input_scale", "input_zero_point")
