"""Scales of columns: what makes the columns of an input alike, and a weight the harder to round, or the other way round.

x W^T = (x c) (W / c)^T for any c > 0 of the columns. The input is multiplied by c in the graph, where the compiler joins that
with whatever makes it (a norm, a gated product): no Parameter to fold c into is needed, and the function of no model changes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qpass.numerics import fake_quantize, fake_quantize_rows
from qpass.observers import InputStats, quantized_statically, static_qparams
from qpass.spec import QuantSpec

#: SmoothQuant's alpha (Xiao et al. 2023): how much of the outliers goes into the weight.
_ALPHAS = tuple(i / 20 for i in range(8, 20))
#: AWQ's exponents (Lin et al. 2023) of mean |x|.
_RATIOS = tuple(i / 20 for i in range(20))
#: Rows of each weight that losses are measured on.
_ROWS = 512


def column_scale(weights: Sequence[Tensor], spec: QuantSpec, stats: InputStats) -> Tensor | None:
    """The c [1, K] with the least error of the outputs of `weights` [N_i, K], which read one input; None if that is c = 1.

    "smooth": c = max|w|^(1 - a) / max|x|^a. "awq": c = mean|w|^(1 - r) / mean|x|^r.
    """
    if not {"smooth", "awq"} & set(spec.algorithms) or not stats.tokens or stats.partial:
        return None
    if spec.activations is not None:
        stats = replace(stats, hessian=None)  # errors are those of the rows that were kept
    some = some_rows(weights)
    plain = replace(spec, algorithms=())
    best, chosen = _loss(some, plain, stats, None), None
    for candidate in _candidates(weights, spec, stats):
        loss = _loss(some, plain, stats, candidate)
        if loss < best:
            best, chosen = loss, candidate
    return chosen


def some_rows(weights: Sequence[Tensor]) -> list[Tensor]:
    """Evenly picked rows of each weight, in float32."""
    return [w.detach()[:: -(-len(w) // _ROWS)].float() for w in weights]


def _candidates(weights: Sequence[Tensor], spec: QuantSpec, stats: InputStats) -> Iterator[Tensor]:
    if "smooth" in spec.algorithms:
        x = torch.maximum(-stats.low, stats.high)
        w = torch.stack([weight.detach().abs().amax(0).float() for weight in weights]).amax(0)
        exponents = _ALPHAS
    else:
        x = stats.absolute / stats.tokens
        rows = sum(len(weight) for weight in weights)
        w = torch.stack([weight.detach().abs().sum(0, dtype=torch.float32) for weight in weights]).sum(0) / rows
        exponents = _RATIOS
    used = (x > 0) & (w > 0)
    if not bool(used.any()):
        return
    for exponent in exponents:
        c = torch.where(used, w, 1.0) ** (1 - exponent) / torch.where(used, x, 1.0) ** exponent
        middle = (c[used].amax() * c[used].amin()).sqrt()
        yield torch.where(used, c / middle, 1.0).clamp(1e-4, 1e4)[None]


def _loss(weights: Sequence[Tensor], spec: QuantSpec, stats: InputStats, c: Tensor | None) -> float:
    """Of the outputs: sum of squared errors over all tokens; with quantized activations, on the rows that were kept."""
    divided = [weight if c is None else weight / c for weight in weights]
    stored = [fake_quantize(weight, spec) for weight in divided]
    if spec.activations is not None:
        return output_error(divided, stored, stats.scaled(c), spec.activations)[1]
    assert stats.hessian is not None
    loss = 0.0
    for weight, rounded in zip(weights, stored, strict=True):
        off = weight - (rounded if c is None else rounded * c)
        loss += float(((off @ stats.hessian) * off).sum())
    return loss


def output_error(
    weights: Sequence[Tensor],
    stored: Sequence[Tensor],
    stats: InputStats,
    activations: QuantSpec,
    qparams: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[float, float]:
    """Errors of x W^T where x and W are quantized: (relative to the output of each token, the mean; relative to all outputs)."""
    rows, tokens = stats.rows
    if activations.static:
        x = quantized_statically(rows, activations, *(qparams or static_qparams(stats, activations)))
    else:
        x = fake_quantize_rows(rows, activations)
    exact = torch.cat([rows @ w.mT for w in weights], 1)
    off = torch.cat([x @ w.mT for w in stored], 1) - exact
    power, noise = exact.square().sum(1), off.square().sum(1)
    each = (noise / power.clamp(min=1e-30) * tokens).sum() / tokens.sum()
    return float(each), float((noise * tokens).sum() / (power * tokens).sum().clamp(min=1e-30))
