"""In what type products with quantized weights are computed. It belongs to the run: a spec says only what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from qpass.errors import QpassError
from qpass.spec import QuantSpec

Compute = Literal["float", "int8"]

#: Formats whose kernels multiply int8 activations unless told otherwise: with four bits a product in float is limited by
#: arithmetic, not by memory. The same on every instruction set.
INT8_BY_DEFAULT = frozenset({"int4", "nf4", "fp4_e2m1", "mxfp4", "nvfp4"})

_chosen: list[Compute | None] = [None]
#: Who remembers how products were computed, and must forget it when that changes.
ON_CHANGE: list[Callable[[], None]] = []


def changed() -> None:
    """Products are computed in another way from now on."""
    for forget in ON_CHANGE:
        forget()


class set_compute:
    """`set_compute("float")`: from now on in this process, or within a `with`; "int8"; None: as the table of formats says.

    "float" dequantizes inside the kernel and is exact but for rounding. "int8" quantizes the activations to int8 as they
    come, with a scale for every 32 of a row: what is lost is at most half a step, 1/254 of the largest of the 32, for each
    activation, and for nf4 1/254 of each weight's scale. A row that holds NaN or infinity gives NaN. Formats that it does
    not serve stay in float. Inputs of many rows in bfloat16 are multiplied in bfloat16 where the processor has such
    products.
    """

    def __init__(self, compute: Compute | None) -> None:
        if compute not in (None, "float", "int8"):
            raise QpassError(f"compute {compute!r}: 'float', 'int8' or None")
        self._compute, self._before = compute, _chosen[0]
        self._set(compute)

    def __enter__(self) -> None:
        self._set(self._compute)

    def __exit__(self, *_: Any) -> None:
        self._set(self._before)

    @staticmethod
    def _set(compute: Compute | None) -> None:
        _chosen[0] = compute
        changed()


def compute_of(spec: QuantSpec, device: str = "cpu") -> Compute:
    """How a weight in this format is multiplied. The int8 products of the CPU kernels take groups of whole eights."""
    served = spec.format.name in INT8_BY_DEFAULT and spec.group_size % 8 == 0 and device == "cpu"
    return "int8" if served and _chosen[0] != "float" else "float"
