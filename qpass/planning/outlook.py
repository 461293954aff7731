"""Whether a plan fits, what a smaller format would save, and how fast a step can be: what `qpass plan` adds to the bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qpass.errors import QpassError, nearest
from qpass.planning.memory import MemoryPlan, Planner, RecipeLike
from qpass.printing import number_table, printed
from qpass.recipe import SpecLike, kv_specs

#: One format for every weight, from wide to narrow: what the sizes of a model are told in.
LADDER = ("fp32", "bf16", "fp8_e4m3", "int8", "int4:g128")
#: What is next in size, for weights (presets) and for caches.
WEIGHT_STEPS, CACHE_STEPS = ("bf16", "int8", "int4", "int4:g128", "int3:g128", "int2:g128"), ("int8", "int4", "int2")


@dataclass(frozen=True)
class Device:
    """`memory` in bytes, `bandwidth` of it in bytes a second: nominal, from the makers' data sheets."""

    name: str
    memory: float
    bandwidth: float


#: NVIDIA: data sheets of A100 80GB SXM, H100 SXM, H200, B200 (HGX), L40S, RTX 4090 and 5090; AMD: of MI300X.
DEVICES = (
    Device("RTX 4090", 24e9, 1.008e12),
    Device("RTX 5090", 32e9, 1.792e12),
    Device("L40S", 48e9, 0.864e12),
    Device("A100", 80e9, 2.039e12),
    Device("H100", 80e9, 3.35e12),
    Device("H200", 141e9, 4.8e12),
    Device("B200", 180e9, 8.0e12),
    Device("MI300X", 192e9, 5.3e12),
)


@dataclass(frozen=True)
class Rung:
    """One format for all weights, or for the cache. `nominal_bytes`: bits a number."""

    what: str
    format: str
    nominal_bytes: int
    bytes: int


@dataclass(frozen=True)
class Saving:
    """What the next smaller format would save of the total, and the total then."""

    what: str
    format: str
    saved_bytes: int
    total_bytes: int


@dataclass(frozen=True)
class Floor:
    """The least time of a decode step: its bytes over the bandwidth of as many devices as hold the plan."""

    device: str
    memory: float
    fits: bool
    devices: int
    step_seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class Outlook:
    """A plan and what follows from it. `print` shows tables, `to_json()` gives plain data.

    `memory`: bytes of the device that was asked about; None if none was.
    """

    plan: MemoryPlan
    ladder: tuple[Rung, ...]
    savings: tuple[Saving, ...]
    floors: tuple[Floor, ...]
    memory: float | None = None

    @property
    def fits(self) -> bool | None:
        """Whether weights and cache are smaller than `memory`; None if there is none, or the cache is not known."""
        if self.memory is None or not self.plan.is_whole:
            return None
        return self.plan.total.bytes <= self.memory

    def to_json(self) -> dict[str, Any]:
        """The fields as plain data."""
        parts = {name: [asdict(x) for x in getattr(self, name)] for name in ("ladder", "savings", "floors")}
        return self.plan.to_json() | parts | {"memory": self.memory, "fits": self.fits}

    def __rich__(self) -> Any:
        from rich.console import Group

        unit, size = self.plan.unit

        def told(count: float) -> str:
            return f"{count / size:,.1f}"

        rungs = [(f"{r.what} in {r.format}", told(r.nominal_bytes), told(r.bytes)) for r in self.ladder]
        floors = [
            (f.device, f"{f.memory / 1e9:,.0f}", "yes" if f.fits else f"on {f.devices}", f"{f.step_seconds * 1e3:,.2f}",
             f"{f.tokens_per_second:,.0f}")
            for f in self.floors
        ]  # fmt: skip
        savings = [
            f"{s.what} in {s.format} instead: {told(s.saved_bytes)} {unit} less, {told(s.total_bytes)} {unit} together"
            for s in self.savings
        ]
        tables = (
            _table(("all in one format", f"nominal {unit}", f"with scales {unit}"), rungs),
            _table(("decode floor", "GB each", "fits", "ms a step", "tokens/s"), floors),
        )
        of = f"the least that a step of batch {self.plan.batch} reads, over the bandwidth of what holds it: none is faster"
        return Group(
            self.plan, *self._verdict(), "", tables[0], *(["", *savings] if savings else []), "", tables[1], of
        )

    def _verdict(self) -> list[str]:
        if self.memory is None:
            return []
        unit, size = ("GB", 1e9) if self.memory >= 1e9 else ("MB", 1e6)
        device = f"{self.memory / size:,.0f} {unit} of memory"
        if self.fits is None:
            return ["", f"{device}: whether it fits is not known, for the cache is not"]
        left = (self.memory - self.plan.total.bytes) / size
        if self.fits:
            return ["", f"{device}: it fits, {left:,.1f} {unit} are left for activations"]
        count = math.ceil(self.plan.total.bytes / self.memory)
        return ["", f"{device}: it does not fit, {-left:,.1f} {unit} are missing; {count} such devices hold it"]

    def __str__(self) -> str:
        return printed(self)


