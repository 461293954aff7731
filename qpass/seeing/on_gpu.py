"""What the report says of weights that GPU kernels do not read as they are stored."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qpass.backend import Capture, QPass
from qpass.compute import compute_of, has_fp8_products
from qpass.ops.triton import launching
from qpass.ops.triton.table import fused_kind, most_rows
from qpass.qtensor import QTensor
from qpass.spec import QuantSpec


@dataclass(frozen=True)
class Multiplied:
    """A weight that inputs of `dtype` are multiplied with: its format, the columns of a stored row."""

    spec: QuantSpec
    columns: int
    dtype: torch.dtype
    device: torch.device


def multiplied(params: Sequence[tuple[str, Tensor]], backend: QPass, captures: Sequence[Capture]) -> list[Multiplied]:
    """Quantized weights of linears in float, whose few rows a kernel should serve."""
    flipped = {m.site for c in captures for m in c.plan.matches if getattr(m.call, "transposed", False)}
    found = []
    for _, param in params:
        decision = backend.decisions.of(param)
        if decision is None or decision.spec is None or decision.spec.is_identity or backend.store.stats(param) is None:
            continue
        if decision.site.roles != ("embedding",) and compute_of(decision.spec, "cuda") == "float":
            transposed = param.transposed if isinstance(param, QTensor) else decision.site in flipped
            columns = param.shape[-2 if transposed else -1]
            found.append(Multiplied(decision.spec, columns, param.dtype, param.device))
    return found


def notes_on(weights: Iterable[Multiplied]) -> list[str]:
    """Which of them, on GPUs, are made floats at every call, and why."""
    unread: Counter[str] = Counter()
    elsewhere, widened, read = set[str](), set[str](), set[str]()
    for weight in weights:
        if weight.device.type != "cuda":
            continue
        stored, _, of_input = str(weight.spec).partition("@")
        if stored.startswith("fp8") and of_input.startswith("fp8") and not has_fp8_products("cuda"):
            widened.add(str(weight.spec))
        if not launching.runs_on(weight.device):
            elsewhere.add(stored)
        elif fused_kind(stored, weight.columns, weight.dtype) is None:
            unread[f"{stored}, {weight.columns} columns, {str(weight.dtype).removeprefix('torch.')}"] += 1
        else:
            read.add(f"{stored} ({most_rows(stored, weight.dtype)})")
    notes = [
        f"{count} weights in {what}: no GPU kernel reads them as they are stored; they are dequantized at every call, which "
        "moves more bytes than the float model does; formats that are read: docs/performance.md"
        for what, count in unread.items()
    ]
    if elsewhere:
        notes.append(
            f"no kernels on this GPU (they need triton and sm_80): {', '.join(sorted(elsewhere))} are dequantized in torch at "
            "every call"
        )
    if widened:
        notes.append(
            f"{', '.join(sorted(widened))}: this GPU has no products of fp8 (they need sm_89); floats are multiplied instead"
        )
    if read:
        notes.append(
            f"{', '.join(sorted(read))}: read as stored by inputs of up to so many rows; more are multiplied with floats "
            "that are made at each call, which takes longer than in the float model up to some hundreds of rows"
        )
    return notes + [
        f"the GPU kernel for {what} failed here; a slower way is taken" for what in sorted(launching.failed)
    ]
