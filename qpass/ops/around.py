"""What qpass::linear does beside the product, written in torch: to its input before, to its result after."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from qpass.errors import QpassError, nearest

#: Name of a gate -> its function.
GATES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"),
}  # fmt: skip


@dataclass(frozen=True)
class Around:
    """The last arguments of qpass::linear, see its schema; in the order in which it takes them."""

    norm: Tensor | None = None
    eps: float | None = None
    column_scale: Tensor | None = None
    gate: str = ""
    residual: Tensor | None = None

    @property
    def changes_input(self) -> bool:
        """Whether anything is done before the product."""
        return self.norm is not None or self.eps is not None or self.column_scale is not None

    @property
    def behind(self) -> Around:
        """Only what is done after it."""
        return replace(self, norm=None, eps=None, column_scale=None)

    def before(self, x: Tensor) -> Tensor:
        """[.., K] -> [.., K], computed in float32."""
        if not self.changes_input:
            return x
        y = x.float()
        if self.eps is not None:
            y = y * (y.square().mean(-1, keepdim=True) + self.eps).rsqrt()
        for factor in (self.norm, self.column_scale):
            y = y if factor is None else y * factor.float()
        return y.to(x.dtype)

    def after(self, y: Tensor) -> Tensor:
        """[.., N] -> [.., N], or [.., N / 2] with a gate."""
        if self.gate:
            if self.gate not in GATES:
                raise QpassError(f"qpass::linear: gate {self.gate!r}; {nearest(self.gate, GATES)}")
            first, second = y.chunk(2, -1)
            y = GATES[self.gate](first) * second
        return y if self.residual is None else y + self.residual
