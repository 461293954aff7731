"""What calibration sees of the input of a linear, and the range of a static scale that follows from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from qpass import ranks
from qpass.algorithms.gptq import Gptq
from qpass.numerics import choose_qparams, for_whole_tensor, round_to
from qpass.spec import QuantSpec

#: Rows kept as they are: a uniform sample, and those with the largest numbers, of which there may be one in thousands.
_SAMPLED, _EXTREME = 504, 8
#: Of the values, at either end, that "percentile" cuts off, and what a report calls the range of most of them.
_CUT, _FEW = 1e-4, 1e-3
#: Shares of the whole range that "mse" tries: the k-th is _STEP ** k.
_STEP, _TRIED = 0.9, 60
#: Bins of "entropy", and codes of one sign (TensorRT's calibration: S. Migacz, 8-bit inference with TensorRT, GTC 2017).
_BINS, _CODES = 2048, 128


@dataclass
class InputStats:
    """Of rows x [tokens, K], in float32: `absolute` and `squares` [K], the sums of |x| and x^2; `low`, `high` [K]; `hessian`
    [K, K], the sum of x x^T, if it is asked for.

    `sample` [.., K] is a uniform sample of the rows, `extreme` those with the largest numbers.
    """

    hessian: Tensor | None
    absolute: Tensor
    squares: Tensor
    low: Tensor
    high: Tensor
    sample: Tensor
    extreme: Tensor
    tokens: int = 0
    partial: bool = False  # the weight is also used with inputs that are not among these
    _keys: Tensor = field(default_factory=lambda: torch.empty(0))
    _random: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(ranks.rank()))

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu", hessian: bool = True) -> InputStats:
        """Before the first token."""
        none, row = torch.zeros((0, columns), device=device), torch.zeros(columns, device=device)
        whole = torch.zeros((columns, columns), device=device) if hessian else None
        return cls(whole, row, row, row, row, none, none)

    def add(self, x: Tensor) -> None:
        """Take in rows [.., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        if not len(rows):
            return
        if self.hessian is not None:
            self.hessian.addmm_(rows.mT, rows)
        self.absolute = self.absolute + rows.abs().sum(0)
        self.squares = self.squares + rows.square().sum(0)
        low, high = torch.aminmax(rows, dim=0)
        self.low, self.high = (
            (torch.minimum(self.low, low), torch.maximum(self.high, high)) if self.tokens else (low, high)
        )
        self.tokens += len(rows)
        keys = torch.cat([self._keys, torch.rand(len(rows), generator=self._random)])
        kept = keys.topk(min(_SAMPLED, len(keys))).indices
        self.sample, self._keys = torch.cat([self.sample, rows])[kept.to(rows.device)], keys[kept]
        known = torch.cat([self.extreme, rows])
        self.extreme = known[known.abs().amax(1).topk(min(_EXTREME, len(known))).indices]

    def over_ranks(self) -> InputStats:
        """Of the rows that all ranks saw, on each of them."""
        if ranks.count() == 1:
            return self
        tokens = int(ranks.total(torch.tensor(self.tokens)))
        none = torch.full_like(self.low, torch.inf)
        keys, sample, extreme = (ranks.rows_of_all(x) for x in (self._keys, self.sample, self.extreme))
        kept = keys.topk(min(_SAMPLED, len(keys))).indices
        extreme = extreme[extreme.abs().amax(1).topk(min(_EXTREME, len(extreme))).indices]
        return InputStats(
            None if self.hessian is None else ranks.total(self.hessian),
            ranks.total(self.absolute), ranks.total(self.squares),
            ranks.lowest(self.low if self.tokens else none), ranks.highest(self.high if self.tokens else -none),
            sample[kept.to(sample.device)], extreme, tokens, self.partial, keys[kept],
        )  # fmt: skip

    @cached_property
    def solver(self) -> Gptq:
        """GPTQ for the weights that read this input, once all of it was seen."""
        assert self.hessian is not None
        return Gptq(self.hessian)

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 for each column [K]."""
        return self.squares / max(1, self.tokens)

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows [n, K] that stand for all, and for how many each does [n]."""
        weights = torch.ones(len(self.sample) + len(self.extreme), device=self.low.device)
        weights[: len(self.sample)] = self.tokens / max(1, len(self.sample))
        return torch.cat([self.sample, self.extreme]), weights

    def scaled(self, columns: Tensor | None) -> InputStats:
        """Of x * columns, for positive `columns` [1, K]."""
        if columns is None:
            return self
        c = columns.reshape(-1)
        names = ("absolute", "low", "high", "sample", "extreme")
        hessian = None if self.hessian is None else self.hessian * c * c[:, None]
        scaled = {name: getattr(self, name) * c for name in names}
        return replace(self, hessian=hessian, squares=self.squares * c.square(), **scaled)


@dataclass(frozen=True)
class Observed:
    """What a report says of an input: its range, that of all but a thousandth at either end, and what it is quantized with.

    `scale`, `zero_point`: static ones; None if it is quantized as it comes, or left `wide`: in float, where one scale costs too
    much.
    """

    low: float
    high: float
    low_percentile: float
    high_percentile: float
    tokens: int
    scale: float | None = None
    zero_point: int | None = None
    wide: bool = False


def observed(stats: InputStats, qparams: tuple[Tensor, Tensor | None] | None, wide: bool) -> Observed:
    """The stats of an input in numbers. `qparams`: its static scale and zero point."""
    ends = _quantiles(stats.sample, _FEW) if stats.tokens else (0.0, 0.0)
    scale, zero = (None, None) if qparams is None else qparams
    return Observed(
        float(stats.low.min()), float(stats.high.max()), *ends, stats.tokens,
        None if scale is None else float(scale), None if zero is None else int(zero), wide,
    )  # fmt: skip


def static_qparams(stats: InputStats, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """(scale, zero point) [1, 1] of an input, by the range that `spec.range` asks for: the whole one; all but the values in
    either end; that with the least squared error; that whose histogram, quantized, diverges least (symmetric)."""
    low, high = stats.low.min(), stats.high.max()
    if spec.range == "percentile":
        ends = _quantiles(stats.sample, _CUT)
        low, high = low.new_tensor(ends[0]), high.new_tensor(ends[1])
    elif spec.range == "mse":
        shrink = _least_squares(stats, spec, low, high)
        low, high = low * shrink, high * shrink
    elif spec.range == "entropy":
        amax = torch.maximum(-low, high)
        amax = amax * _least_divergence(stats.sample.abs(), float(amax))
        low, high = torch.maximum(low, -amax), torch.minimum(high, amax)
    return _of_range(spec, low, high)


def quantized_statically(x: Tensor, spec: QuantSpec, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    """[.., K] -> the same as it comes back from codes with this scale and zero point."""
    return round_to(x, for_whole_tensor(spec), (scale, zero_point, None))


def _of_range(spec: QuantSpec, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
    scale, zero, _ = choose_qparams(torch.stack([low, high]).reshape(1, 2), for_whole_tensor(spec))
    assert scale is not None
    return scale, zero


def _quantiles(sample: Tensor, cut: float) -> tuple[float, float]:
    values = sample.flatten()
    few = max(1, round(cut * len(values)))
    return float(values.kthvalue(few).values), float(values.kthvalue(len(values) + 1 - few).values)


def _least_squares(stats: InputStats, spec: QuantSpec, low: Tensor, high: Tensor) -> float:
    rows, weights = stats.rows
    losses = []
    for k in range(_TRIED):
        scale, zero = _of_range(spec, low * _STEP**k, high * _STEP**k)
        off = quantized_statically(rows, spec, scale, zero) - rows
        losses.append(float((off.square().sum(1) * weights).sum()))
    return float(_STEP ** losses.index(min(losses)))


def _least_divergence(magnitudes: Tensor, amax: float) -> float:
    """The share of 0 .. amax for which the histogram of what lies in it, and the same in _CODES steps, diverge least."""
    counts = torch.histc(magnitudes.float().cpu(), _BINS, 0, amax or 1.0).double()
    best, chosen = float("inf"), _BINS
    for bins in range(_CODES, _BINS + 1, _CODES // 8):
        kept = counts[:bins].clone()
        kept[-1] += counts[bins:].sum()  # what is cut off is stored as the end of the range
        step = torch.arange(bins) * _CODES // bins
        filled = (counts[:bins] > 0).double()
        sums, spread = (
            torch.zeros(_CODES, dtype=torch.float64).index_add_(0, step, x) for x in (counts[:bins], filled)
        )
        stored = (sums / spread.clamp(min=1))[step] * filled
        p, q = kept / kept.sum(), stored / stored.sum().clamp(min=1)
        used = p > 0
        loss = float((p[used] * (p[used] / q[used].clamp(min=1e-12)).log()).sum())
        if loss < best:
            best, chosen = loss, bins
    return chosen / _BINS
