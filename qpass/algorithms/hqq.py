"""HQQ (Badri and Shaji 2023): the zero point of each block that loses least, without data."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.blocks import block_sums
from qpass.numerics import QParams, choose_qparams, dequantize, grid_of, quantize_to
from qpass.spec import QuantSpec

#: Of the paper: the power of the error that counts, how strongly it is tied to the split, by how much more each time, and times.
_POWER, _BETA, _KAPPA, _TIMES = 0.7, 10.0, 1.01, 20


def hqq_qparams(weight: Tensor, spec: QuantSpec, whole: tuple[Tensor, Tensor] | None) -> QParams:
    """Scales of round to nearest of `weight` [N, K], and float zero points: by half-quadratic splitting of the sum of
    |error|^0.7, errors in steps. A block keeps the zero point that it had when that was least."""
    granularity = spec.granularity
    scale, zero, outer = choose_qparams(weight, spec, whole)
    assert scale is not None
    assert zero is not None
    assert granularity is not None
    zero = torch.round(
        zero
    )  # as the authors' code starts at 4 bits: what is nearly zero stays it, and most of a block is
    weight = weight.float()
    counts = block_sums(torch.ones_like(weight), granularity)
    step = grid_of(spec, (scale, zero, outer), weight.shape).scale
    assert step is not None
    best, chosen, beta = None, zero, _BETA
    for _ in range(_TIMES):
        off = (weight - dequantize(quantize_to(weight, spec, (scale, zero, outer)), spec, weight.shape[1])) / step
        loss = block_sums(off.abs() ** _POWER, granularity)
        chosen = zero if best is None else torch.where(loss < best, zero, chosen)
        best = loss if best is None else torch.minimum(loss, best)
        outliers = off.sign() * (off.abs() - off.abs().clamp(min=1e-8) ** (_POWER - 1) / beta).clamp(min=0)
        zero = (zero.float() + block_sums(outliers - off, granularity) / counts).to(zero.dtype)
        beta *= _KAPPA
    return scale, chosen, outer