def _table(columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Any:
    table = number_table(*columns)
    for row in rows:
        table.add_row(*row)
    return table


def outlook(
    planner: Planner,
    recipe: RecipeLike = "int8",
    kv: SpecLike = None,
    memory: float | None = None,
    devices: Sequence[Device] = DEVICES,
    calibrated: bool = False,
) -> Outlook:
    """Plan `recipe` and what lies around it. `memory`: bytes of one device. `calibrated`: as with calibration data."""
    plan = planner.plan(recipe, kv, calibrated)
    ladder = [rung for format in LADDER if (rung := _rung(planner, format)) is not None]
    cached = any(row.kind == "kv" for row in plan.rows)
    if cached:
        for format in (None, *CACHE_STEPS):
            try:
                row = planner.cache(kv_specs(None, None, format, "plan"))
            except QpassError:  # a layer has no such form
                continue
            ladder.append(Rung("cache", format or _float_name(planner), row.nominal_bytes, row.bytes))
    floors = tuple(_floor(plan, device) for device in devices)
    return Outlook(plan, tuple(ladder), tuple(_savings(planner, plan, ladder)), floors, memory)


def _float_name(planner: Planner) -> str:
    return str(next(planner.model.parameters()).dtype).removeprefix("torch.")


def _rung(planner: Planner, format: str) -> Rung | None:
    """None for a format that does not fit the model: rows that are smaller than its groups."""
    try:
        weights = planner.plan(format).weights
    except QpassError:
        return None
    return Rung("weights", format, weights.nominal_bytes, weights.bytes)


def _savings(planner: Planner, plan: MemoryPlan, ladder: Sequence[Rung]) -> list[Saving]:
    """The first preset whose weights are a tenth smaller than the plan's; the first such format of the cache."""
    found = []
    weights = (rung for step in WEIGHT_STEPS if (rung := _rung(planner, step)) is not None)
    caches = (rung for rung in ladder if rung.what == "cache")
    for now, rungs in ((plan.weights.bytes, weights), (plan.cache.bytes, caches)):
        smaller = next((rung for rung in rungs if rung.bytes < 0.9 * now), None)
        if smaller is not None:
            saved = now - smaller.bytes
            found.append(Saving(smaller.what, smaller.format, saved, plan.total.bytes - saved))
    return found


def _floor(plan: MemoryPlan, device: Device) -> Floor:
    count = max(1, math.ceil(plan.total.bytes / device.memory))
    seconds = plan.total.step_bytes / (count * device.bandwidth)
    return Floor(device.name, device.memory, count == 1, count, seconds, plan.batch / seconds)


def named_devices(names: Sequence[str]) -> tuple[Device, ...]:
    """Devices by name, whatever the case. Raises `QpassError` with the nearest for an unknown one."""
    known = {device.name.lower(): device for device in DEVICES}
    for name in names:
        if name.lower() not in known:
            raise QpassError(f"device {name!r}: {nearest(name, [d.name for d in DEVICES])}")
    return tuple(known[name.lower()] for name in names) or DEVICES


def parse_bytes(text: str) -> float:
    """ "80GB", "80GiB", "512 MB" or "80" (GB) in bytes. Raises `QpassError` for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise QpassError(f"{text!r} is no size of memory; write 80GB, 80GiB or 512MB")
    power = "KMGT".index(match[2].upper()) + 1 if match[2] else 3
    return float(match[1]) * (1024 if match[3] else 1000) ** power
