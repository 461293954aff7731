"""qpass.report: every site, what became of it, what it costs."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram

from qpass.backend import Capture, QPass
from qpass.compute import compute_of
from qpass.errors import QpassError
from qpass.graph.torch_private import original_module, recompile_limit
from qpass.observers import Observed
from qpass.printing import printed
from qpass.qtensor import QTensor
from qpass.ready import has_hooks
from qpass.registry import FINISHED, captured, captures_of
from qpass.seeing.on_gpu import multiplied, notes_on

#: This many equal layers are shown as one row.
_FOLDED = 4
_HOOKS = (
    "accelerate's hooks (device_map) break the graph at every module: accelerate.hooks.remove_hook_from_submodules(model), "
    "or model = qpass.quantize(model, ...)"
)


@dataclass(frozen=True)
class SiteReport:
    """One site: bytes of the float weight and of what is stored, SQNR in dB, or why it stays in float.

    `compute`: what its products are computed in, if there are any (see qpass.set_compute). `bytes_per_token`: of a cache.
    `input`: what calibration saw of the input that it multiplies. `seconds`: that quantizing it took, in this process.
    """

    kind: str
    name: str
    format: str | None
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    skipped: str | None
    compute: str | None = None
    bytes_per_token: float | None = None
    input: Observed | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Report:
    """All sites of a model. `print(report)` shows a table, `to_json()` gives plain data.

    `resident_float`, `resident_quantized`: bytes of weights in memory now, both kinds.
    """

    sites: tuple[SiteReport, ...]
    resident_float: int
    resident_quantized: int
    notes: tuple[str, ...] = ()
    title: str = "qpass"

    @property
    def bytes_before(self) -> int:
        """Bytes of all sites in float."""
        return sum(s.bytes_before for s in self.sites)

    @property
    def bytes_after(self) -> int:
        """Bytes of all sites as stored."""
        return sum(s.bytes_after for s in self.sites)

    def to_json(self) -> dict[str, Any]:
        """{"sites": [...], "bytes_before", "bytes_after", ...} as plain data for json.dumps."""
        return {
            "sites": [asdict(s) for s in self.sites],
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "resident_float": self.resident_float,
            "resident_quantized": self.resident_quantized,
            "notes": list(self.notes),
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """One page that needs nothing else, to look at in a browser. Written to `path`, if given, whole or not at all."""
        from qpass.seeing.html.page import page

        return page("report", self.title, {"title": self.title} | self.to_json(), path)

    def _repr_html_(self) -> str:
        from qpass.seeing.html.page import in_notebook

        return in_notebook(self.to_html())

    def __rich__(self) -> Any:
        from rich.console import Group
        from rich.table import Table

        columns = ["kind", "name", "format", "compute", "bytes before", "after", "SQNR dB"]
        calibrated = any(s.input is not None for s in self.sites)
        table = Table(*columns, *(["input"] if calibrated else []), box=None, pad_edge=False)
        table.columns[1].overflow, table.columns[1].min_width = "fold", 24  # a name is of use only whole
        table.columns[2].min_width = 16
        for column in table.columns[4:]:
            column.justify = "right"
        for name, sites in self.folded():
            s, decibels = sites[0], [s.sqnr_db for s in sites if s.sqnr_db is not None]
            sqnr = " .. ".join(dict.fromkeys(f"{d:.1f}" for d in (min(decibels), max(decibels)))) if decibels else ""
            format_or_reason = s.format if s.skipped is None else f"float: {s.skipped}"
            if s.bytes_per_token:
                format_or_reason = f"{format_or_reason}, {s.bytes_per_token:,.0f} bytes a token"
            totals = sum(s.bytes_before for s in sites), sum(s.bytes_after for s in sites)
            cells = [s.kind, name, format_or_reason, s.compute or "", *(f"{b:,}" if b else "" for b in totals), sqnr]
            table.add_row(*cells, *([_input_range(sites)] if calibrated else []))
        return Group(table, *self._summary())

    def folded(self) -> list[tuple[str, list[SiteReport]]]:
        """Sites that differ in the number of their layer only, from four on, as ("model.layers.*.mlp.up_proj x 32", sites)."""
        groups: dict[tuple[str, ...], list[SiteReport]] = {}
        for s in self.sites:
            key = re.sub(r"(?<=\.)\d+(?=\.)", "*", s.name), s.kind, str(s.format), str(s.skipped)
            groups.setdefault(key, []).append(s)
        rows: list[tuple[str, list[SiteReport]]] = []
        for (pattern, *_), sites in groups.items():
            rows += [(f"{pattern} x {len(sites)}", sites)] if len(sites) >= _FOLDED else [(s.name, [s]) for s in sites]
        return rows

    def _summary(self) -> list[str]:
        ratio = self.bytes_before / max(1, self.bytes_after)
        lines = [
            f"{len(self.sites)} sites, {self.bytes_before:,} -> {self.bytes_after:,} bytes ({ratio:.2f}x smaller)",
            f"in memory now: {self.resident_float:,} bytes of float weights, {self.resident_quantized:,} quantized",
        ]
        return lines + list(self.notes)

    def __str__(self) -> str:
        return printed(self)


def _input_range(sites: Sequence[SiteReport]) -> str:
    """Range of the inputs, of all and of most values; the static scales."""
    seen = [s.input for s in sites if s.input is not None]
    if not seen:
        return ""
    low, high = min(o.low for o in seen), max(o.high for o in seen)
    most = min(o.low_percentile for o in seen), max(o.high_percentile for o in seen)
    text = f"{low:.3g} .. {high:.3g}, most {most[0]:.3g} .. {most[1]:.3g}"
    scales = [o.scale for o in seen if o.scale is not None]
    if scales:
        text += ", scale " + " .. ".join(dict.fromkeys(f"{s:.3g}" for s in (min(scales), max(scales))))
    zeros = {o.zero_point for o in seen if o.zero_point is not None}
    return text + (f", zero {min(zeros)} .. {max(zeros)}" if zeros else "")


def report(x: Any) -> Report:
    """Report on a model, on what torch.compile or torch.export made of it, or on a QPass backend.

    Raises `QpassError` if nothing was captured yet.
    """
    if isinstance(x, ExportedProgram) and x in FINISHED:
        return FINISHED[x][0]
    if isinstance(x, ExportedProgram):
        raise QpassError("qpass.report: this program is not what qpass.quantize returned (a loaded one has no report)")
    backend = captured(x, "qpass.report")
    found = report_on(parameters_of(x, backend), backend, captures_of(x, backend))
    if any(row.skipped and "eagerly" in row.skipped for row in found.sites) and has_hooks(original_module(x)):
        found = replace(found, notes=(*found.notes, _HOOKS))
    return found if isinstance(x, QPass) else replace(found, title=type(original_module(x)).__name__)


def report_on(params: list[tuple[str, Tensor]], backend: QPass, captures: Sequence[Capture]) -> Report:
    """The report on named Parameters and the graphs that use them."""
    eager = any(c.fragment for c in captures)
    rows = [row for name, p in params for row in _weight_rows(name, p, backend, eager)]
    rows += _cache_rows(captures)
    float_bytes = sum(p.nbytes for _, p in params if not isinstance(p, QTensor))
    stored = [s.nbytes for _, p in params if (s := backend.store.stats(p)) is not None]
    notes = [*_notes(backend, params, bool(stored)), *notes_on(multiplied(params, backend, captures))]
    return Report(tuple(rows), float_bytes, sum(stored), tuple(notes))


def parameters_of(x: Any, backend: QPass) -> list[tuple[str, Tensor]]:
    """(name, Parameter) of the model; of a backend alone, of all it has seen."""
    model = original_module(x)
    if hasattr(model, "named_parameters"):
        return list(model.named_parameters())
    return [(d.site.name, p) for p, d in backend.decisions.items()]


def _weight_rows(name: str, param: Tensor, backend: QPass, eager: bool) -> list[SiteReport]:
    """`eager`: parts of the model may run outside of all captured graphs."""
    decision = backend.decisions.of(param)
    before = math.prod(param.shape) * param.dtype.itemsize
    if decision is None:
        reason = "in no captured graph: "
        reason += (
            "after a graph break torch runs it eagerly, in float (see qpass.quantize), or the calls so far did not use it"
            if eager
            else "the calls so far did not use it; qpass.quantize(..., inputs=...) takes arguments that do"
        )
        return [SiteReport("other", name, None, before, before, None, reason)] if param.dim() > 1 else []
    site, stats = decision.site, backend.store.stats(param)
    if decision.spec is not None and stats is None:
        reason = "not quantized yet: no captured graph has used it; after a graph break in a loop torch runs it eagerly, in float"
        return [SiteReport(site.kind, name, None, before, before, None, reason)]
    if decision.spec is None:
        reason = decision.skip.reason if decision.skip is not None else "stays in float"
        return [SiteReport(site.kind, name, None, before, before, None, reason)]
    assert stats is not None
    outcome = stats.outcome
    sqnr = outcome.sqnr_db if math.isfinite(outcome.sqnr_db) else None
    kind = "+".join(dict.fromkeys((site.kind, *(r for r in site.roles if r in ("embedding", "vocab")))))
    compute = None if site.roles == ("embedding",) else compute_of(decision.spec, param.device.type)
    return [SiteReport(kind, name, str(decision.spec), before, stats.nbytes, sqnr, None, compute, None, outcome.observed,
                       outcome.seconds)]  # fmt: skip


def _cache_rows(captures: Sequence[Capture]) -> list[SiteReport]:
    """Caches of the graphs captured last win: a prefill without a cache, then a decode with one."""
    rows: dict[str, SiteReport] = {}
    for capture in captures:
        for skip in capture.plan.skipped:
            if skip.site.kind == "kv":
                rows.setdefault(skip.site.name, SiteReport("kv", skip.site.name, None, 0, 0, None, skip.reason))
        for match in capture.plan.matches:
            if match.weight is None:
                call = match.call
                spec = call.specs[0] if len(set(call.specs)) == 1 else "k={}, v={}".format(*call.specs)
                row = SiteReport("kv", match.site.name, spec, call.bytes_float, call.bytes_stored, None, None,
                                 bytes_per_token=call.bytes_per_token or None)  # fmt: skip
                rows[match.site.name] = row
    return list(rows.values())


def _notes(backend: QPass, params: list[tuple[str, Tensor]], quantized: bool) -> list[str]:
    decisions = [d for _, p in params if (d := backend.decisions.of(p)) is not None]
    notes = [f"{d.site.name}: {d.note}" for d in decisions if d.note]
    found = {d.site.kind for d in decisions} | {r for d in decisions for r in d.site.roles}
    named = [
        k for k in ("embedding", "qkv", "attn_out", "ffn", "vocab") if getattr(backend.recipe, k) and k not in found
    ]
    stats = [(name, backend.store.stats(p)) for name, p in params]
    wide = [name for name, s in stats if s is not None and s.outcome.observed is not None and s.outcome.observed.wide]
    if wide:
        notes.append(f"input left in float, no one scale serves all its tokens: {', '.join(wide)}")
    notes += [f"the recipe names {kind}; the model has none" for kind in named]
    if any(not isinstance(p, QTensor) and backend.store.stats(p) is not None for _, p in params):
        notes.append(
            'the float weights stay in memory beside the quantized ones; model = qpass.quantize(model, "...") frees them'
        )
    for name in backend.planner.in_pieces:
        notes.append(
            f"{name}: captured in pieces, and its whole graph could not be traced: a site may have the wrong kind"
        )
    if backend.calibrated_in_pieces:
        notes.append(
            "calibrated in pieces: the model ran in float between graph breaks, so what a piece reads did not come through the "
            "quantized weights before it"
        )
    frames: dict[str, int] = {}
    for capture in backend.captures:
        if capture.frame is not None:
            frames[capture.frame] = frames.get(capture.frame, 0) + 1
    if frames and max(frames.values()) >= recompile_limit():
        notes.append(
            f"{max(frames.values())} graphs of one function: at this limit torch runs further shapes in float, eagerly"
        )
    return notes + _times(backend, params)


def _times(backend: QPass, params: Sequence[tuple[str, Tensor]]) -> list[str]:
    """How long quantizing took, by algorithms, where they take long."""
    spent: dict[str, tuple[float, int]] = {}
    for _, param in params:
        stats, decision = backend.store.stats(param), backend.decisions.of(param)
        if stats is None or not stats.outcome.seconds:  # loaded
            continue
        if decision is not None and decision.spec is not None and decision.spec.algorithms:
            name = ", ".join(decision.spec.algorithms)
            seconds, count = spent.get(name, (0.0, 0))
            spent[name] = seconds + stats.outcome.seconds, count + param.numel()
    return [f"{name}: {t:.1f} s, {t / n * 1e6:.2g} s per million weights" for name, (t, n) in spent.items()]
