"""In what type products with quantized weights are computed. It belongs to the run: a spec says only what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from qpass.errors import QpassError
from qpass.formats import FORMATS
from qpass.spec import QuantSpec

Compute = Literal["float", "int8"]

#: Kinds of formats whose kernels can multiply int8 activations.
_INT8_KINDS = frozenset({"uniform", "codebook"})
#: Below so many bits they do unless told otherwise: a product in float is limited by arithmetic then, not by memory. The same on
#: every instruction set.
_INT8_BELOW = 8

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
    served = spec.format.kind in _INT8_KINDS and spec.group_size % 8 == 0 and device == "cpu"
    wanted = _chosen[0] or ("int8" if spec.format.bits < _INT8_BELOW else "float")
    return "int8" if served and wanted == "int8" else "float"


def int8_by_default() -> list[str]:
    """The formats that are multiplied with int8 activations unless something else is asked for."""
    return sorted(f.name for f in FORMATS.values() if f.kind in _INT8_KINDS and f.bits < _INT8_BELOW)
