"""GPTQ (Frantar et al. 2023): columns are rounded one after the other, what is lost is made up for in those still to come."""

from __future__ import annotations

import torch
from torch import Tensor

from qpass.numerics import Grid, QParams, dequantize, grid_of, quantize_to
from qpass.quantized import Quantized
from qpass.spec import QuantSpec

#: Added to the diagonal, as a share of its mean.
_DAMP = 0.01
#: Columns whose errors are passed on to the others at once.
_BLOCK = 128


class Gptq:
    """The Hessian [K, K], the sum of x x^T over the inputs, made ready for the rows of every weight that reads them.

    Columns go in the order of their share in it, largest first.
    """

    def __init__(self, hessian: Tensor) -> None:
        self.hessian = hessian
        order = hessian.diagonal().argsort(descending=True, stable=True)
        self.order = order.tolist()
        self.factor = _inverse_factor(hessian[order[:, None], order])

    def quantize(self, weight: Tensor, spec: QuantSpec, qparams: QParams) -> Quantized:
        """[N, K] -> Quantized with the scales and zero points of `qparams`, which are chosen before (static groups).

        A row that rounding to nearest serves better, and every row if the Hessian has no factor, is rounded to nearest.
        """
        nearest = quantize_to(weight, spec, qparams)
        if self.factor is None:
            return nearest
        chosen = self._solve(weight.float(), grid_of(spec, qparams, weight.shape), self.factor)
        plain = dequantize(nearest, spec, weight.shape[1])
        better = self._loss(weight - chosen) < self._loss(weight - plain)
        return quantize_to(torch.where(better[:, None], chosen, plain), spec, qparams)

    def _solve(self, weight: Tensor, grid: Grid, factor: Tensor) -> Tensor:
        chosen, rest = torch.empty_like(weight), weight[:, self.order]
        for start in range(0, len(self.order), _BLOCK):
            end = min(start + _BLOCK, len(self.order))
            errors = torch.empty_like(rest[:, start:end])
            for i in range(start, end):
                value = grid.column(rest[:, i], self.order[i])
                chosen[:, self.order[i]] = value
                errors[:, i - start] = (rest[:, i] - value) / factor[i, i]
                rest[:, i + 1 : end].addr_(errors[:, i - start], factor[i, i + 1 : end], alpha=-1)
            rest[:, end:].addmm_(errors, factor[start:end, end:], alpha=-1)
        return chosen

    def _loss(self, off: Tensor) -> Tensor:
        """||(W - Q) X||^2 of each row."""
        return ((off @ self.hessian) * off).sum(-1)


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U upper triangular with U^T U the inverse of the damped Hessian, which is overwritten; None if it has none in float32."""
    diagonal = hessian.diagonal()
    damp = _DAMP * diagonal.mean()
    diagonal += torch.where(diagonal == 0, torch.ones_like(diagonal), damp)  # a column that is never used: 1
    lower, failed = torch.linalg.cholesky_ex(hessian)
    if int(failed):
        return None
    torch.cholesky_inverse(lower, out=hessian)  # matrices of K x K are what takes memory here
    del lower
    factor, failed = torch.linalg.cholesky_ex(hessian, upper=True)
    return None if int(failed) or not bool(torch.isfinite(factor).all()) else factor
