"""How codes are chosen where rounding each weight to the nearest is not enough. One file an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qpass.algorithms.gptq import Gptq
from qpass.algorithms.search import searched_qparams
from qpass.errors import QpassError
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

    @cached_property
    def solver(self) -> Gptq:
        """GPTQ for the weights that read this input, once all of it was seen."""
        return Gptq(self.hessian)

    @property
    def importance(self) -> Tensor:
        """Mean of x^2 for each column [K]."""
        return self.hessian.diagonal() / max(1, self.tokens)


def check_data_free(spec: QuantSpec) -> None:
    """Raises `QpassError` for a spec that names an algorithm which needs data."""
    missing = sorted(NEED_DATA & set(spec.algorithms))
    if missing:
        raise QpassError(f"{spec}: {missing[0]} needs data: qpass.quantize(model, recipe, calibration=batches)")


#: Rows of a weight, with (lowest, highest) of all of it -> Quantized.
Rounding = Callable[[Tensor, tuple[Tensor, Tensor]], Quantized]


def rounding_of(spec: QuantSpec, stats: InputStats | None) -> Rounding:
    """What the spec asks for: scales by search or round to nearest, then codes by GPTQ or round to nearest.

    Raises `QpassError` if that needs data and there is none.
    """
    if stats is None:
        check_data_free(spec)
    importance = None if stats is None else stats.importance
    solver = stats.solver if stats is not None and "gptq" in spec.algorithms else None

    def rounding(rows: Tensor, whole: tuple[Tensor, Tensor]) -> Quantized:
        searched = "search" in spec.algorithms
        qparams = searched_qparams(rows, spec, whole, importance) if searched else choose_qparams(rows, spec, whole)
        return quantize_to(rows, spec, qparams) if solver is None else solver.quantize(rows, spec, qparams)

    return rounding
