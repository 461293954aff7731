"""What qpass.diff looks at: the graphs of a model, and the formats, bytes, errors and scales of its sites."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph

from qpass.backend import Capture, QPass
from qpass.graph.torch_private import original_module
from qpass.numerics import scale_values
from qpass.qtensor import QTensor
from qpass.registry import FINISHED, captured, captures_of
from qpass.seeing.diff import Diff, GraphDiff, Histogram, NodeChange, SiteDetail, SiteSide, diff_graphs
from qpass.seeing.report import Report, SiteReport, parameters_of, report

#: A histogram counts this many scales at most, in so many bins.
COUNTED, _BINS = 1 << 16, 48
#: What computes with the weight of a site that stayed in float, in either spelling.
_WEIGHTED = {"input", "linear", "embedding", "addmm", "mm", "matmul", "einsum", "bmm"}


@dataclass(frozen=True)
class Side:
    """One side of a diff. `graphs`: each with what is known of its nodes' sites. `sites`: (kind, name) -> how it is stored."""

    title: str
    graphs: tuple[tuple[Graph, Mapping[str, str]], ...]
    sites: Mapping[tuple[str, str], SiteSide]


def diff_of(x: Any) -> Diff:
    """The graphs of a model before against after. Raises `QpassError` if nothing was captured yet."""
    if isinstance(x, ExportedProgram) and x in FINISHED:
        graphs = list(FINISHED[x][1].graphs)
    else:
        captures = captures_of(x, captured(x, "qpass.diff"))
        graphs = [diff_graphs(c.before, c.after, (known := _known(c), known)) for c in captures]
    rows, sides = report(x).sites, sides_of(x)
    dtypes = {key: side.dtype for key, side in sides.items()}
    details = [
        SiteDetail(r.kind, r.name, SiteSide(None, r.bytes_before, dtypes[r.kind, r.name]), sides[r.kind, r.name])
        for r in rows
    ]
    return _finished(graphs, details, _title(x))


def diff_of_two(before: Side, after: Side) -> Diff:
    """The graphs of one model against those of another, in order; a graph that only one has is all removed or added."""
    none: tuple[Graph, Mapping[str, str]] = Graph(), {}
    pairs = zip_longest(before.graphs, after.graphs, fillvalue=none)
    graphs = [diff_graphs(a, b, (of_a, of_b)) for (a, of_a), (b, of_b) in pairs]
    everything = [key for key in (*after.sites, *before.sites) if key[0]]  # a weight that no side has as a site is none
    kinds = {name: kind for kind, name in everything if kind != "kv"}
    keys = dict.fromkeys((kind if kind == "kv" else kinds[name], name) for kind, name in everything)

    def of(side: Side, kind: str, name: str) -> SiteSide | None:
        found = (s for (k, n), s in side.sites.items() if n == name and (k == "kv") == (kind == "kv"))
        return next(found, None)

    details = [SiteDetail(kind, name, of(before, kind, name), of(after, kind, name)) for kind, name in keys]
    return _finished(graphs, details, f"{before.title} against {after.title}")


def side_of(x: Any) -> Side:
    """The graphs of a model as qpass left them. Raises `QpassError` if it has captured none."""
    if isinstance(x, ExportedProgram):
        return Side(_title(x), ((x.graph, {}),), sides_of(x))
    captures = captures_of(x, captured(x, "qpass.diff"))
    return Side(_title(x), tuple((c.after, _known(c)) for c in captures), sides_of(x))


def side_in_float(model: torch.nn.Module, graphs: Iterable[Graph]) -> Side:
    """The graphs of a model that qpass has not seen; its Parameters are the sites, of whatever kind the other side says."""
    params = {("", name): _float(p) for name, p in model.named_parameters() if p.dim() > 1}
    return Side(_title(model), tuple((graph, {}) for graph in graphs), params)


def sides_of(x: Any) -> dict[tuple[str, str], SiteSide]:
    """(kind, name) of each site in the report on `x` -> how it is stored; of a program that is all float, its Parameters."""
    if isinstance(x, ExportedProgram):
        if x not in FINISHED:
            weights = {("", n): _float(p) for n, p in x.state_dict.items() if isinstance(p, torch.nn.Parameter)}
            return {key: side for key, side in weights.items() if len(x.state_dict[key[1]].shape) > 1}
        found: Report = FINISHED[x][0]
        return {(r.kind, r.name): _side(r, "", _exported_scales(x, r)) for r in found.sites}
    backend = captured(x, "qpass.diff")
    params = dict(parameters_of(x, backend))
    sides = {}
    for row in report(x).sites:
        param = params.get(row.name) if row.kind != "kv" else None
        scales = None if param is None or row.format is None else stored_scales(backend, param)
        sides[row.kind, row.name] = _side(row, "" if param is None else _dtype(param), scales)
    return sides


