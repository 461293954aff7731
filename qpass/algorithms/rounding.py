"""From the algorithms that a spec names to codes: scales of columns, then ranges, then rounding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qpass.algorithms.columns import column_scale, output_error, some_rows
from qpass.algorithms.hqq import hqq_qparams
from qpass.algorithms.search import searched_qparams
from qpass.errors import QpassError
from qpass.numerics import QParams, choose_qparams, quantize_to
from qpass.observers import InputStats, Observed, observed, static_qparams
from qpass.quantized import Quantized
from qpass.spec import QuantSpec

#: Those that read what calibration collected.
NEED_DATA = frozenset({"smooth", "awq", "gptq"})
#: An input whose static scale costs more than this, as a share of the output, stays in float: a few inputs of a model reach
#: thousands for some tokens (SmolLM2: the down projections of two layers), and no one scale serves them.
WIDE = 0.02


@dataclass(frozen=True)
class InputParts:
    """What is done to the input of a weight before they are multiplied; see `Quantized`."""

    column_scale: Tensor | None = None
    input_scale: Tensor | None = None
    input_zero_point: Tensor | None = None

    def columns_of(self, weight: Tensor) -> Tensor:
        """[N, K] of the weight as it is quantized."""
        return weight if self.column_scale is None else weight.float() / self.column_scale


NO_INPUT_PARTS = InputParts()


def needs_data(spec: QuantSpec) -> str | None:
    """What of a spec cannot be had without calibration, if anything."""
    static = spec.activations is not None and spec.activations.static
    return next((a for a in spec.algorithms if a in NEED_DATA), "static" if static else None)


def needs_hessian(spec: QuantSpec) -> bool:
    """Whether all products of two columns of the input are read, not only their squares."""
    return "gptq" in spec.algorithms or ("awq" in spec.algorithms and spec.activations is None)


def check_data_free(spec: QuantSpec) -> None:
    """Raises `QpassError` for a spec that needs calibration."""
    missing = needs_data(spec)
    if missing is not None:
        raise QpassError(f"{spec}: {missing} needs data: qpass.quantize(model, recipe, calibration=batches)")


def input_parts(
    weights: Sequence[Tensor], spec: QuantSpec, stats: InputStats | None
) -> tuple[InputParts, InputStats | None, Observed | None]:
    """What is done to the input of weights [N_i, K] that read it together; its stats behind that; both in numbers."""
    if stats is None:
        return NO_INPUT_PARTS, None, None
    columns = column_scale(weights, spec, stats)
    stats = stats.scaled(columns)
    activations = spec.activations
    if activations is None or not activations.static:
        return InputParts(columns), stats, observed(stats, None, False)
    if stats.partial:  # later inputs are not known yet, and no scale of these serves them
        return InputParts(columns), stats, observed(stats, None, True)
    qparams = static_qparams(stats, activations)
    scaled = [InputParts(columns).columns_of(w) for w in some_rows(weights)]
    wide = max(output_error(scaled, scaled, stats, activations, qparams)) > WIDE
    parts = InputParts(columns) if wide else InputParts(columns, *qparams)
    return parts, stats, observed(stats, None if wide else qparams, wide)


#: Rows of a weight, with (lowest, highest) of all of it where the spec reads that -> Quantized.
Rounding = Callable[[Tensor, tuple[Tensor, Tensor] | None], Quantized]


def rounds_to_nearest(spec: QuantSpec, stats: InputStats | None) -> bool:
    """Whether scales follow from the range and codes from the scales, whatever is done to the input before.

    Raises `QpassError` if the spec needs data and there is none.
    """
    if stats is None:
        check_data_free(spec)
    return not {"hqq", "search", "gptq"} & set(spec.algorithms)


def rounding_of(spec: QuantSpec, stats: InputStats | None) -> Rounding:
    """Scales by search, HQQ or from the range, then codes by GPTQ or round to nearest.

    Raises `QpassError` if that needs data and there is none.
    """
    if stats is None:
        check_data_free(spec)
    importance = None if stats is None else stats.importance
    solver = stats.solver if stats is not None and "gptq" in spec.algorithms else None

    def qparams(rows: Tensor, whole: tuple[Tensor, Tensor] | None) -> QParams:
        if "hqq" in spec.algorithms:
            return hqq_qparams(rows, spec, whole)
        if "search" in spec.algorithms:
            return searched_qparams(rows, spec, whole, importance)
        return choose_qparams(rows, spec, whole)

    def rounding(rows: Tensor, whole: tuple[Tensor, Tensor] | None) -> Quantized:
        chosen = qparams(rows, whole)
        return quantize_to(rows, spec, chosen) if solver is None else solver.quantize(rows, spec, chosen)

    return rounding
