"""qpass::linears: linears one after another, each of the result of the one before it, as one call."""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qpass.errors import QpassError
from qpass.ops.schemas import LIBRARY

#: The tensors that a linear may have, by a letter: data, scale, zero point, outer scale, bias, norm, column scale, residual.
LETTERS = "dszobncr"


@dataclass(frozen=True)
class Step:
    """One linear of a row, as text "spec;given;eps;gate;residual;kept".

    `given`: the letters of the tensors that it has, in the order of LETTERS. `residual`: of which step the result is added.
    `kept`: whether its result is given back beside the last one; of one step at most.
    """

    spec: str
    given: str
    eps: float | None = None
    gate: str = ""
    residual: int | None = None
    kept: bool = False

    def __str__(self) -> str:
        *fields, kept = astuple(self)
        return ";".join("" if x is None else str(x) for x in (*fields, int(kept)))


@lru_cache
def parse_steps(steps: str) -> tuple[Step, ...]:
    """The steps of "step|step|..". Raises `QpassError` for text that is none."""
    try:
        cut = [text.split(";") for text in steps.split("|")]
        row = tuple(
            Step(spec, given, float(eps) if eps else None, gate, int(residual) if residual else None, kept == "1")
            for spec, given, eps, gate, residual, kept in cut
        )
    except ValueError as e:
        raise QpassError(f"qpass::linears: steps {steps!r} are not written as Step says ({e})") from None
    if sum(step.kept for step in row) > 1:
        raise QpassError(f"qpass::linears: steps {steps!r} keep more than one result beside the last")
    return row


def linears(x: Tensor, tensors: list[Tensor], steps: str) -> tuple[Tensor, Tensor]:
    """x [.., K] -> the last result [.., N], and the kept one or [0]. `tensors`: of all steps, one after another."""
    results: list[Tensor] = []
    row = parse_steps(steps)
    for step, t in zip(row, _by_step(tensors, row), strict=True):
        residual = t.get("r") if step.residual is None else results[step.residual]
        parts = (t["d"], t.get("s"), t.get("z"), t.get("o"), t.get("b"))
        x = torch.ops.qpass.linear(x, *parts, step.spec, t.get("n"), step.eps, t.get("c"), step.gate, residual)
        results.append(x)
    kept = (y for step, y in zip(row, results, strict=True) if step.kept)
    return x, next(kept, x.new_empty(0))


def _linears_fake(x: Tensor, tensors: list[Tensor], steps: str) -> tuple[Tensor, Tensor]:
    row = parse_steps(steps)
    rows = [t["d"].shape[0] // (2 if step.gate else 1) for step, t in zip(row, _by_step(tensors, row), strict=True)]
    kept = ((*x.shape[:-1], n) for step, n in zip(row, rows, strict=True) if step.kept)
    return x.new_empty((*x.shape[:-1], rows[-1])), x.new_empty(next(kept, (0,)))


def _by_step(tensors: list[Tensor], row: tuple[Step, ...]) -> list[dict[str, Tensor]]:
    wanted = sum(len(step.given) for step in row)
    if len(tensors) != wanted:
        raise QpassError(f"qpass::linears: {len(tensors)} tensors for steps that name {wanted}")
    rest = iter(tensors)
    return [{letter: next(rest) for letter in step.given} for step in row]


LIBRARY.impl("linears", linears, "CompositeExplicitAutograd")
torch.library.register_fake("qpass::linears", _linears_fake, lib=LIBRARY)
