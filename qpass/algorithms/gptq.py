"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, what is lost is made up for in those still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.numerics import QParams, Quantized, dequantize, grid_of, quantize_to
from qpass.spec import QuantSpec

#: Added to the diagonal, as a share of its mean.
_DAMP = 0.01
#: Columns whose errors are passed on to the others at once.
_BLOCK = 128


def gptq(weight: Tensor, spec: QuantSpec, qparams: QParams, hessian: Tensor) -> Quantized:
    """[N, K] -> Quantized with the scales and zero points of `qparams`, which are chosen before (static groups).

    `hessian` [K, K]: the sum of x x^T over the inputs. Columns go in the order of their share in it, largest first. A row
    that rounding to nearest would serve better, and every row if the Hessian has no factor, is rounded to nearest.
    """
    nearest = quantize_to(weight, spec, qparams)
    order = hessian.diagonal().argsort(descending=True, stable=True)
    factor = _inverse_factor(hessian[order][:, order])
    if factor is None:
        return nearest
    grid = grid_of(spec, qparams, weight.shape)
    chosen = torch.empty_like(weight, dtype=torch.float32)
    rest = weight[:, order].float().clone()
    columns = order.tolist()
    for start in range(0, len(columns), _BLOCK):
        end = min(start + _BLOCK, len(columns))
        errors = torch.empty_like(rest[:, start:end])
        for i in range(start, end):
            value = grid.column(rest[:, i], columns[i])
            chosen[:, columns[i]] = value
            errors[:, i - start] = (rest[:, i] - value) / factor[i, i]
            rest[:, i + 1 : end].addr_(errors[:, i - start], factor[i, i + 1 : end], alpha=-1)
        rest[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
    done = quantize_to(chosen, spec, qparams)
    better = _loss(weight, done, spec, hessian) < _loss(weight, nearest, spec, hessian)
    kept = torch.where(better[:, None], chosen, dequantize(nearest, spec, weight.shape[-1]))
    return quantize_to(kept, spec, qparams)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U upper triangular with U^T U the inverse of the damped Hessian; None if it has none in float32."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    damp = _DAMP * diagonal.mean()
    diagonal += torch.where(diagonal == 0, torch.ones_like(diagonal), damp)  # a column that is never used: 1
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    factor, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(factor).all()) else factor


def _loss(weight: Tensor, quantized: Quantized, spec: QuantSpec, hessian: Tensor) -> Tensor:
    """||(W - Q) X||^2 of each row."""
    off = weight.float() - dequantize(quantized, spec, weight.shape[-1])
    return ((off @ hessian) * off).sum(-1)