def _finished(graphs: Sequence[GraphDiff], details: Sequence[SiteDetail], title: str) -> Diff:
    return Diff(tuple(_with_sites(g, details) for g in graphs), tuple(details), title)


def _side(row: SiteReport, dtype: str, scales: Tensor | None) -> SiteSide:
    shown = None if scales is None else histogram(scales)
    return SiteSide(row.format, row.bytes_after, dtype, row.sqnr_db, row.skipped, row.compute, shown)


def _float(param: Tensor) -> SiteSide:
    return SiteSide(None, param.nbytes, _dtype(param))


def _dtype(param: Tensor) -> str:
    return str(param.dtype).removeprefix("torch.")


def _title(x: Any) -> str:
    model = original_module(x)
    return repr(x) if isinstance(x, QPass) else type(model).__name__


# --- nodes of sites -----------------------------------------------------------------------------------------------------


def _known(capture: Capture) -> dict[str, str]:
    """Name of a node, before or after -> "<kind> <name>" of the site whose rewrite removed or added it."""
    edits = {name: edit for edit in capture.edits for name in edit.removed}
    found: dict[str, str] = {}
    for match in capture.plan.matches:
        key = f"{match.site.kind} {match.site.name}"
        edit = edits.get(match.node.name)
        names = [match.node.name, *(() if edit is None else (*edit.removed, *edit.added))]
        for name in (*names, *(() if match.weight is None else (match.weight.name,))):
            found.setdefault(name, key)
    return found


def _with_sites(graph: GraphDiff, details: Sequence[SiteDetail]) -> GraphDiff:
    """What the rewrites did not touch, or said nothing of: a weight's nodes are in its module, an attention is above its keys."""
    of_module: dict[str, list[SiteDetail]] = {}
    caches: dict[str, str] = {}
    for site in details:
        module = site.name.rpartition(".")[0]
        if site.kind == "kv":
            caches |= {module.rpartition(".")[0]: site.key, site.name.removeprefix("cache of "): site.key}
        else:
            of_module.setdefault(module, []).append(site)
    alone = {module: sites[0].key for module, sites in of_module.items() if len(sites) == 1}

    def of(node: NodeChange) -> str:
        if "attention" in node.op:
            return caches.get(node.module) or caches.get(node.name) or ""
        return alone.get(node.module, "") if node.op in _WEIGHTED or node.group is not None else ""

    return GraphDiff(tuple(n if n.site else replace(n, site=of(n)) for n in graph.nodes))


# --- scales -------------------------------------------------------------------------------------------------------------


def stored_scales(backend: QPass, param: Tensor) -> Tensor | None:
    """What multiplies the codes of a Parameter, as far as it is quantized: a QTensor holds it, else the backend's store."""
    if isinstance(param, QTensor):
        scale, outer = param.quantized.scale, param.quantized.outer_scale
        return None if scale is None else _sampled(scale, outer)
    scale, outer = backend.store.scales(param) or (None, None)
    return None if scale is None else _sampled(scale, outer)


def _exported_scales(program: ExportedProgram, row: SiteReport) -> Tensor | None:
    """Of a weight that is stored by itself; those of a group share a buffer, in which their rows are not told apart."""
    parts = {
        part: program.state_dict.get(f"{row.name}_{part}") for part in ("data", "scale", "zero_point", "outer_scale")
    }
    stored = sum(part.nbytes for part in parts.values() if part is not None)
    scale, outer = parts["scale"], parts["outer_scale"]
    return None if scale is None or stored != row.bytes_after else _sampled(scale, outer)


def _sampled(scale: Tensor, outer: Tensor | None) -> Tensor:
    """Float32 values of stored scales of any type, flat."""
    return scale_values(scale.detach(), outer).flatten()


def histogram(scales: Tensor) -> Histogram | None:
    """Of positive numbers; `COUNTED` of them, evenly strided, are counted, while the lowest and highest are of all."""
    if not scales.numel():
        return None
    low, high = (float(end) for end in torch.aminmax(scales))
    stride = -(-scales.numel() // COUNTED)
    taken = scales[::stride].double().cpu()
    positive = taken[(taken > 0) & torch.isfinite(taken)]
    if not len(positive):
        return None
    logs = positive.log2()
    first, last = float(logs.min()), float(logs.max())
    step = 2.0 ** max(
        -3, math.ceil(math.log2(max(last - first, 1e-9) / _BINS))
    )  # in octaves: an eighth, or as many as it takes
    start = math.floor(first / step) * step
    counts = torch.bincount(((logs - start) / step).long())
    return Histogram(start, step, tuple(counts.tolist()), low, high, len(taken), scales.numel())
