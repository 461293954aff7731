"""How codes are chosen where rounding each weight to the nearest is not enough. One file an algorithm."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.algorithms.gptq import gptq
from qpass.algorithms.search import searched_qparams
from qpass.numerics import Quantized, choose_qparams, quantize_to
from qpass.spec import QuantSpec

#: Those that read what calibration collected.
NEED_DATA = frozenset({"gptq"})


@dataclass
class InputStats:
    """What calibration saw of the input of a linear: `hessian` [K, K], the sum of x x^T in float32, over `tokens` rows x."""

    hessian: Tensor
    tokens: int = 0

    @classmethod
    def empty(cls, columns: int, device: torch.device | str = "cpu") -> InputStats:
        """Before the first token."""
        return cls(torch.zeros((columns, columns), device=device))

    def add(self, x: Tensor) -> None:
        """Take in rows [.., K]."""
        rows = x.reshape(-1, x.shape[-1]).float()
        self.hessian.addmm_(rows.mT, rows)
        self.tokens += len(rows)

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 for each column [K]."""
        return self.hessian.diagonal() / max(1, self.tokens)


def quantize_by_algorithms(weight: Tensor, spec: QuantSpec, stats: InputStats | None) -> Quantized:
    """[N, K] -> Quantized, by the algorithms that the spec names: scales by `search` or round to nearest, then codes."""
    importance = None if stats is None else stats.importance
    qparams = (
        searched_qparams(weight, spec, importance) if "search" in spec.algorithms else choose_qparams(weight, spec)
    )
    if "gptq" in spec.algorithms:
        assert stats is not None
        return gptq(weight, spec, qparams, stats.hessian)
    return quantize_to(weight, spec, qparams)
