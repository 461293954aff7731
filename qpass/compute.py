"""In what type products with quantized weights are computed. It belongs to the run: a spec says only what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch

from qpass.errors import QpassError
from qpass.formats import FORMATS
from qpass.granularity import PerAxis, PerTensor
from qpass.spec import QuantSpec

Compute = Literal["float", "int8", "fp8", "fp4"]
#: What a caller may choose.
_CHOICES = (None, "float", "int8")
#: Compute capability of the first GPUs with products of fp8 (Ada), and of blocks that have scales of 8 bits (Blackwell).
_FP8_PRODUCTS, _BLOCK_PRODUCTS = (8, 9), (10, 0)

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
        if compute not in _CHOICES:
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
    """How a weight in this format is multiplied, on "cpu" or a GPU.

    The int8 products of the CPU kernels take groups of whole eights. A GPU multiplies codes where both the weight and its input
    have them (of more than 16 rows, if they are integers), and floats otherwise: a weight alone is dequantized in registers.
    """
    if device == "cuda":
        if multiplies_blocks(spec) and has_block_products(device):
            return "fp4" if spec.format.name == "nvfp4" else "fp8"
        return "int8" if multiplies_integers(spec) else "fp8" if multiplies_fp8(spec, device) else "float"
    served = spec.format.kind in _INT8_KINDS and spec.group_size % 8 == 0 and device == "cpu"
    wanted = _chosen[0] or ("int8" if spec.format.bits < _INT8_BELOW else "float")
    return "int8" if served and wanted == "int8" else "float"


def multiplies_integers(spec: QuantSpec) -> bool:
    """Whether the products of a weight and its input in codes can be summed as integers: no scale changes along a row."""
    return _of_whole_rows(spec) and spec.format.kind == "uniform" and _activations_are(spec, "int8")


def multiplies_fp8(spec: QuantSpec, device: str) -> bool:
    """Whether the device multiplies a weight and its input as fp8. Elsewhere both are dequantized: the result is the same."""
    codes = spec.format.name == "fp8_e4m3" and _activations_are(spec, "fp8_e4m3")
    return codes and (spec.granularity is None or _of_whole_rows(spec)) and has_fp8_products(device)


def multiplies_blocks(spec: QuantSpec) -> bool:
    """Whether a weight and its input are both in blocks that new GPUs multiply: of MX formats, or of nvfp4."""
    return spec.in_blocks and spec.activations is not None and spec.format.scale == spec.activations.format.scale


def _activations_are(spec: QuantSpec, name: str) -> bool:
    """With a scale for each row, or one for all."""
    activations = spec.activations
    scaled = activations is not None and (activations.static or isinstance(activations.granularity, PerAxis))
    return scaled and activations is not None and activations.format.name == name


def _of_whole_rows(spec: QuantSpec) -> bool:
    return isinstance(spec.granularity, PerAxis | PerTensor) and not spec.double_quantized and not spec.float_zero


def has_fp8_products(device: str) -> bool:
    """Whether GPUs of this kind, "cuda", multiply fp8."""
    return _capability(device) >= _FP8_PRODUCTS


def has_block_products(device: str) -> bool:
    """Whether GPUs of this kind, "cuda", multiply blocks of fp8 that have E8M0 scales, and of fp4 that have E4M3 scales."""
    return _capability(device) >= _BLOCK_PRODUCTS


def _capability(device: str) -> tuple[int, int]:
    """Compute capability of NVIDIA's GPUs; (0, 0) for others, and if there is none."""
    if device != "cuda" or not torch.cuda.is_available() or torch.version.hip:
        return 0, 0
    return torch.cuda.get_device_capability()


def int8_by_default() -> list[str]:
    """The formats that are multiplied with int8 activations unless something else is asked for."""
    return sorted(f.name for f in FORMATS.values() if f.kind in _INT8_KINDS and f.bits < _INT8_BELOW)
