"""Range search: for each block the range, somewhat smaller than that of its values, whose rounding loses least."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.blocks import block_sums
from qpass.numerics import QParams, choose_qparams, dequantize, quantize_to
from qpass.spec import QuantSpec

#: Shares of the range that are tried: 1, 1 - 1/GRID, ..
_GRID, _TRIED = 40, 20
#: Of |error|, where no calibration says how much each column counts (HQQ and AutoRound's search use the like).
_POWER = 2.4


def searched_qparams(
    weight: Tensor, spec: QuantSpec, whole: tuple[Tensor, Tensor] | None, importance: Tensor | None = None
) -> QParams:
    """Scales and zero points of `weight` [N, K] with the least error; `importance` [K]: by how much a squared error counts.

    `whole`: (lowest, highest) of the tensor that these rows are of.
    """
    best: Tensor | None = None
    shrink: Tensor | None = None
    assert spec.granularity is not None
    for i in range(_TRIED):
        shape = spec.granularity.scale_shape(weight.shape)
        tried = torch.full(shape, 1 - i / _GRID, device=weight.device)
        quantized = quantize_to(weight, spec, choose_qparams(weight, spec, whole, tried))
        error = (dequantize(quantized, spec, weight.shape[-1]) - weight.float()).abs()
        weighed = error**_POWER if importance is None else error.square() * importance
        loss = block_sums(weighed, spec.granularity)
        if best is None or shrink is None:
            best, shrink = loss, tried
        else:
            shrink = torch.where(loss < best, tried, shrink)
            best = torch.minimum(loss, best)
    return choose_qparams(weight, spec, whole, shrink)
