"""`qpass quantize --dry-run`: the memory, disk and time that quantizing a checkpoint would take, timed on small samples."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qpass.algorithms.rounding import needs_data, needs_hessian
from qpass.artifact.checkpoint import recipe_of
from qpass.artifact.save import absolute, check_target
from qpass.bits import LADDER
from qpass.calibration import WINDOW, WINDOWS
from qpass.errors import QpassError
from qpass.folders import check_model
from qpass.measuring.job import peak_rss
from qpass.observers import InputStats
from qpass.planning.memory import MemoryPlan, Planner, RecipeLike, group_columns
from qpass.pretrained import load_tokenizer
from qpass.recipe import Recipe, resolve_recipe
from qpass.replay import BUDGET
from qpass.sensitivity import TOKENS
from qpass.spec import QuantSpec, parse_spec
from qpass.store import quantize_group
from qpass.texts import tokenized

#: A timed sample of a weight: its rows with data, its numbers without; at most so many columns where time grows with their cube.
_ROWS, _NUMBERS, _COLUMNS = 256, 1 << 20, 1024
#: Of the largest block, beside the quantized model; matrices [K, K] that GPTQ holds at once.
_BLOCKS, _MATRICES = 1.25, 4
#: A capture by Dynamo takes so many times a trace; what is kept, and the artifact, are hashed and written, and hashed once more.
_CAPTURE, _WRITTEN = 4.0, 3
#: What a run in float costs beside its products: norms, attention, copies.
_BESIDE_PRODUCTS = 1.5


@dataclass(frozen=True)
class Estimate:
    """Bytes of memory and disk (the artifact, and as much again until it is whole), seconds by what they are spent on.

    `free`: bytes on the disk of the target now. The artifact is within a percent; time and memory are within a factor of two.
    """

    artifact_bytes: int
    disk_bytes: int
    free_bytes: int
    memory_bytes: int
    seconds: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def total_seconds(self) -> float:
        """Of all of it."""
        return sum(self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        return asdict(self) | {"total_seconds": self.total_seconds}

    def __str__(self) -> str:
        spent = ", ".join(f"{name} {_told(seconds)}" for name, seconds in self.seconds.items())
        lines = [
            f"artifact {self.artifact_bytes / 1e6:,.1f} MB; on disk until it is whole {self.disk_bytes / 1e6:,.1f} MB, "
            f"{self.free_bytes / 1e6:,.0f} MB are free",
            f"memory about {self.memory_bytes / 1e6:,.0f} MB",
            f"time about {_told(self.total_seconds)}: {spent}",
        ]
        return "\n".join([*lines, *self.notes])


def _told(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"


def estimate(
    source: str | Path,
    target: str | Path,
    recipe: RecipeLike = "int8",
    *,
    calibration: str | Path | None = None,
    like: str | Path | None = None,
) -> Estimate:
    """What `quantize_checkpoint` with the same arguments would take. Nothing is loaded or written.

    Raises `QpassError` for what that refuses before it begins.
    """
    source, target = absolute(source), absolute(target)
    check_model(source)
    check_target(target)
    chosen = recipe_of(like) if like is not None else resolve_recipe(recipe, calibration is not None)
    if not os.access(next(p for p in (target, *target.parents) if p.exists()), os.W_OK):
        raise QpassError(f"{target}: cannot be written there")
    begun = time.perf_counter()
    planner = Planner(source)
    traced = time.perf_counter() - begun
    plan = planner.plan(chosen)
    groups = [(group.spec, params, group_columns(group, params)) for _, group, params in planner.groups(chosen)]
    if calibration is None and any(needs_data(spec) for spec, _, _ in groups):
        raise QpassError(f"the recipe chooses by data: give --calibration, a text ({chosen.to_dict()})")
    tokens = 0 if calibration is None else _tokens(source, Path(calibration))
    with torch.no_grad():
        seconds = {"starting": time.process_time() + _CAPTURE * traced} | _seconds(planner, chosen, groups, tokens)
    seconds["reading, hashing and writing"] = _seconds_of_hash() * (
        plan.weights.float_bytes + _WRITTEN * plan.weights.bytes
    )
    artifact = plan.weights.bytes
    free = shutil.disk_usage(next(p for p in (target, *target.parents) if p.exists())).free
    notes = (
        (f"the disk is too small: {2 * artifact:,} bytes are needed, {free:,} are free",) if 2 * artifact > free else ()
    )
    return Estimate(artifact, 2 * artifact, free, _memory(planner, plan, chosen, groups, tokens), seconds, notes)


def _tokens(source: Path, calibration: Path) -> int:
    """Of the windows that calibration takes."""
    rows = tokenized(calibration, load_tokenizer(source))
    return min(WINDOWS, sum(len(row) // WINDOW for row in rows)) * WINDOW


Groups = Sequence[tuple[QuantSpec, Sequence[Tensor], int]]


def _memory(planner: Planner, plan: MemoryPlan, recipe: Recipe, groups: Groups, tokens: int) -> int:
    largest = max((sum(p.nbytes for p in params) for _, params, _ in groups), default=0)
    found = peak_rss() + plan.weights.bytes + _BLOCKS * largest
    if tokens:
        widest = max(columns for _, _, columns in groups)
        found += min(BUDGET, tokens * 4 * widest * 3)
        if any(needs_hessian(spec) for spec, _, _ in groups):
            found += _MATRICES * 4 * widest**2
    if recipe.bits is not None:  # the backward pass reads every float weight, and holds the values of one batch
        products = sum(p.shape[0] for _, params, _ in groups for p in params if p.dim() == 2)
        found += plan.weights.float_bytes + WINDOW * 4 * products
    return int(found)


def _seconds(planner: Planner, recipe: Recipe, groups: Groups, tokens: int) -> dict[str, float]:
    rounding = 0.0
    known: dict[tuple[str, int, bool], tuple[float, float]] = {}
    for spec, params, columns in groups:
        key = str(spec), columns, tokens > 0
        if key not in known:
            known[key] = _timed(spec, columns, tokens > 0)
        once, each = known[key]
        rounding += once + each * sum(p.numel() for p in params)
    found = {"rounding": rounding}
    numbers = sum(p.numel() for p in planner.model.parameters())
    if tokens:
        product = _seconds_of_product()
        hessians = sum(columns**2 for spec, _, columns in groups if needs_hessian(spec))
        found["calibration"] = product * tokens * (numbers * _BESIDE_PRODUCTS + hessians)
        if recipe.bits is not None:
            formats = sum(_timed(parse_spec(step), _COLUMNS, False)[1] for step in LADDER)
            found["giving out bits"] = product * TOKENS * numbers * 3 * _BESIDE_PRODUCTS + formats * numbers
    return found


def _timed(spec: QuantSpec, columns: int, data: bool) -> tuple[float, float]:
    """Seconds for each group, and for each number, of a sample of a random weight with `columns`; its input is random too."""
    width = min(columns, _COLUMNS) if needs_hessian(spec) and data else columns
    generator = torch.Generator().manual_seed(0)
    rows = _ROWS if data else max(_ROWS, _NUMBERS // width)
    weight = torch.randn(rows, width, generator=generator)
    stats = None
    once = 0.0
    if data:
        stats = InputStats.empty(width, hessian=needs_hessian(spec))
        stats.add(torch.randn(2 * width, width, generator=generator))
        if needs_hessian(spec):
            once = _seconds_of(lambda: stats.solver) * (columns / width) ** 3
    seconds = min(_seconds_of(lambda: quantize_group([weight], spec, stats)) for _ in range(3))
    return once, seconds / weight.numel() * columns / width


def _seconds_of_product() -> float:
    """One multiplication and addition in fp32, as large products do them."""
    x, w = torch.randn(512, 2048), torch.randn(2048, 2048)
    x @ w
    return _seconds_of(lambda: x @ w) / (512 * 2048 * 2048)


def _seconds_of_hash() -> float:
    """A byte through SHA-256, which is slower than a disk."""
    content = bytes(1 << 24)
    return _seconds_of(lambda: hashlib.sha256(content).digest()) / len(content)


def _seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
