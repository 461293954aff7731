"""In what type products with quantized weights are computed. It belongs to the run: a spec says only what is stored."""

from __future__ import annotations

from typing import Any, Literal

from qpass.errors import QpassError
from qpass.spec import QuantSpec

Compute = Literal["float", "int8"]

#: Formats of four bits whose kernels multiply int8 activations unless told otherwise: in float they would be limited by
#: arithmetic, not by memory. All others are exact.
INT8_BY_DEFAULT = frozenset({"int4", "nf4", "fp4_e2m1", "mxfp4", "nvfp4"})

_chosen: list[Compute | None] = [None]


class set_compute:
    """`set_compute("float")`: from now on, or within a `with`; "int8"; None: as the table of formats says.

    "float" dequantizes inside the kernel and is exact but for rounding. "int8" quantizes the activations to int8 as they
    come, with a scale for every 32 of a row; formats that it does not serve stay in float.
    """

    def __init__(self, compute: Compute | None) -> None:
        if compute not in (None, "float", "int8"):
            raise QpassError(f"compute {compute!r}: 'float', 'int8' or None")
        self._before = _chosen[0]
        _chosen[0] = compute

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        _chosen[0] = self._before


def compute_of(spec: QuantSpec, columns: int) -> Compute:
    """How the CPU kernels multiply a weight of `columns` inputs in this format."""
    name = spec.format.name
    if name not in INT8_BY_DEFAULT or _chosen[0] == "float":
        return "float"
    # A lane of the integer products holds eight inputs.
    return "int8" if spec.group_size % 8 == 0 or spec.group_size >= columns else "float"
